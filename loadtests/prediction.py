"""What a schedule must come to, computed before it is sent: the same charges, through the same meter arithmetic.

The replay goes through the schedule in virtual time. Each request asks for what the gateway would ask of a tier that
holds the maximum: one request, the prompt as estimated from its bytes, the output at its maximum, one place in flight,
and the pool's cost. The prompt is corrected when its first token comes and the place is given back when it ends. Those
two moments come from the step simulator: the requests that one round admits are simulated on the fleet, and the next
round uses the times found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import msgspec

from loadtests.results import share
from loadtests.schedule import PlannedRequest, Schedule
from ratelimit.cell import Cell
from ratelimit.gateway.charges import charges_for
from ratelimit.gateway.hold import Usage, pool_cost_us
from ratelimit.gateway.terms import Terms, terms_by_tier
from ratelimit.meter import GAUGE, Admitted, Charge
from ratelimit.publication import Publication, PublishedPool
from serving.capacity import ReplicaGroup, RequestShape
from serving.stepsim import Arrival, Outcome, simulate

#: Rounds of admission and simulation. The answer of the third differs from the second's by single requests.
ROUNDS = 3
#: Longer than any answer of a demo: no lease ends in a replay.
_LEASE_MS = 3_600_000
_COUNTED, _ENDED = 0, 1


class Stay(NamedTuple):
    """When a request's first token comes and when it ends, in seconds after its arrival."""

    first_token_s: float
    end_s: float


class Replay(msgspec.Struct, frozen=True):
    """Per request of the schedule: the limit that refuses it (None: admitted), and its stay if admitted."""

    refused_by: tuple[str | None, ...]
    stays: tuple[Stay | None, ...]


class Prediction(msgspec.Struct, frozen=True):
    """What a step is expected to show, by the definitions of ``results.Figures``."""

    throttled_share: float
    throttled_request_share: float
    goodput_tokens_per_s: float
    slo_met_share: float
    refused_by: dict[str, int]


#: Tokens that the gateway will hold for a request's prompt, before the engine has counted it.
HeldInput = Callable[[PlannedRequest], int]


def predict(
    schedule: Schedule, publication: Publication, model: str, held_input: HeldInput
) -> tuple[Prediction, Replay]:
    """The prediction for this schedule against this publication's limits and fleet."""
    pool = publication.pool(model)
    if pool is None or not pool.replicas:
        raise ValueError(f"the publication has no replicas for {model}, so there is nothing to predict")
    replay = replay_schedule(schedule, publication, pool, held_input)
    return summarise(schedule, pool, replay), replay


def replay_schedule(schedule: Schedule, publication: Publication, pool: PublishedPool, held_input: HeldInput) -> Replay:
    """Admit and simulate in turns until the stays that decide admissions are those that follow from them."""
    terms = terms_by_tier(publication)
    tier_of_key = {load.key: load.tier for load in schedule.loads}
    asked = [
        _Asked(*(_charges(r, tier_of_key[r.key], terms, pool.model, n) for n in (held_input(r), r.input_tokens)))
        for r in schedule.requests
    ]
    slo = pool.groups[0].slo
    stays = [_stay(request, slo.ttft_s, slo.tpot_s) for request in schedule.requests]
    replay = Replay((), ())
    for _ in range(ROUNDS):
        refused_by = _admit(schedule, asked, stays, publication.epoch)
        found = simulate_fleet(schedule.requests, refused_by, pool.groups)
        replay = Replay(tuple(refused_by), tuple(found))
        stays = _completed(schedule.requests, found)
    return replay


def simulate_fleet(
    requests: Sequence[PlannedRequest], refused_by: Sequence[str | None], groups: Sequence[ReplicaGroup]
) -> list[Stay | None]:
    """The stays of the admitted requests on the fleet, each replica taking its turn as routing does among equals."""
    replicas = [group for group in groups for _ in range(group.count)]
    backlog_s = [0.0] * len(replicas)
    assigned: list[list[PlannedRequest]] = [[] for _ in replicas]
    last_s = 0.0
    for request in requests:
        if refused_by[request.index] is not None:
            continue
        backlog_s = [max(0.0, backlog - (request.time_s - last_s)) for backlog in backlog_s]
        last_s = request.time_s
        chosen = min(range(len(replicas)), key=backlog_s.__getitem__)
        assigned[chosen].append(request)
        backlog_s[chosen] += pool_cost_us([replicas[chosen]], _usage(request), 1, 1) / 1e6
    stays: list[Stay | None] = [None] * len(requests)
    for replica, theirs in zip(replicas, assigned, strict=True):
        for request, outcome in zip(theirs, _outcomes(replica, theirs), strict=True):
            stays[request.index] = Stay(outcome.ttft_s, outcome.finish_s - outcome.arrival_s)
    return stays


