from __future__ import annotations

from bisect import bisect
from random import Random

import pytest
from scipy.stats import t as scipy_t

from serving.capacity import EngineLimits, StepTimeModel, WorkloadMix
from serving.intervals import interval, mean_interval, percentile_of
from serving.mixes import load_mix
from serving.stepsim import Outcome, poisson_arrivals, simulate
from serving.trend import Sample, drift, is_over_saturated, is_rising, start_up_s, student_t, trend

MODEL = StepTimeModel(0.01, 2e-5, 2e-4, 1e-7)
LIMITS = EngineLimits(32, 2048, 65536, 4096)


def mix() -> WorkloadMix:
    """Chat, an eighth as long."""
    return load_mix("chat", 0.125)


def in_flight(outcomes: list[Outcome], until_s: float, every_s: float) -> list[Sample]:
    """Requests in flight, as a client samples them."""
    times = [every_s * k for k in range(1, int(until_s / every_s))]
    arrived, finished = (
        sorted(moments) for moments in zip(*((o.arrival_s, o.finish_s) for o in outcomes), strict=True)
    )
    return [Sample(t, bisect(arrived, t) - bisect(finished, t)) for t in times]


def ttft(outcomes: list[Outcome], until_s: float) -> list[Sample]:
    """First tokens as they come."""
    return sorted(Sample(o.first_token_s, o.ttft_s) for o in outcomes if o.first_token_s < until_s)


def run(requests_per_s: float, seed: int) -> list[Outcome]:
    """A minute of Poisson arrivals on a simulated replica."""
    return simulate(MODEL, LIMITS, poisson_arrivals(mix(), requests_per_s, 60.0, seed))


def test_loads_below_the_knee_are_seldom_called_over_saturated() -> None:
    """Of twenty runs at half of the knee, none is over-saturated and at most two seem to drift."""
    runs = [run(20, seed) for seed in range(20)]
    samples = [[s for s in in_flight(outcomes, 60, 0.25) if s.time_s > 5] for outcomes in runs]

    assert not any(is_over_saturated(s, ttft(o, 60)) for s, o in zip(samples, runs, strict=True))
    assert sum(bool(drift(s)) for s in samples) <= 2


def test_overload_is_seen_within_half_a_minute() -> None:
    """At twice what it can serve, every run is called over-saturated from its first 30 s."""
    for seed in range(5):
        outcomes = run(160, seed)
        assert is_over_saturated(in_flight(outcomes, 30, 0.25), ttft(outcomes, 30))


def test_one_rising_quantity_is_no_over_saturation() -> None:
    """Long answers that fill the batch raise concurrency alone."""
    rising = [Sample(k, k + 1) for k in range(50)]
    flat = [Sample(k, 1 + k % 2) for k in range(50)]

    assert is_rising(rising)
    assert not is_rising(flat)
    assert not is_over_saturated(rising, flat)
    assert not is_over_saturated(flat, rising)


def test_a_drift_says_which_way() -> None:
    """And too few samples say that they are too few."""
    assert "fell" in drift([Sample(k, 100 - k) for k in range(50)])
    assert "too few" in drift([Sample(0, 1)])
    assert trend([Sample(0, 1)]) is None


def test_the_start_up_is_cut_off() -> None:
    """MSER finds the end of a ramp, and cuts nothing from a level run but at most half."""
    rng = Random(1)
    ramp = [Sample(k, min(k, 60) + rng.gauss(0, 1)) for k in range(400)]

    assert 45 <= start_up_s(ramp) <= 120
    assert start_up_s([Sample(k, k) for k in range(100)]) <= 55
    with pytest.raises(ValueError, match="no samples"):
        start_up_s([])


@pytest.mark.parametrize("degrees", [4, 10, 30, 1000])
@pytest.mark.parametrize("probability", [0.9, 0.95, 0.99])
def test_students_quantile(probability: float, degrees: float) -> None:
    """Within 1 % of SciPy's."""
    assert student_t(probability, degrees) == pytest.approx(scipy_t.ppf((1 + probability) / 2, degrees), rel=0.01)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of 100 samples with a known 95th percentile and a known mean, few intervals miss it."""
    rng = Random(3)
    samples = [[rng.expovariate(1.0) for _ in range(300)] for _ in range(100)]
    percentiles = [interval(s, lambda values: percentile_of(values, 95), seed=1) for s in samples]
    means = [mean_interval(s[:20]) for s in samples]

    assert sum(not (i.low or 0) <= 2.9957 <= (i.high or 0) for i in percentiles) <= 15
    assert sum(not (i.low or 0) <= 1.0 <= (i.high or 0) for i in means) <= 15
    assert interval(samples[0], lambda values: percentile_of(values, 95), seed=1) == percentiles[0]


def test_too_few_values_have_no_interval() -> None:
    """A figure stands alone then."""
    assert interval([1.0, 2.0], lambda values: percentile_of(values, 50), seed=0).low is None
    assert mean_interval([1.0, 2.0]).low is None
    with pytest.raises(ValueError, match="no slices"):
        mean_interval([])
