"""Refusals repeated from memory: only the same moment, only as long as it is worth anything."""

from __future__ import annotations

import pytest

from ratelimit.gateway.denials import LONGEST_US, Denials
from ratelimit.meter import Charge, Denied

CALLER = ("k1", "m", ("10.0.0.1", 5000))
NOW_US = 5_000_000


def charges(tokens: int) -> tuple[Charge, ...]:
    """One request and so many tokens."""
    return Charge("k:k1:requests", 1, 10, 10), Charge("k:k1:output_tokens", tokens, 100, 100)


def denied(wait_us: int | None = 60_000) -> Denied:
    """A refusal with two readings."""
    return Denied("k:k1:output_tokens", wait_us, (9, 0), (100, 90_000))


@pytest.fixture
def denials() -> Denials:
    """One refusal of 50 tokens under epoch 7."""
    known = Denials()
    known.note(CALLER, denied(), charges(50), 7, NOW_US)
    return known


def test_the_moment_told_stays_the_same(denials: Denials) -> None:
    """Later asked, less to wait."""
    assert denials.find(CALLER, charges(50), 7, NOW_US + 10_000) == Denied(
        "k:k1:output_tokens", 50_000, (9, 0), (0, 80_000)
    )


def test_it_ends_at_the_moment_told(denials: Denials) -> None:
    """Whoever comes back as told asks the store."""
    assert denials.find(CALLER, charges(50), 7, NOW_US + 59_999) is not None
    assert denials.find(CALLER, charges(50), 7, NOW_US + 60_000) is None


@pytest.mark.parametrize("wait_us", [None, 3_000_000])
def test_it_ends_after_a_tenth_of_a_second(wait_us: int | None) -> None:
    """Refunds may have made room by then."""
    denials = Denials()
    denials.note(CALLER, denied(wait_us), charges(50), 7, NOW_US)
    assert denials.find(CALLER, charges(50), 7, NOW_US + LONGEST_US - 1) is not None
    assert denials.find(CALLER, charges(50), 7, NOW_US + LONGEST_US) is None


def test_a_new_epoch_clears_it(denials: Denials) -> None:
    """Under new limits the answer may be another."""
    assert denials.find(CALLER, charges(50), 8, NOW_US) is None


def test_a_smaller_request_may_fit(denials: Denials) -> None:
    """It asks the store; one of the same size or larger is refused."""
    assert denials.find(CALLER, charges(49), 7, NOW_US) is None
    assert denials.find(CALLER, charges(51), 7, NOW_US) is not None


def test_others_are_not_refused_by_it(denials: Denials) -> None:
    """Another key, another model and another connection of the same key ask the store."""
    for caller in (("k2", *CALLER[1:]), ("k1", "other", CALLER[2]), ("k1", "m", ("10.0.0.1", 5001))):
        assert denials.find(caller, charges(50), 7, NOW_US) is None


def test_only_so_many_are_remembered() -> None:
    """The oldest goes first."""
    denials = Denials(most_remembered=2)
    callers = [("k1", "m", ("10.0.0.1", port)) for port in range(3)]
    for caller in callers:
        denials.note(caller, denied(), charges(50), 7, NOW_US)
    assert [denials.find(caller, charges(50), 7, NOW_US) is not None for caller in callers] == [False, True, True]
