from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.capacity import StepTimeModel
from serving.surface import Surface, surface_of

places = st.lists(
    st.tuples(st.floats(1, 1e7), st.floats(1, 1e5), st.floats(0.2, 5)),
    min_size=1,
    max_size=12,
    unique_by=lambda place: (round(place[0], 1), round(place[1], 1)),
)
somewhere = st.tuples(st.floats(1, 1e7), st.floats(1, 1e5))


@given(places, somewhere)
def test_a_factor_lies_between_those_measured(
    measured: list[tuple[float, float, float]], at: tuple[float, float]
) -> None:
    """Nowhere, within the range or beyond it, does interpolation invent a factor outside the measured ones."""
    factors = [factor for _, _, factor in measured]
    found = surface_of(measured).factor_at(*at)

    assert min(factors) * (1 - 1e-9) <= found <= max(factors) * (1 + 1e-9)


def test_a_measured_place_gives_its_own_factor_back() -> None:
    """The surface goes through every measured place."""
    measured = [(100.0, 10.0, 1.1), (1e5, 500.0, 0.9), (1e6, 4000.0, 1.6)]

    for kv_tokens, context, factor in measured:
        assert surface_of(measured).factor_at(kv_tokens, context) == pytest.approx(factor)


def test_a_place_measured_twice_has_the_mean_factor() -> None:
    """Two runs at one place are one place, between them."""
    surface = surface_of([(1e4, 100, 1.0), (1e4, 100, 1.4)])

    assert len(surface.points) == 1
    assert surface.factor_at(1e4, 100) == pytest.approx(1.2)


def test_nearer_places_weigh_more() -> None:
    """A place close to a measured one is close to its factor."""
    surface = surface_of([(1e3, 100, 1.0), (1e6, 10_000, 2.0)])

    assert surface.factor_at(1.2e3, 110) < 1.05
    assert surface.factor_at(0.9e6, 9_000) > 1.95


def test_only_a_place_nearer_than_a_millionth_is_the_same() -> None:
    """Half a thousandth away the factor is still interpolated, however little that changes it."""
    surface = surface_of([(1e4, 1000, 1.0), (1.001e4, 1000, 2.0)])

    assert 1.0 < surface.factor_at(1.0001e4, 1000) < 1.1
    assert surface.factor_at(1e4 * (1 + 1e-8), 1000) == 1.0


def test_attention_lengthens_prompts_with_their_context() -> None:
    """A prompt token attends to half of its context on average, and then the whole step is scaled by the factor."""
    model = StepTimeModel(1e-3, 1e-5, 1e-6, 1e-9)
    there = surface_of([(1e4, 1000, 2.0)], prompt_context_s=1e-8).step_time_at(model, 1e4, 1000)

    assert there.prompt_token_s == pytest.approx(2 * (1e-5 + 1e-8 * 500))
    assert there.base_s == pytest.approx(2e-3)
    assert there.kv_token_s == pytest.approx(2e-9)


@pytest.mark.parametrize("measured", [[], [(0.0, 100.0, 1.0)], [(1e3, 100.0, -1.0)]])
def test_a_surface_of_nothing_is_refused(measured: list[tuple[float, float, float]]) -> None:
    """No place, an empty batch or a negative time is no surface."""
    with pytest.raises(ValueError, match="above 0"):
        surface_of(measured)


def test_a_surface_without_places_changes_no_factor() -> None:
    """Attention alone may be carried, before there are factors."""
    model = StepTimeModel(1e-3, 1e-5, 1e-6, 1e-9)

    assert Surface((), 1e-8).attentive(model, 2000).prompt_token_s == pytest.approx(2e-5)
