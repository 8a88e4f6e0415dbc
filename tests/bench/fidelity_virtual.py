"""A virtual GPU against its own profile: real vLLM serves a schedule, and so does the simulator, at three loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from serving.capacity import Slo
from serving.engine.launch import Engine, start_engines
from serving.points import MeasuredPoint
from serving.stepsim import knee
from tests.bench.fidelity_replay import Case, point_of, replay, schedule

CASE = Case("chat", 1 / 8, Slo(1.0, 0.03), slowdown=20.0)
LOADS = (0.3, 0.6, 0.9)
#: The most that a figure of the virtual GPU may differ from the profile's prediction, as a share of it.
BOUNDS = {"output_per_s": 0.03, "tpot_mean_s": 0.05, "tpot_p50_s": 0.05, "ttft_p50_s": 0.10}
#: Shown too, without a bound.
_SHOWN = ("ttft_mean_s", "ttft_p95_s", "tpot_p95_s")


class Figure(msgspec.Struct, frozen=True):
    """One figure of both, and how far the virtual GPU's is above the predicted one, as a share of it."""

    name: str
    virtual: float
    predicted: float
    error: float
    bound: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is within its bound; true where it has none."""
        return self.bound is None or abs(self.error) <= self.bound


class LoadResult(msgspec.Struct, frozen=True):
    """One load, as a share of the knee."""

    share: float
    requests_per_s: float
    requests: int
    figures: tuple[Figure, ...]
    lag_p99_s: float
    engine_cores: float


class VirtualResult(msgspec.Struct, frozen=True):
    """The case, the knee that its loads are shares of (a simulated figure), and what each load gave."""

    case: Case
    knee_per_s: float
    loads: tuple[LoadResult, ...]
    holds: bool


async def run_virtual(
    folder: Path, duration_s: float, seed: int, tell: Callable[[str], None], case: Case = CASE
) -> VirtualResult:
    """Start a virtual GPU, compare it at each load, and stop it."""
    engines = await start_engines([case.spec()], folder)
    try:
        return await compare_loads(engines[0], case, duration_s, seed, tell)
    finally:
        await engines[0].stop()


async def compare_loads(
    engine: Engine,
    case: Case,
    duration_s: float,
    seed: int,
    tell: Callable[[str], None],
    shares: Sequence[float] = LOADS,
) -> VirtualResult:
    """Compare a running virtual GPU of that case with its profile at each share of the simulated knee."""
    limit = knee(case.step_time, case.batch_limits, case.workload, case.slowed_slo).requests_per_s
    loads = []
    for share in shares:
        tell(f"{case.mix}: {share:.0%} of the knee")
        loads.append(await _compare(engine, case, share, limit, duration_s, seed))
    holds = all(figure.holds for load in loads for figure in load.figures)
    return VirtualResult(case, limit, tuple(loads), holds)


async def _compare(engine: Engine, case: Case, share: float, limit: float, duration_s: float, seed: int) -> LoadResult:
    arrivals = schedule(case.workload, share * limit, duration_s, seed)
    ran = await replay(engine, arrivals)
    seen = point_of(case.mix, arrivals, ran.outcomes)
    predicted = point_of(case.mix, arrivals, case.simulated(arrivals))
    return LoadResult(share, share * limit, len(arrivals), compared(seen, predicted), ran.lag_p99_s, ran.engine_cores)


def compared(seen: MeasuredPoint, predicted: MeasuredPoint) -> tuple[Figure, ...]:
    """Every figure that has a bound, then those that are shown too."""
    return tuple(_figure(name, _value(seen, name), _value(predicted, name)) for name in (*BOUNDS, *_SHOWN))


def _value(point: MeasuredPoint, name: str) -> float:
    if name == "output_per_s":
        return point.output_tokens / point.duration_s
    value: float | None = getattr(point, name)
    if value is None:
        raise ValueError(f"a run of {point.requests} requests has no {name}; run it for longer")
    return value


def _figure(name: str, virtual: float, predicted: float) -> Figure:
    return Figure(name, virtual, predicted, virtual / predicted - 1, BOUNDS.get(name))
