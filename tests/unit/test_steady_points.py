from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from serving.points import MeasuredPoint
from serving.steady_points import steady_points

STEADY = MeasuredPoint(
    mix="chat",
    requests=1000,
    duration_s=250.0,
    input_tokens=220_000,
    output_tokens=200_000,
    concurrency=30,
    ttft_mean_s=0.1,
    tpot_mean_s=0.02,
)


def test_a_long_run_at_a_constant_load_is_steady() -> None:
    """250 s are 61 lives of 4.1 s, 30 of 1,000 requests were in flight at most, and nobody waited."""
    assert steady_points([STEADY]) == ((STEADY,), ())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"duration_s": 40.0}, r"9\.8 lives of a request, 10 are needed"),
        ({"concurrency": 1000.0}, "1000 of its 1000 requests were in flight at once: a burst"),
        ({"ttft_mean_s": 20.0}, "8% of the run: a queue grew"),
        ({"tpot_mean_s": None, "ttft_mean_s": None, "concurrency": None}, "neither latency nor concurrency"),
        ({"e2e_mean_s": 30.0}, r"8\.3 lives"),
    ],
)
def test_each_sign_of_an_unsteady_run_is_told(change: dict[str, float | None], why: str) -> None:
    """A short run, a burst, a growing queue and a run that tells nothing are not steady, and each says why."""
    run = replace(STEADY, **change)
    steady, ((unsteady, reason),) = steady_points([run])

    assert steady == ()
    assert unsteady == run
    assert re.search(why, reason)


def test_a_closed_loop_without_latencies_is_judged_by_littles_law() -> None:
    """With 50 in flight throughout, 1,000 requests are 20 lives; with 200 they are five."""
    silent = replace(STEADY, tpot_mean_s=None, ttft_mean_s=None)

    assert steady_points([replace(silent, concurrency=50)])[1] == ()
    assert steady_points([replace(silent, concurrency=200)])[0] == ()


def test_steady_and_unsteady_runs_keep_their_order() -> None:
    """Sorting them apart loses none and moves none."""
    runs = [replace(STEADY, duration_s=duration_s) for duration_s in (250.0, 10.0, 260.0, 11.0)]
    steady, unsteady = steady_points(runs)

    assert [run.duration_s for run in steady] == [250.0, 260.0]
    assert [run.point.duration_s for run in unsteady] == [10.0, 11.0]
