"""The offered load: seeded, open-loop, in proportion to limits."""

from __future__ import annotations

import pytest

from loadtests.schedule import (
    KeyLoad,
    Schedule,
    Window,
    allowed_requests_per_s,
    build_schedule,
    offered_loads,
    scaled,
    shortened,
)
from ratelimit.publication import Limit, Publication, TierLimits
from serving.capacity import RequestShape

SHAPES = (RequestShape(100, 10), RequestShape(300, 30))
WINDOW = Window(10, 60)


def rate_limits(requests: int, inputs: int, outputs: int) -> tuple[Limit, ...]:
    """A key's limits, per minute."""
    return (
        Limit("requests", requests, 1, ""),
        Limit("input_tokens", inputs, 1, ""),
        Limit("output_tokens", outputs, 1, ""),
        Limit("concurrency", 0, 3, ""),
    )


def schedule(seed: int = 1, rate: float = 4.0) -> Schedule:
    """Two keys, one offering twice as much as the other."""
    loads = (KeyLoad("a", "pro", rate), KeyLoad("b", "free", rate / 2))
    return build_schedule(loads, SHAPES, WINDOW, seed)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (rate_limits(60, 60_000, 60_000), 1.0),
        (rate_limits(600, 24_000, 60_000), 2.0),
        (rate_limits(600, 60_000, 3_600), 3.0),
    ],
)
def test_allowance_is_that_of_the_tightest_limit(limits: tuple[Limit, ...], expected: float) -> None:
    """The first limit to bind at the mean shape (200 input, 20 output) sets the rate; concurrency has none."""
    assert allowed_requests_per_s(limits, SHAPES) == pytest.approx(expected)


def test_a_key_without_rates_has_no_allowance() -> None:
    """Without rate limits nothing can be offered in proportion to them, and the error says so."""
    with pytest.raises(ValueError, match="no rate limits"):
        allowed_requests_per_s((Limit("concurrency", 0, 3, ""),), SHAPES)


def test_keys_are_offered_in_proportion_to_their_limits() -> None:
    """A tier with twice the limits offers twice the load, each the same multiple of its own allowance."""
    tiers = (
        TierLimits("pro", "m", 1, rate_limits(120, 10**6, 10**6)),
        TierLimits("free", "m", 1, rate_limits(60, 10**6, 10**6)),
    )
    publication = Publication(1, "", "", enforce=True, pools=(), tiers=tiers)

    loads = offered_loads({"a": "pro", "b": "free"}, publication, "m", SHAPES, 3.2)

    assert [load.key for load in loads] == ["a", "b"]
    assert [load.requests_per_s for load in loads] == pytest.approx([6.4, 3.2])


def test_same_seed_same_load() -> None:
    """The load is a function of its seed: equal for one, different for another."""
    assert schedule(seed=1) == schedule(seed=1)
    assert schedule(seed=1).requests != schedule(seed=2).requests


def test_arrivals_are_poisson_at_the_rates_asked_for() -> None:
    """Over 60 s each key sends its rate within five standard deviations, in order of time, indexed in that order."""
    requests = schedule(rate=40.0).requests

    for key, expected in (("a", 2400), ("b", 1200)):
        assert abs(sum(r.key == key for r in requests) - expected) < 5 * expected**0.5
    assert [r.time_s for r in requests] == sorted(r.time_s for r in requests)
    assert [r.index for r in requests] == list(range(len(requests)))
    assert {(r.input_tokens, r.output_tokens) for r in requests} == {(100, 10), (300, 30)}


def test_a_key_does_not_disturb_the_others() -> None:
    """Each key draws from its own random numbers, so the same key sends the same whoever else does."""
    alone = build_schedule((KeyLoad("a", "pro", 4.0),), SHAPES, WINDOW, 1).requests
    among = [r for r in schedule().requests if r.key == "a"]

    assert [(r.time_s, r.tokens) for r in alone] == [(r.time_s, r.tokens) for r in among]


def test_warm_up_is_not_measured() -> None:
    """Measured requests are those inside the window, its start included and its end not."""
    measured = schedule().measured

    assert measured
    assert all(10 <= r.time_s < 60 for r in measured)
    assert WINDOW.holds(10)
    assert not WINDOW.holds(60)


def test_short_prompts_are_lifted_to_what_a_template_takes() -> None:
    """No request is planned shorter than the chat template with one word; longer ones stay as they are."""
    requests = build_schedule((KeyLoad("a", "pro", 4.0),), SHAPES, WINDOW, 1, least_input_tokens=150).requests

    assert {(r.input_tokens, r.output_tokens) for r in requests} == {(150, 10), (300, 30)}


def test_doubling_keeps_the_callers() -> None:
    """A scaled load has the same keys and tiers at twice the rate."""
    assert scaled((KeyLoad("a", "pro", 1.5),), 2) == (KeyLoad("a", "pro", 3.0),)


def test_a_shortened_load_is_the_beginning_of_the_same() -> None:
    """Cutting a load short changes none of the requests before the cut."""
    whole = schedule()
    short = shortened(whole, Window(10, 30))

    assert short.requests == tuple(r for r in whole.requests if r.time_s < 30)
    assert short.window.length_s == 20
