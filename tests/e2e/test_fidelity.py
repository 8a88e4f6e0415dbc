"""A virtual GPU and the step simulator serve the same requests alike.

Short runs beside other tests, so the bounds are wide; ``python -m tests.bench.fidelity`` holds the narrow ones on an
idle machine (``docs/fidelity.md``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from serving.capacity import Slo
from serving.engine.launch import Engine, start_engines
from tests.bench.fidelity_knee import compare_knees, crossing, simulated_factor
from tests.bench.fidelity_replay import Case, schedule
from tests.bench.fidelity_virtual import compare_loads

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CASE = Case("chat", 1 / 16, Slo(1.0, 0.03), slowdown=12.0)
WIDE_BOUNDS = {"output_per_s": 0.10, "tpot_mean_s": 0.15, "tpot_p50_s": 0.20, "ttft_p50_s": 0.40}
KNEE_BOUND = 0.25
SECONDS = 6.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    (running,) = asyncio.run(start_engines([CASE.spec()], tmp_path_factory.mktemp("fidelity"), timeout_s=240))
    yield running
    asyncio.run(running.stop())


def quietly(_: str) -> None:
    """Nobody watches."""


async def test_a_virtual_gpu_gives_its_profile_back(engine: Engine) -> None:
    """Throughput, TPOT and TTFT at 60 % of the knee are those that the profile predicts."""
    result = await compare_loads(engine, CASE, SECONDS, 1, quietly, shares=(0.6,))

    (load,) = result.loads
    errors = {figure.name: figure.error for figure in load.figures}
    for name, bound in WIDE_BOUNDS.items():
        assert abs(errors[name]) <= bound, load


async def test_the_simulated_knee_is_that_of_a_virtual_gpu(engine: Engine) -> None:
    """Below the simulated knee real vLLM meets the SLO too, above it misses it, and between them it passes alike."""
    result = await compare_knees(engine, CASE, SECONDS, 1, quietly, shares=(0.75, 1.25))

    below, above = result.rates
    assert below.virtual_load <= 1 < above.virtual_load, result
    assert abs(result.error) <= KNEE_BOUND, result


def test_the_judge_finds_the_simulated_knee() -> None:
    """At the factor that it finds the SLO is just met, a little above it is missed."""
    arrivals = schedule(CASE.workload, 30.0, 30.0, seed=2)
    factor = simulated_factor(CASE, arrivals)
    load = {
        share: CASE.load(CASE.simulated([a._replace(time_s=a.time_s / factor / share) for a in arrivals]))
        for share in (1.0, 1.02)
    }
    assert load[1.0] <= 1 < load[1.02]


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([(0.9, 0.8), (1.0, 1.2), (1.1, 2.0)], 0.95),
        ([(0.9, 0.6), (1.0, 0.8), (1.1, 0.9)], 1.2),
        ([(0.9, 1.1), (1.0, 1.3), (1.1, 2.0)], 0.85),
    ],
)
def test_where_a_load_passes_its_bound(loads: list[tuple[float, float]], expected: float) -> None:
    """On the line between two rates, or along the nearest line beyond them."""
    assert crossing(loads) == pytest.approx(expected)
