from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.search import Bracket, SearchPlan, Tried, bracket, check_plan, contradictions, is_closed, next_rate


def searched(plan: SearchPlan, knee: float, known: list[Tried] | None = None) -> list[Tried]:
    """All that a search tries of an engine with this knee."""
    tried = list(known or [])
    while (rate := next_rate(plan, tried)) is not None:
        tried.append(Tried(rate, rate <= knee))
    return tried


@given(st.floats(0.01, 1000), st.floats(0.01, 1000), st.floats(0.01, 0.5))
def test_a_search_with_enough_points_closes_around_the_knee(start: float, knee: float, tolerance: float) -> None:
    """Wherever it starts, the knee ends up in a bracket as narrow as asked."""
    plan = SearchPlan(start, tolerance, most_points=60)
    found = bracket(searched(plan, knee))

    assert found.met is not None
    assert found.missed is not None
    assert found.met <= knee < found.missed
    assert is_closed(plan, found)


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 9))
def test_a_search_never_exceeds_its_points(verdicts: list[bool], most: int) -> None:
    """Whatever the verdicts, contradictory ones included."""
    plan = SearchPlan(1.0, 0.01, most)
    tried: list[Tried] = []
    for met in verdicts:
        rate = next_rate(plan, tried)
        if rate is None:
            break
        assert rate > 0
        tried.append(Tried(rate, met))
    assert len(tried) <= most


@given(st.floats(0.1, 100), st.integers(0, 12))
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(knee: float, done: int) -> None:
    """From any prefix of its points it asks for the same rates."""
    plan = SearchPlan(1.0, 0.05, most_points=12)
    whole = searched(plan, knee)

    assert searched(plan, knee, whole[:done]) == whole


def test_it_doubles_then_bisects() -> None:
    """The order of the rates, for a knee at 11."""
    assert [one.requests_per_s for one in searched(SearchPlan(2.0, 0.1, 9), 11)] == [2, 4, 8, 16, 12, 10, 11]


def test_it_halves_where_the_start_is_too_high() -> None:
    """Until a rate is met."""
    assert [one.requests_per_s for one in searched(SearchPlan(8.0, 0.3, 9), 3)] == [8, 4, 2, 3]


def test_a_rate_met_above_a_missed_one_counts_for_nothing() -> None:
    """The knee stays below the lowest miss, and the contradiction is named."""
    tried = [Tried(1, True), Tried(2, False), Tried(3, True)]

    assert bracket(tried) == Bracket(1, 2)
    assert contradictions(tried) == (3,)


@pytest.mark.parametrize("plan", [SearchPlan(0), SearchPlan(float("nan")), SearchPlan(1, 0), SearchPlan(1, 0.1, 0)])
def test_a_plan_that_finds_nothing_is_refused(plan: SearchPlan) -> None:
    """Rather than searched for ever."""
    with pytest.raises(ValueError, match=r"needs|must"):
        check_plan(plan)
