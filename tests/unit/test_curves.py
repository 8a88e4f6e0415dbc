from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from serving.capacity import InfeasibleSloError, RequestShape, Slo, StepTimeModel, WorkloadMix
from serving.comparison import compare, curve_of
from serving.curves import Throughput, throughput_curve, throughput_of
from serving.gpus import GPUS
from serving.mixes import load_mix
from serving.operating import extrapolation_note, mean_context_tokens, operating_point, step_time_around
from serving.profile import ContextRange, Fit, OutOfRangeError, load_profile
from serving.stepsim import knee
from serving.surface import Surface, SurfacePoint

pytestmark = pytest.mark.slow

H100, H200 = load_profile("h100-llama-3.1-8b"), load_profile("h200-llama-3.1-8b")
CHAT = load_mix("chat")
SLO = Slo(1.0, 0.05)
LONG = WorkloadMix("long", (RequestShape(16000, 100),))


def test_throughput_rises_with_tpot_along_a_curve() -> None:
    """A curve is read from left to right: more load, more tokens, slower tokens; and it ends at the TTFT bound."""
    curve = throughput_curve(H100.step_time, H100.limits, CHAT, SLO)

    rates = [point.rate.output_tokens_per_s for point in curve]
    times = [point.tpot_s for point in curve]
    assert rates == sorted(rates)
    assert times == sorted(times)
    assert times[0] > H100.step_time.base_s
    assert all(point.ttft_s <= SLO.ttft_s for point in curve)


def test_the_knee_lies_on_the_curve() -> None:
    """Where the curve crosses the TPOT bound is the knee, to the grid of the curve's loads."""
    curve = throughput_curve(H100.step_time, H100.limits, CHAT, SLO)
    found = knee(H100.step_time, H100.limits, CHAT, SLO)

    below = [point.rate.requests_per_s for point in curve if point.tpot_s <= SLO.tpot_s]
    above = [point.rate.requests_per_s for point in curve if point.tpot_s > SLO.tpot_s]
    assert max(below) * 0.99 <= found.requests_per_s <= min(above) * 1.01


@settings(max_examples=10, deadline=None)
@given(st.floats(2.0, 20.0))
def test_a_slower_device_has_the_same_curve_slower(factor: float) -> None:
    """Every time grows by the factor and every rate falls by it: units cancel."""
    shares = (0.3, 0.8)
    fast = throughput_curve(H100.step_time, H100.limits, LONG, SLO, shares, 500)
    slow = throughput_curve(H100.step_time.slowed(factor), H100.limits, LONG, SLO.slowed(factor), shares, 500)

    for quick, late in zip(fast, slow, strict=True):
        assert late.tpot_s == pytest.approx(quick.tpot_s * factor, rel=1e-6)
        assert late.rate.requests_per_s == pytest.approx(quick.rate.requests_per_s / factor, rel=1e-6)


def test_a_rate_is_tokens_of_the_mix() -> None:
    """Ten requests of 300 uncached + 50 tokens are 3,000 and 500; cached tokens are not counted."""
    mix = WorkloadMix("m", (RequestShape(400, 50, cached_tokens=100),))

    assert throughput_of(mix, 10.0) == Throughput(10.0, 3000.0, 500.0)
    assert throughput_of(mix, 10.0).over(4) == Throughput(2.5, 750.0, 125.0)
    assert mean_context_tokens(mix) == 425


def test_ratios_are_by_gpu_and_to_the_first() -> None:
    """Two GPUs that give twice as much are no better than one; power divides by the watts of all GPUs of a replica."""
    double = replace(H100, name="double", gpus_per_replica=2)

    first, same, halved, other = compare((H100, H100, double, H200), CHAT, SLO)

    assert (first.ratio, same.ratio, halved.ratio) == (1.0, 1.0, 0.5)
    assert other.ratio is not None
    assert other.ratio > 1
    assert first.per_replica is not None
    assert first.per_joule is not None
    watts = GPUS["H100"].power_w
    assert first.per_joule.output_tokens_per_s == first.per_replica.output_tokens_per_s / watts
    assert first.estimated


def test_a_gpu_without_a_rating_has_no_tokens_per_joule() -> None:
    """What is not known is left out, not guessed."""
    (row,) = compare((replace(H100, gpu="TPU"),), CHAT, SLO)

    assert row.per_joule is None
    assert row.per_gpu is not None