def summarise(schedule: Schedule, pool: PublishedPool, replay: Replay) -> Prediction:
    """The shares and the goodput of a replay, over the schedule's measured window."""
    measured = schedule.measured
    slo = pool.groups[0].slo
    met = [
        request
        for request in measured
        if (stay := replay.stays[request.index]) and _meets(request, stay, slo.ttft_s, slo.tpot_s)
    ]
    refused = [request for request in measured if replay.refused_by[request.index] is not None]
    reasons: dict[str, int] = {}
    for request in refused:
        reason = replay.refused_by[request.index] or ""
        reasons[reason] = reasons.get(reason, 0) + 1
    return Prediction(
        throttled_share=share((r.tokens for r in refused), (r.tokens for r in measured)),
        throttled_request_share=len(refused) / len(measured) if measured else 0.0,
        goodput_tokens_per_s=sum(r.tokens for r in met) / schedule.window.length_s,
        slo_met_share=len(met) / max(1, len(measured) - len(refused)),
        refused_by=reasons,
    )


class _Asked(NamedTuple):
    """The charges of one request at admission, and the same once its prompt is counted."""

    held: tuple[Charge, ...]
    counted: tuple[Charge, ...]


def _charges(
    request: PlannedRequest, tier: str, terms: Mapping[tuple[str, str], Terms], model: str, input_tokens: int
) -> tuple[Charge, ...]:
    """What the gateway would charge; a key is known by its name here."""
    usage = Usage(input_tokens, request.output_tokens)
    of_tier = terms[tier, model]
    return charges_for(request.key, of_tier, usage, pool_cost_us(of_tier.groups, usage, 1, 1))


def _admit(schedule: Schedule, asked: Sequence[_Asked], stays: Sequence[Stay], epoch: int) -> list[str | None]:
    """One pass in virtual time: the bucket that refuses each request, or None."""
    cell = Cell()
    refused_by: list[str | None] = [None] * len(schedule.requests)
    due: list[tuple[float, int, int]] = []
    for request in schedule.requests:
        while due and due[0][0] <= request.time_s:
            _apply(cell, heappop(due), asked)
        now_us = round(request.time_s * 1e6)
        answer = cell.admit(str(request.index), asked[request.index].held, epoch, _LEASE_MS, now_us)
        stay = stays[request.index]
        if not isinstance(answer, Admitted):
            refused_by[request.index] = answer.bucket.rpartition(":")[2]
        else:
            heappush(due, (request.time_s + stay.first_token_s, _COUNTED, request.index))
            heappush(due, (request.time_s + stay.end_s, _ENDED, request.index))
    return refused_by


def _apply(cell: Cell, event: tuple[float, int, int], asked: Sequence[_Asked]) -> None:
    time_s, what, index = event
    now_us = round(time_s * 1e6)
    counted = asked[index].counted
    if what == _COUNTED:
        cell.extend(str(index), counted, _LEASE_MS, now_us)
    else:
        cell.settle(str(index), [charge for charge in counted if charge.kind != GAUGE], now_us)


def _usage(request: PlannedRequest) -> Usage:
    return Usage(request.input_tokens, request.output_tokens)


def _outcomes(replica: ReplicaGroup, requests: Sequence[PlannedRequest]) -> list[Outcome]:
    arrivals = [Arrival(r.time_s, RequestShape(r.input_tokens, r.output_tokens)) for r in requests]
    return simulate(replica.step_time, replica.limits, arrivals)


def _stay(request: PlannedRequest, ttft_s: float, tpot_s: float) -> Stay:
    """The stay of a request that takes these times; the first round takes the SLO's bounds for them."""
    return Stay(ttft_s, ttft_s + (request.output_tokens - 1) * tpot_s)


def _completed(requests: Sequence[PlannedRequest], found: Sequence[Stay | None]) -> list[Stay]:
    """The stays found, and for requests that were refused the one they would have had at the mean times found."""
    known = [(request, stay) for request, stay in zip(requests, found, strict=True) if stay is not None]
    ttft_s = share((stay.first_token_s for _, stay in known), (1 for _ in known))
    tpot_s = share((stay.end_s - stay.first_token_s for _, stay in known), (r.output_tokens - 1 for r, _ in known))
    return [stay or _stay(request, ttft_s, tpot_s) for request, stay in zip(requests, found, strict=True)]


def _meets(request: PlannedRequest, stay: Stay, ttft_s: float, tpot_s: float) -> bool:
    decode_s = stay.end_s - stay.first_token_s
    return stay.first_token_s <= ttft_s and decode_s <= tpot_s * max(1, request.output_tokens - 1)
