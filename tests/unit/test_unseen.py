from __future__ import annotations

from math import exp, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from serving.capacity import StepTimeModel
from serving.equations import UNKNOWN_BATCH, is_open_loop
from serving.laws import Law
from serving.points import MeasuredPoint
from serving.surface import surface_of
from serving.unseen import open_loop_step_s, unseen_error

MODEL = StepTimeModel(base_s=4e-3, prompt_token_s=2e-5, sequence_s=2.5e-5, kv_token_s=3e-8)
INPUTS, OUTPUTS, REQUESTS = 1000, 200, 1000
WORK_S = 2e-5 * INPUTS + 2.5e-5 * OUTPUTS + 3e-8 * OUTPUTS * (INPUTS + OUTPUTS / 2)


def run(
    duration_s: float, step_s: float, concurrency: float | None = None, offered_per_s: float | None = None
) -> MeasuredPoint:
    """A steady run as its clients saw it."""
    return MeasuredPoint(
        mix="chat",
        requests=REQUESTS,
        duration_s=duration_s,
        input_tokens=REQUESTS * INPUTS,
        output_tokens=REQUESTS * OUTPUTS,
        ttft_mean_s=step_s,
        tpot_mean_s=step_s,
        itl_mean_s=step_s,
        concurrency=concurrency,
        offered_per_s=offered_per_s,
    )


def closed(in_flight: int, seen: float = 1.0) -> MeasuredPoint:
    """A closed loop of the model, with latencies that were seen so many times as long."""
    duration_s = MODEL.base_s * REQUESTS * OUTPUTS / in_flight + WORK_S * REQUESTS
    step_s = duration_s * in_flight / (REQUESTS * OUTPUTS)
    return run(duration_s, seen * step_s, concurrency=in_flight)


def open_loop(per_s: float) -> MeasuredPoint:
    """An open loop of the model at that rate, its step found by iteration."""
    step_s = MODEL.base_s
    for _ in range(2000):
        busy = 1 - exp(-per_s * OUTPUTS * step_s)
        step_s = 0.9 * step_s + 0.1 * (MODEL.base_s + per_s / busy * WORK_S * step_s)
    return run(REQUESTS / per_s, step_s, offered_per_s=per_s)


@pytest.mark.parametrize("in_flight", [1, 8, 64])
def test_a_closed_loop_is_predicted_from_its_number_in_flight(in_flight: int) -> None:
    """An exact law predicts it, whatever its own latencies say, for they are not asked."""
    assert unseen_error(Law(MODEL), closed(in_flight), UNKNOWN_BATCH) == pytest.approx(0, abs=1e-9)
    slow_seen = closed(in_flight, seen=1.5)
    assert unseen_error(Law(MODEL), slow_seen, UNKNOWN_BATCH) == pytest.approx(0, abs=1e-9)


def test_steps_that_were_counted_are_not_asked_either() -> None:
    """Twice the steps in the same time would be another server; the prediction, made before, stays."""
    counted = replace(closed(8), steps=2.0 * REQUESTS * OUTPUTS / 8)

    assert unseen_error(Law(MODEL), counted, UNKNOWN_BATCH) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("per_s", [0.05, 1.0, 10.0, 25.0])
def test_an_open_loop_is_predicted_from_its_rate(per_s: float) -> None:
    """From nearly idle to nearly saturated: an exact law gives the mean step of the busy seconds."""
    point = open_loop(per_s)

    assert is_open_loop(point)
    assert open_loop_step_s(Law(MODEL), point) == pytest.approx(point.itl_mean_s, rel=1e-3)
    assert unseen_error(Law(MODEL), point, UNKNOWN_BATCH) == pytest.approx(0, abs=1e-3)


@given(st.floats(0.3, 3))
def test_the_error_of_an_open_loop_is_one_of_its_step_time(factor: float) -> None:
    """Where clients saw steps so many times longer, the law is too fast by that factor, at the same token rate."""
    point = open_loop(5.0)
    assert point.itl_mean_s is not None
    seen_s = factor * point.itl_mean_s
    other = replace(point, ttft_mean_s=seen_s, tpot_mean_s=seen_s, itl_mean_s=seen_s)

    assert unseen_error(Law(MODEL), other, UNKNOWN_BATCH) == pytest.approx(factor - 1, abs=2e-3)


def test_near_saturation_the_step_is_the_empty_one_over_what_is_free() -> None:
    """With always something in flight, T = c0/(1 − λw)."""
    per_s = 0.9 / WORK_S

    expected = MODEL.base_s / (1 - per_s * WORK_S)
    assert open_loop_step_s(Law(MODEL), run(REQUESTS / per_s, expected, offered_per_s=per_s)) == pytest.approx(expected)


def test_a_rate_that_the_law_cannot_bear_is_missed_in_full() -> None:
    """It was steady, and the law says that it saturates: steps without end, a rate of nothing."""
    point = replace(open_loop(5.0), offered_per_s=2 / WORK_S)

    assert open_loop_step_s(Law(MODEL), point) == inf
    assert unseen_error(Law(MODEL), point, UNKNOWN_BATCH) == -1


def test_a_surface_slows_the_step_of_an_open_loop_too() -> None:
    """A factor everywhere is the same as a slower model."""
    law = Law(MODEL, surface_of([(1e3, 1000, 1.5), (1e5, 1000, 1.5)]))

    assert open_loop_step_s(law, open_loop(5.0)) == pytest.approx(
        open_loop_step_s(Law(MODEL.slowed(1.5)), open_loop(5.0))
    )
