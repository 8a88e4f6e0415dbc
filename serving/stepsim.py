"""What one replica can serve: its requests simulated step by step, and the knee under an SLO that follows.

The closed forms of ``capacity`` are means, and SLOs are percentiles. So the supply of a replica is the largest Poisson
rate at which the simulated percentiles of TTFT and TPOT still meet the SLO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, sqrt
from random import Random
from typing import Literal, NamedTuple

import msgspec

from serving.batching import BatchingReplica, SimulatedRequest
from serving.capacity import (
    EngineLimits,
    InfeasibleSloError,
    ReplicaGroup,
    RequestShape,
    Slo,
    StepTimeModel,
    WorkloadMix,
    closed_form_requests_per_s,
)

Bound = Literal["ttft", "tpot"]

#: The bisection ends when the bracket is this share of its upper end.
KNEE_TOLERANCE = 0.005
#: A horizon covers at least this many requests, and this many times the longest that a typical request may last.
_MIN_REQUESTS = 3000
_MAX_REQUESTS = 12000
_HORIZON_LIFETIMES = 8
#: Share of the arrivals that only warm the replica up.
_WARM_UP_SHARE = 0.2
#: Below this share of the closed form, a rate counts as none.
_LEAST_SHARE = 1 / 1024


class Arrival(NamedTuple):
    """A request and when it comes, in seconds since the start."""

    time_s: float
    shape: RequestShape


class Outcome(NamedTuple):
    """What became of one arrival, all times in seconds since the start."""

    arrival_s: float
    first_token_s: float
    finish_s: float
    shape: RequestShape

    @property
    def ttft_s(self) -> float:
        """Time to first token, queueing included."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token."""
        later_tokens = self.shape.output_tokens - 1
        return (self.finish_s - self.first_token_s) / later_tokens if later_tokens else 0.0


class Knee(msgspec.Struct, frozen=True):
    """The largest load that meets an SLO.

    ``utilization`` is its share of the closed-form bound. ``ttft_s`` and ``tpot_s`` are the SLO's percentile of each at
    that load, and ``bound`` names the one that a higher load misses first.
    """

    requests_per_s: float
    utilization: float
    ttft_s: float
    tpot_s: float
    bound: Bound