def test_an_infeasible_slo_is_a_row_that_says_so() -> None:
    """A bound that no load meets is named beside profiles that meet it; ratios to it are not made up."""
    slow = replace(H100, name="slow", step_time=H100.step_time.slowed(20))

    rows = compare((slow, H100), CHAT, SLO)

    assert rows[0].per_gpu is None
    assert rows[0].note.startswith("infeasible: ")
    assert rows[1].per_gpu is not None
    assert rows[1].ratio is None
    assert curve_of(slow, CHAT, Slo(0.001, 0.05)) == ()


def test_a_context_that_was_not_measured_is_refused_unless_asked_for() -> None:
    """Extrapolation happens on request only, and marks its row."""
    fit = Fit((), residual_median=0.0, residual_max=0.0, context=ContextRange(100, 2000))
    measured = replace(H100, fit=fit)

    assert compare((measured,), CHAT, SLO)[0].note == ""
    with pytest.raises(OutOfRangeError, match="long: extrapolated: a mean context of 16050 tokens is outside"):
        compare((measured,), LONG, SLO)
    assert compare((measured,), LONG, SLO, extrapolate=True)[0].note.startswith("extrapolated: ")


def test_a_surface_moves_the_knee() -> None:
    """Steps that last twice as long as the line says around this load give fewer requests."""
    factor_two = Surface((SurfacePoint(1e4, 1000.0, 2.0),))
    bent = replace(H100, surface=factor_two)

    step_time = step_time_around(bent, CHAT, SLO)
    line, curved = compare((H100, bent), CHAT, SLO)

    assert step_time == H100.step_time.slowed(2.0)
    assert operating_point(bent, CHAT, SLO).step_time == step_time
    assert extrapolation_note(bent, CHAT) == ""
    assert line.per_gpu is not None
    assert curved.per_gpu is not None
    assert curved.per_gpu.requests_per_s < 0.7 * line.per_gpu.requests_per_s


def test_a_surface_under_an_infeasible_slo_is_infeasible() -> None:
    """A bound that neither the line nor the surface meets, not even for a request alone, is met by no load."""
    bent = replace(H100, surface=Surface((SurfacePoint(1e4, 1000.0, 2.0),)))

    with pytest.raises(InfeasibleSloError):
        step_time_around(bent, CHAT, Slo(1.0, 0.001))


def test_a_surface_may_meet_what_the_line_does_not() -> None:
    """Where steps are measured to be shorter than the line says, its missing the SLO decides nothing."""
    tight = Slo(1.0, H100.step_time.base_s * 0.9)
    bent = replace(H100, surface=Surface((SurfacePoint(1e4, 1000.0, 0.5),)))

    with pytest.raises(InfeasibleSloError):
        operating_point(H100, CHAT, tight)
    found = operating_point(bent, CHAT, tight)
    assert found.step_time == H100.step_time.slowed(0.5)
    assert found.knee.tpot_s <= tight.tpot_s


@pytest.mark.parametrize(("idle", "busy"), [(1.0, 6.0), (2.5, 0.8), (0.6, 6.0)])
def test_the_model_is_the_one_at_its_own_knee(idle: float, busy: float) -> None:
    """However steps change with the KV use, they are those of the use at the knee that is found, not of the line's."""
    context = mean_context_tokens(CHAT)
    bent = replace(H100, surface=Surface((SurfacePoint(context, context, idle), SurfacePoint(3e5, context, busy))))

    found = operating_point(bent, CHAT, SLO)

    in_flight = found.knee.requests_per_s * CHAT.mean_output_tokens * found.knee.tpot_s
    there = bent.extrapolated_step_time(max(1.0, in_flight) * context, context)[0]
    assert found.step_time.base_s == pytest.approx(there.base_s, rel=0.08)


def test_a_request_that_cannot_run_has_no_curve() -> None:
    """A prompt beyond the context is an error of the caller, and a picture leaves its curve out."""
    beyond = WorkloadMix("beyond", (RequestShape(1_000_000, 10),))

    with pytest.raises(ValueError, match="exceeds"):
        throughput_curve(StepTimeModel(1e-3, 1e-5, 1e-5, 1e-8), H100.limits, beyond, SLO)
    assert curve_of(H100, beyond, SLO) == ()
