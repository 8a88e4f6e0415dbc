"""When a gateway is to be sent requests: the rule for every state that it can be in."""

from __future__ import annotations

from itertools import product

import pytest

from ratelimit.gateway.readiness import readiness

STATES = ("draining", "could_serve", "has_limits", "redis_is_away", "is_unreadable")


@pytest.mark.parametrize("values", list(product((False, True), repeat=5)))
def test_only_draining_takes_readiness_away(values: tuple[bool, ...]) -> None:
    """Ready means: it could serve once and does not drain; Redis and what is in force now do not matter."""
    state = dict(zip(STATES, values, strict=True))
    answer = readiness(**state)
    assert answer.ready == (state["could_serve"] and not state["draining"])
    assert bool(answer.why) != answer.ready


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"draining": True, "could_serve": True}, "draining"),
        ({"has_limits": True}, "no pool has had a replica"),
        ({"redis_is_away": True}, "Redis has not answered"),
        ({"redis_is_away": True, "has_limits": True}, "no pool has had a replica"),
        ({"is_unreadable": True}, "cannot read them"),
        ({"is_unreadable": True, "redis_is_away": True}, "cannot read them"),
        ({}, "No limits have been published"),
    ],
)
def test_the_reason_says_what_is_missing(state: dict[str, bool], told: str) -> None:
    """Whoever asks why a pod is not ready learns the first thing that keeps it so."""
    assert told in readiness(**{name: state.get(name, False) for name in STATES}).why
