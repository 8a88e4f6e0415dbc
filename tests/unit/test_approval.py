"""A change that lowers a limit too far waits; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.approval import Approval, ApprovalError, Change, Waiting, decide, digest_of, still_valid, waiting_named
from ratelimit.difference import Difference, bound_changed
from ratelimit.publication import Limit, Publication, PublishedPool, TierLimits

Shares = tuple[float, ...]
NOTHING: Shares = ()
factors = st.lists(st.floats(0.01, 3), max_size=5)


def derived(shares: Shares) -> Publication:
    """One tier whose limit is the product of all that is decided, of a fleet that serves 10¹⁵ a minute."""
    amount = 1e15
    for share in shares:
        amount *= share
    pool = PublishedPool("m", (), (), 1, 1, 1, 1, 1, 1, 1, 1, "")
    return Publication(1, "", "", True, (pool,), (TierLimits("t", "m", 1, (Limit("requests", round(amount), 1, ""),)),))


def times(factor: float) -> Change[Shares]:
    apply: Callable[[Shares], Shares] = lambda shares: (*shares, factor)  # noqa: E731 - a value of a tuple's field
    return Change(f"× {factor}", digest_of("times", None, factor), apply)


def approving(change: Change[Shares], fall: float = 1.0) -> dict[str, Approval]:
    return {change.digest: Approval(change.digest, "root", 0, 10, fall)}


def amount(publication: Publication) -> int:
    return publication.tiers[0].limits[0].per_minute


def test_a_large_fall_waits_and_the_rest_takes_effect() -> None:
    """Each change is weighed alone: the others do not wait for the one that does."""
    decision = decide(NOTHING, [times(0.9), times(0.1), times(1.5)], derived, 0.5, {})

    assert decision.inputs == (0.9, 1.5)
    assert amount(decision.publication) == 1_350_000_000_000_000
    ((change, does),) = decision.held
    assert (change.cause, round(does.largest_fall, 3)) == ("× 0.1", 0.9)


def test_a_fall_by_just_the_allowed_share_does_not_wait() -> None:
    """Only what falls by more waits."""
    assert decide(NOTHING, [times(0.5)], derived, 0.5, {}).held == ()
    assert decide(NOTHING, [times(0.5), times(0.1)], derived, 0.5, {}).inputs == (0.5,)


def test_what_hides_a_fall_for_a_while_does_not_let_it_through() -> None:
    """A change is weighed as of now and as of later; the larger fall counts, and what is published is of now."""
    hiding = lambda shares: derived(()) if 1.0 in shares else derived(shares)  # noqa: E731 - like ``derived``
    ended: Callable[[Shares], Shares] = lambda shares: tuple(s for s in shares if s != 1.0)  # noqa: E731 - as above
    hidden: Shares = (1.0,)
    decision = decide(hidden, [times(0.1), times(0.9)], hiding, 0.5, {}, ended)

    assert decision.inputs == (1.0, 0.9)
    ((change, does),) = decision.held
    assert (change.cause, round(does.largest_fall, 3)) == ("× 0.1", 0.9)
    assert amount(decision.publication) == amount(derived(()))


def test_a_change_that_loosens_the_bound_waits_though_no_limit_falls() -> None:
    """What comes after it would fall unasked; beside it a harmless change takes effect."""
    loosens = times(1.0)._replace(settings=bound_changed(0.5, None))
    decision = decide(NOTHING, [times(0.9), loosens], derived, 0.5, {})

    assert decision.inputs == (0.9,)
    ((change, does),) = decision.held
    assert (change, does.largest_fall) == (loosens, 1.0)
    assert decide(NOTHING, [loosens], derived, 0.5, approving(loosens)).approved == (loosens.digest,)


@pytest.mark.parametrize(
    ("before", "after", "falls"),
    [(0.5, None, 1.0), (0.5, 0.9, 1.0), (0.5, 0.2, 0.0), (None, 0.5, 0.0)],
)
def test_only_a_bound_that_allows_more_is_a_fall(before: float | None, after: float | None, falls: float) -> None:
    """To ask more often takes nothing from anybody."""
    assert [setting.fall for setting in bound_changed(before, after)] == [falls]
    assert bound_changed(before, before) == ()


def test_an_approved_change_takes_effect_and_no_other() -> None:
    """An approval lets through the change with its digest."""
    wanted, other = times(0.1), times(0.2)
    decision = decide(NOTHING, [wanted, other], derived, 0.5, approving(wanted))

    assert decision.inputs == (0.1,)
    assert decision.approved == (wanted.digest,)
    assert [change for change, _ in decision.held] == [other]


def test_an_approval_that_was_not_needed_is_not_used_up() -> None:
    """A change that would not wait says nothing of who let it through."""
    assert decide(NOTHING, [times(0.9)], derived, 0.5, approving(times(0.9))).approved == ()


@given(factors, st.floats(0, 0.99))
def test_no_change_that_takes_effect_unapproved_falls_further_than_allowed(found: list[float], allowed: float) -> None:
    """Either all together lower the limit by no more than is allowed, or each that is taken up does."""
    decision = decide(NOTHING, [times(factor) for factor in found], derived, allowed, {})

    least = (1 - allowed) * (1 - 1e-9)
    assert prod(decision.inputs) >= least or all(factor >= least for factor in decision.inputs)
    assert len(decision.inputs) + len(decision.held) == len(found)


@given(factors)
def test_the_fleet_is_never_held(found: list[float]) -> None:
    """Whatever was lost is in the base, so that what is published has it, also while every change waits."""
    for loss in (1.0, 0.01):
        base: Shares = (loss,)
        decision = decide(base, [times(factor) for factor in found], derived, 0.0, {})
        assert decision.inputs[0] == loss
        assert amount(decision.publication) == amount(derived(decision.inputs))


@given(st.text(), st.text(), st.text())
def test_a_digest_is_of_what_was_decided_before_and_after(one: str, two: str, three: str) -> None:
    """The way back, or the same end from another beginning, is another change."""
    if len({one, two, three}) == 3:
        digests = {digest_of("config", a, b) for a, b in [(one, two), (two, one), (three, two), (one, three)]}
        assert len(digests) == 4


def test_a_digest_does_not_depend_on_the_order_of_names() -> None:
    """Two dicts that are equal are the same thing decided."""
    assert digest_of("c", {"a": 1, "b": 2}, None) == digest_of("c", {"b": 2, "a": 1}, None)


def test_an_approval_is_for_the_fall_that_was_shown() -> None:
    """A change that has come to take clearly more since, as the fleet around it changes, waits again."""
    change = times(0.42)

    assert decide(NOTHING, [change], derived, 0.5, approving(change, fall=0.55)).inputs == (0.42,)
    assert decide(NOTHING, [change], derived, 0.5, approving(change, fall=0.6)).held == ()
    steep = times(0.01)
    assert decide(NOTHING, [steep], derived, 0.5, approving(steep, fall=0.55)).inputs == ()


@given(st.floats(0, 1), st.floats(0, 1))
def test_an_approval_covers_what_leaves_nine_tenths_of_what_it_left(approved: float, fall: float) -> None:
    """Of a limit that was approved to keep little, little more may go, and a smaller fall is always covered."""
    approval = Approval("d", "root", 0, 10, approved)

    assert approval.covers(fall) == (1 - fall >= 0.9 * (1 - approved))
    assert fall > approved or approval.covers(fall)


def test_approvals_expire() -> None:
    """An approval counts before its end and not at it."""
    approval = Approval("d", "root", 0, 10)

    assert still_valid([approval], 9.9) == (approval,)
    assert still_valid([approval], 10) == ()


def waiting(digest: str) -> Waiting:
    return Waiting(digest, "the config changed", 0, 0.5, Difference())


def test_the_only_change_that_waits_is_the_one_meant() -> None:
    """Without a digest nothing is guessed: one waits, or the digest must be given."""
    one, two = waiting("aa"), waiting("bb")

    assert waiting_named([one], None) == one
    assert waiting_named([one, two], "bb") == two
    with pytest.raises(ApprovalError, match=r"several changes wait; say which: aa .*, bb"):
        waiting_named([one, two], None)
    with pytest.raises(ApprovalError, match=r"'cc' waits, or it has changed since; those that wait: aa"):
        waiting_named([one], "cc")
    with pytest.raises(ApprovalError, match="no change waits"):
        waiting_named([], None)
