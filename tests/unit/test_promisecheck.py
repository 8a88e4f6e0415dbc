"""What `penstock check` says of a promise before any knee is found."""

from __future__ import annotations

import pytest

from ratelimit.config import SloConfig
from ratelimit.promisecheck import hopeless_slo
from serving.profile import load_profile

LINEAR, SURFACE = "h100-llama-3.1-8b", "h200-glm-4.6"


def least_factor(name: str) -> float:
    """By what the shortest step on a profile's surface differs from the linear model's."""
    surface = load_profile(name).surface
    return min(point.factor for point in surface.points) if surface else 1.0


@pytest.mark.parametrize("name", [LINEAR, SURFACE])
def test_a_bound_is_hopeless_only_below_the_shortest_empty_step(name: str) -> None:
    """On a surface steps are shorter in places than the linear model says, and a bound between the two may be met."""
    profile = load_profile(name)
    least_ms = profile.step_time.base_s * least_factor(name) * 1000
    above, below = (
        list(hopeless_slo(("pools", 0), profile, SloConfig(ttft_ms=10_000, tpot_ms=least_ms * part)))
        for part in (1.01, 0.99)
    )
    assert above == []
    assert [finding.where for finding in below] == [("pools", 0, "slo", "tpot_ms")]


def test_the_surface_that_is_checked_has_shorter_steps() -> None:
    """Else the test above would show nothing of surfaces."""
    assert least_factor(SURFACE) < 0.99
