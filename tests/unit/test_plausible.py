from __future__ import annotations

from math import nan
from typing import Any

import pytest
from msgspec.structs import replace

from serving.plausible import contradictions, unchecked
from serving.points import MeasuredPoint
from serving.profile import Fit, Profile, load_profile, shipped_profiles

H100 = load_profile("h100-llama-3.1-8b")
POINT = MeasuredPoint(
    mix="chat",
    requests=1000,
    duration_s=100.0,
    input_tokens=1_000_000,
    output_tokens=200_000,
    concurrency=64,
    ttft_mean_s=0.2,
    ttft_p50_s=0.15,
    ttft_p95_s=0.5,
    tpot_mean_s=0.02,
    tpot_p50_s=0.02,
    tpot_p95_s=0.04,
)


def with_point(**changes: Any) -> Profile:
    return replace(H100, fit=Fit((replace(POINT, **changes),), residual_median=0.05, residual_max=0.1))


@pytest.mark.parametrize("name", shipped_profiles())
def test_no_shipped_profile_contradicts_anything(name: str) -> None:
    """What comes with Penstock passes its own checks."""
    assert contradictions(load_profile(name)) == ()


def test_a_sound_point_passes() -> None:
    """The point that the other tests break is fine as it is."""
    assert contradictions(with_point()) == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tpot_p50_s": 0.0005, "tpot_mean_s": None}, "below the 3.7 ms of an empty step"),
        ({"tpot_mean_s": 20.0, "tpot_p50_s": None, "tpot_p95_s": None}, "longer than the run of 100 s"),
        ({"ttft_p50_s": 0.6}, "are they exchanged"),
        ({"tpot_mean_s": nan}, "must be zero or a positive number"),
        ({"duration_s": -1.0}, "must be zero or a positive number"),
        ({"output_tokens": 500}, "each has at least one of both"),
        ({"cached_tokens": 2_000_000}, "cached ones are among them"),
        ({"input_tokens": 200_000_000}, "above limits.max_model_len"),
        ({"duration_s": 0.1, "concurrency": None}, "the number of GPUs right, and were prompts cached"),
    ],
)
def test_a_point_that_cannot_be_is_named_with_its_mend(changes: dict[str, Any], told: str) -> None:
    """Each contradiction of a point is found, and the message says which point and what to look at."""
    problems = contradictions(with_point(**changes))

    assert any(told in problem for problem in problems), problems
    assert all("'chat' at " in problem for problem in problems)


@pytest.mark.parametrize("factor", [1e3, 1e-3, 1e6, 1e-6])
@pytest.mark.parametrize("field", ["base_s", "prompt_token_s", "kv_token_s"])
def test_a_coefficient_in_another_unit_is_found(field: str, factor: float) -> None:
    """A factor of a thousand either way is no engine: it is a unit."""
    value_s = getattr(H100.step_time, field) * factor
    profile = replace(H100, step_time=replace(H100.step_time, **{field: value_s}))

    (problem,) = contradictions(profile)

    assert f"step_time.{field}" in problem
    assert "in seconds" in problem


@pytest.mark.parametrize("field", ["prompt_token_s", "sequence_s", "kv_token_s"])
def test_a_coefficient_of_zero_is_what_a_fit_says_of_the_unknown(field: str) -> None:
    """Non-negative least squares gives zero to what it cannot tell apart; that is no wrong unit."""
    assert contradictions(replace(H100, step_time=replace(H100.step_time, **{field: 0.0}))) == ()


def test_more_kv_tokens_than_memory_are_refused() -> None:
    """Blocks taken for tokens, or eight GPUs' cache for one's, do not fit; the message says how many do."""
    profile = replace(H100, limits=replace(H100.limits, kv_tokens=16 * H100.limits.kv_tokens))

    (problem,) = contradictions(profile)

    assert "limits.kv_tokens is 14641104" in problem
    assert "1 × H100 have 80 GB" in problem
    assert "at most 1" in problem


def test_one_gpus_rates_for_a_replica_of_eight_are_found_by_memory() -> None:
    """A replica whose GPUs are miscounted holds a cache that its GPUs cannot."""
    h100_70b = load_profile("h100-llama-3.1-70b")

    assert contradictions(replace(h100_70b, gpus_per_replica=1))


def test_without_facts_only_the_profiles_own_numbers_are_compared() -> None:
    """A GPU that nobody knows contradicts no data sheet, and the gap is said."""
    own = replace(with_point(tpot_p50_s=0.0005, tpot_mean_s=None), gpu="TPU")

    assert unchecked(own) == "no facts of GPU TPU to compare with"
    assert len(contradictions(own)) == 1
    assert unchecked(H100) is None
