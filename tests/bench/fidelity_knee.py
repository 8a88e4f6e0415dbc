"""The step simulator's knee against open-loop runs on a virtual GPU, one mix in each regime.

The simulated knee of one finite schedule is found by bisection. Then real vLLM serves that schedule a little below, at
and a little above it, and one judge says of both where the SLO is first missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from serving.capacity import Slo
from serving.engine.launch import Engine, start_engines
from serving.stepsim import Arrival, knee
from tests.bench.fidelity_replay import Case, replay, schedule, stretched

#: Each is short of something else; the last one also preempts all the time, which no fleet should do.
CASES = (
    Case("chat", 1 / 8, Slo(1.0, 0.03), 20.0),
    Case("decode-heavy", 1 / 16, Slo(0.1, 0.03), 20.0, {"max_num_seqs": 64}, "slots"),
    Case("prefill-heavy", 1 / 16, Slo(0.25, 0.05), 20.0, {"max_num_batched_tokens": 2048}, "step tokens"),
    Case("long-context", 1 / 16, Slo(0.4, 0.06), 10.0, {"kv_tokens": 16384, "max_num_batched_tokens": 2048}, "KV"),
    Case("decode-heavy", 1 / 16, Slo(0.2, 0.03), 20.0, {"kv_tokens": 2048, "max_model_len": 512}, "KV, preempting"),
)
#: Rates tried, as shares of the simulated knee of the same schedule.
RATES = (0.9, 1.0, 1.1)
#: The most that the two knees may differ, as a share of the simulated one.
BOUND = 0.10
#: Virtual GPUs that serve at once: each takes a small part of a core.
AT_ONCE = 3
_BISECTIONS = 12


class RateResult(msgspec.Struct, frozen=True):
    """One rate: the SLO's percentiles over their bounds, the worse of the two, as both have it. 1 is the knee."""

    share: float
    requests_per_s: float
    virtual_load: float
    simulated_load: float
    lag_p99_s: float
    engine_cores: float


class KneeResult(msgspec.Struct, frozen=True):
    """Both knees of one schedule, in requests a second, by the same judge.

    ``knee_per_s`` is the one that the supply is derived from (more requests, no fixed end), for comparison.
    ``is_beyond`` says that the virtual GPU's lies outside of the rates tried, and is extrapolated.
    """

    case: Case
    requests: int
    knee_per_s: float
    simulated_per_s: float
    virtual_per_s: float
    error: float
    is_beyond: bool
    holds: bool
    rates: tuple[RateResult, ...]


async def run_knees(
    folder: Path, duration_s: float, seed: int, tell: Callable[[str], None], cases: Sequence[Case] = CASES
) -> tuple[KneeResult, ...]:
    """Start a virtual GPU for each case, compare their knees ``AT_ONCE`` at a time, and stop them."""
    engines = await start_engines([case.spec() for case in cases], folder)
    turns = asyncio.Semaphore(AT_ONCE)

    async def compare(engine: Engine, case: Case) -> KneeResult:
        async with turns:
            return await compare_knees(engine, case, duration_s, seed, tell)

    try:
        return tuple(
            await asyncio.gather(*(compare(engine, case) for engine, case in zip(engines, cases, strict=True)))
        )
    finally:
        await asyncio.gather(*(engine.stop() for engine in engines))


async def compare_knees(
    engine: Engine,
    case: Case,
    duration_s: float,
    seed: int,
    tell: Callable[[str], None],
    shares: Sequence[float] = RATES,
) -> KneeResult:
    """The knee of a schedule of about that length, on a running virtual GPU of that case and simulated."""
    limit = knee(case.step_time, case.batch_limits, case.workload, case.slowed_slo).requests_per_s
    arrivals = schedule(case.workload, limit, duration_s, seed)
    factor = simulated_factor(case, arrivals)
    rates = []
    for share in shares:
        tell(f"{case.mix}, short of {case.short_of}: {share:.0%} of its simulated knee")
        at_rate = stretched(arrivals, factor * share)
        ran = await replay(engine, at_rate)
        rates.append(
            RateResult(
                share,
                limit * factor * share,
                case.load(ran.outcomes),
                case.load(case.simulated(at_rate)),
                ran.lag_p99_s,
                ran.engine_cores,
            )
        )
    seen = crossing([(rate.share, rate.virtual_load) for rate in rates])
    predicted = crossing([(rate.share, rate.simulated_load) for rate in rates])
    return KneeResult(
        case=case,
        requests=len(arrivals),
        knee_per_s=limit,
        simulated_per_s=limit * factor * predicted,
        virtual_per_s=limit * factor * seen,
        error=seen / predicted - 1,
        is_beyond=not shares[0] <= seen <= shares[-1],
        holds=abs(seen / predicted - 1) <= BOUND,
        rates=tuple(rates),
    )


def simulated_factor(case: Case, arrivals: Sequence[Arrival]) -> float:
    """By what factor the schedule can be sped up until its simulated load passes 1."""
    low, high = 0.5, 2.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if case.load(case.simulated(stretched(arrivals, middle))) <= 1:
            low = middle
        else:
            high = middle
    return low


def crossing(loads: Sequence[tuple[float, float]]) -> float:
    """Where the load first passes 1, by straight lines between rates in order; beyond them, along the nearest line."""
    pairs = list(pairwise(loads))
    for (rate, load), (next_rate, next_load) in pairs:
        if load <= 1 < next_load:
            return rate + (next_rate - rate) * (1 - load) / (next_load - load)
    (rate, load), (next_rate, next_load) = pairs[0] if loads[0][1] > 1 else pairs[-1]
    slope = (next_load - load) / (next_rate - rate)
    return rate + (1 - load) / slope if slope > 0 else (rate if load > 1 else next_rate)