def poisson_arrivals(mix: WorkloadMix, requests_per_s: float, duration_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of shapes drawn from the mix, over ``duration_s`` seconds. Same seed, same arrivals."""
    rng = Random(seed)  # noqa: S311 - simulation, not security
    arrivals = []
    time_s = rng.expovariate(requests_per_s)
    while time_s < duration_s:
        arrivals.append(Arrival(time_s, rng.choice(mix.shapes)))
        time_s += rng.expovariate(requests_per_s)
    return arrivals


def simulate(step_time: StepTimeModel, limits: EngineLimits, arrivals: Sequence[Arrival]) -> list[Outcome]:
    """Serve the arrivals to the end; one outcome each, in the order given, which must be that of time.

    Raises ``ValueError`` for a request that can never run: longer than the context, or than the whole KV cache.
    """
    for shape in {arrival.shape for arrival in arrivals}:
        _check_fits(limits, shape)
    requests = [SimulatedRequest(arrival.time_s, arrival.shape) for arrival in arrivals]
    BatchingReplica(step_time, limits, requests).run()
    return [Outcome(r.arrival_s, r.first_token_s, r.finish_s, r.shape) for r in requests]


def knee(step_time: StepTimeModel, limits: EngineLimits, mix: WorkloadMix, slo: Slo, seed: int = 0) -> Knee:
    """The largest Poisson rate of the mix that meets the SLO on one replica, by bisection under the closed form.

    Every rate is tried with the same requests and the same gaps, stretched (common random numbers), so the answer is a
    function of its arguments. A rate whose queue still grows at the end is refused whatever its percentiles.
    Raises ``InfeasibleSloError``, naming what is missed, where no load meets the SLO, or where the mix holds a request
    that the replica can never run.
    """
    _check_lone_requests(step_time, limits, mix, slo)
    ceiling = closed_form_requests_per_s(ReplicaGroup(1, step_time, limits, slo), mix)
    at_one_a_second = unit_arrivals(mix, horizon_requests(ceiling, mix, slo), seed)

    def judge(requests_per_s: float) -> _Verdict:
        arrivals = [Arrival(arrival.time_s / requests_per_s, arrival.shape) for arrival in at_one_a_second]
        return _judge(simulate(step_time, limits, arrivals), slo)

    rate, at_knee, beyond = _bisect(judge, ceiling)
    if at_knee is None:
        raise InfeasibleSloError(
            f"no load above {rate:.3g} requests/s meets the {_missed(beyond)} bound for {mix.name}"
        )
    return Knee(rate, rate / ceiling, at_knee.ttft_s, at_knee.tpot_s, _missed(beyond))


class _Verdict(NamedTuple):
    """One rate tried: the percentiles seen, each over its bound, and whether the queue kept growing."""

    ttft_s: float
    tpot_s: float
    ttft_load: float
    tpot_load: float
    growing: bool

    @property
    def met(self) -> bool:
        return self.ttft_load <= 1 and self.tpot_load <= 1 and not self.growing


def _missed(verdict: _Verdict) -> Bound:
    return "ttft" if verdict.growing or verdict.ttft_load > verdict.tpot_load else "tpot"


def _bisect(judge: Callable[[float], _Verdict], ceiling: float) -> tuple[float, _Verdict | None, _Verdict]:
    """The highest rate found to be met with its verdict, or the lowest tried and None; and the last verdict above."""
    high, beyond = ceiling, judge(ceiling)
    if beyond.met:
        return ceiling, beyond, beyond
    low, at_low = 0.0, None
    while high - low > KNEE_TOLERANCE * high and high > _LEAST_SHARE * ceiling:
        middle = (low + high) / 2
        verdict = judge(middle)
        if verdict.met:
            low, at_low = middle, verdict
        else:
            high, beyond = middle, verdict
    return (low, at_low, beyond) if at_low else (high, None, beyond)


def _judge(outcomes: Sequence[Outcome], slo: Slo) -> _Verdict:
    steady = outcomes[int(len(outcomes) * _WARM_UP_SHARE) :]
    ttft_s = percentile([o.ttft_s for o in steady], slo.percentile)
    tpot_s = percentile([o.tpot_s for o in steady if o.shape.output_tokens > 1], slo.percentile)
    return _Verdict(ttft_s, tpot_s, ttft_s / slo.ttft_s, tpot_s / slo.tpot_s, _is_growing(steady))


def _is_growing(outcomes: Sequence[Outcome]) -> bool:
    """Whether more requests wait at the end of the arrivals than did halfway, beyond what chance explains."""
    half = len(outcomes) // 2

    def waiting(arrived: int) -> int:
        now_s = outcomes[arrived - 1].arrival_s
        return sum(o.first_token_s > now_s for o in outcomes[:arrived])

    return waiting(len(outcomes)) - waiting(half) > 4 * sqrt(half)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that at least ``percent`` percent of them do not exceed; 0 for none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, ceil(len(values) * percent / 100 - 1e-9) - 1)]


def unit_arrivals(mix: WorkloadMix, count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals at one a second, in whole shuffled rounds of the mix, so that no shape is over-represented."""
    rng = Random(seed)  # noqa: S311 - simulation, not security
    shapes: list[RequestShape] = []
    while len(shapes) < count:
        shapes.extend(rng.sample(mix.shapes, len(mix.shapes)))
    arrivals = []
    time_s = 0.0
    for shape in shapes:
        time_s += rng.expovariate(1.0)
        arrivals.append(Arrival(time_s, shape))
    return arrivals


def horizon_requests(ceiling: float, mix: WorkloadMix, slo: Slo) -> int:
    """Enough arrivals for the replica to be in its steady state most of the time, within a bound on the effort."""
    lifetime_s = slo.ttft_s + slo.tpot_s * mix.mean_output_tokens
    return min(_MAX_REQUESTS, max(_MIN_REQUESTS, ceil(_HORIZON_LIFETIMES * ceiling * lifetime_s)))


def _check_lone_requests(step_time: StepTimeModel, limits: EngineLimits, mix: WorkloadMix, slo: Slo) -> None:
    """Raise ``InfeasibleSloError`` where requests that have the replica to themselves miss the SLO."""
    try:
        lone = [simulate(step_time, limits, [Arrival(0.0, shape)])[0] for shape in mix.shapes]
    except ValueError as error:
        raise InfeasibleSloError(f"{mix.name} cannot be served: {error}") from error
    ttft_s = percentile([o.ttft_s for o in lone], slo.percentile)
    tpot_s = percentile([o.tpot_s for o in lone if o.shape.output_tokens > 1], slo.percentile)
    for name, seen_s, bound_s in (("TTFT", ttft_s, slo.ttft_s), ("TPOT", tpot_s, slo.tpot_s)):
        if seen_s > bound_s:
            raise InfeasibleSloError(
                f"p{slo.percentile:g} {name} of {mix.name} is {seen_s:.4g} s on an idle replica, "
                f"the bound is {bound_s:.4g} s: no load meets it"
            )


def _check_fits(limits: EngineLimits, shape: RequestShape) -> None:
    inputs, outputs = shape.input_tokens, shape.output_tokens
    if outputs < 1 or not 0 <= shape.cached_tokens < inputs:
        raise ValueError(f"{shape} is no request: it needs an uncached input token and an output token")
    longest = min(limits.max_model_len, limits.request_kv_blocks * limits.block_size)
    if inputs + outputs > longest:
        raise ValueError(
            f"a request of {inputs} + {outputs} tokens exceeds the {longest} that the replica can hold "
            f"(context {limits.max_model_len}, KV cache {limits.kv_tokens} tokens)"
        )
