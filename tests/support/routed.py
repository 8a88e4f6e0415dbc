"""A mixed fleet of simulated replicas behind the real router, in virtual time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from random import Random
from typing import NamedTuple

import msgspec

from serving.batching import BatchingReplica, SimulatedRequest
from serving.capacity import (
    EngineLimits,
    ReplicaGroup,
    RequestShape,
    StepTimeModel,
    WorkloadMix,
    closed_form_requests_per_s,
    fleet_cost_s,
    replica_seconds,
)
from serving.routing import Alike, Load, Place, Router
from serving.stepsim import percentile

#: Share of the requests that only warm the fleet up.
_WARM_UP = 0.25
#: By then the last request has ended.
_LONGEST_S = 1e6


class Named(NamedTuple):
    """A replica as routing knows it."""

    url: str
    requests_per_s: float


class Routed(NamedTuple):
    """What came of a run: each kind's load over Σ cost, both per replica; percentiles of the times, in seconds."""

    loads: dict[str, float]
    p95_ttft_s: float
    p95_tpot_s: float
    in_time: float


class OnlineReplica(BatchingReplica):
    """A replica whose requests are not known beforehand."""

    def __init__(self, step_time: StepTimeModel, limits: EngineLimits) -> None:
        self._coming: list[SimulatedRequest] = []
        super().__init__(step_time, limits, self._coming)

    def send(self, request: SimulatedRequest) -> None:
        """It arrives now, and no earlier than any other."""
        self._coming.append(request)

    def run_until(self, time_s: float) -> None:
        """Take every step that begins before."""
        known = len(self._coming)
        self._coming.append(SimulatedRequest(time_s, RequestShape(1, 1)))  # decodes stop there to look around
        while self._now_s < time_s:
            if not self._running and not self._waiting:
                self._now_s = max(self._now_s, self._coming[self._arrived].arrival_s)
            while self._arrived < known and self._coming[self._arrived].arrival_s <= self._now_s:
                self._waiting.append(self._coming[self._arrived])
                self._arrived += 1
            if self._running or self._waiting:
                self._advance()
        self._coming.pop()


class _Sent(NamedTuple):
    request: SimulatedRequest
    place: Place[Named]


class RoutedFleet:
    """Replicas of unlike kinds (each named group), and the mix of requests that all of them serve.

    With ``weighed_for`` routing is not told of which kind each replica is, and weighs them for that mix.
    ``slower`` says how many times longer a kind's steps take than its group says.
    """

    def __init__(
        self,
        kinds: Mapping[str, ReplicaGroup],
        shapes: Sequence[RequestShape],
        weighed_for: WorkloadMix | None = None,
        slower: Mapping[str, float] | None = None,
    ) -> None:
        self._kinds = kinds
        self._shapes = shapes
        self._groups = list(kinds.values())
        self._of_kind: dict[str, str] = {}
        self._replicas: dict[str, OnlineReplica] = {}
        told: list[Alike[Named]] = []
        for name, group in kinds.items():
            kind = msgspec.structs.replace(group, count=1)
            rate = closed_form_requests_per_s(kind, weighed_for or WorkloadMix("its own", tuple(shapes)))
            named = [Named(f"{name} {i}", rate) for i in range(group.count)]
            told.append(Alike("pool", kind, named))
            for each in named:
                self._of_kind[each.url] = name
                step_time = group.step_time.slowed((slower or {}).get(name, 1.0))
                self._replicas[each.url] = OnlineReplica(step_time, group.limits)
        everyone = [replica for each in told for replica in each.replicas]
        self._fleet = [Alike("pool", None, everyone)] if weighed_for else told
        self._router = Router(0.0, lambda: 1)

    def run(self, utilization: float, requests: int, seed: int = 0) -> Routed:
        """Poisson arrivals that are charged ``utilization`` of the fleet's replica-seconds."""
        rng = Random(seed)
        costs = {shape: fleet_cost_s(self._groups, shape) for shape in set(self._shapes)}
        mean_s = fsum(costs[shape] for shape in self._shapes) / len(self._shapes)
        rate = utilization * len(self._replicas) / mean_s
        time_s, sent = 0.0, list[_Sent]()
        open_: list[_Sent] = []
        for _ in range(requests):
            time_s += rng.expovariate(rate)
            shape = rng.choice(self._shapes)
            open_ = self._still_open(open_, time_s)
            place = self._router.choose(self._fleet, Load(shape, 1, costs[shape]))
            assert place is not None
            self._router.take(place)
            open_.append(_Sent(SimulatedRequest(time_s, shape), place))
            self._replicas[place.replica.url].send(open_[-1].request)
            sent.append(open_[-1])
        self._still_open(open_, time_s + _LONGEST_S)
        return self._found(sent[int(requests * _WARM_UP) :], costs)

    def _still_open(self, sent: list[_Sent], time_s: float) -> list[_Sent]:
        for replica in self._replicas.values():
            replica.run_until(time_s)
        left: list[_Sent] = []
        for each in sent:
            if 0 <= each.request.finish_s <= time_s:
                self._router.leave(each.place)
            else:
                left.append(each)
        return left

    def _found(self, sent: list[_Sent], costs: Mapping[RequestShape, float]) -> Routed:
        charged = fsum(costs[each.request.shape] for each in sent) / len(self._replicas)
        loads = dict.fromkeys(self._kinds, 0.0)
        for each in sent:
            name = self._of_kind[each.place.replica.url]
            group = self._kinds[name]
            loads[name] += replica_seconds(group, each.request.shape) / group.count / charged
        ttfts_s = [each.request.first_token_s - each.request.arrival_s for each in sent]
        tpots_s = [_tpot_s(each.request) for each in sent]
        slo = self._groups[0].slo
        met = [ttft <= slo.ttft_s and tpot <= slo.tpot_s for ttft, tpot in zip(ttfts_s, tpots_s, strict=True)]
        return Routed(loads, percentile(ttfts_s, 95), percentile(tpots_s, 95), sum(met) / len(met))


def _tpot_s(request: SimulatedRequest) -> float:
    return (request.finish_s - request.first_token_s) / max(1, request.shape.output_tokens - 1)
