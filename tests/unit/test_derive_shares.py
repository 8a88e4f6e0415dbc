"""How minima and shares divide a pool: never more than the whole, and as much of it as they may."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from ratelimit.shares import Claim, Levels, levels_of

parts = st.fractions(0, 1, max_denominator=50)
claims = st.lists(st.tuples(st.fractions(Fraction(1, 50), 1, max_denominator=50), parts), min_size=1, max_size=6).map(
    lambda drawn: [Claim(share / sum(s for s, _ in drawn), minimum / 2) for share, minimum in drawn]
)


def given_out(found: list[Claim]) -> list[Fraction]:
    """What each claim is given, as parts of the whole."""
    levels = levels_of(found)
    kept, level = Fraction(levels.minimum), Fraction(levels.share)
    return [max(claim.minimum * kept, claim.share * level) for claim in found]


@given(claims)
def test_the_whole_is_given_out_once(found: list[Claim]) -> None:
    """Shares of 1 and any minima come to the whole, but for the rounding of the printed level, and never to more."""
    total = sum(given_out(found))
    assert 1 - Fraction(1, 500) <= total <= 1


@given(claims)
def test_a_minimum_is_cut_only_where_the_minima_exceed_the_whole(found: list[Claim]) -> None:
    """Where they fit each is given in full; where not, all are cut alike."""
    fit = sum(claim.minimum for claim in found) <= 1
    assert (levels_of(found).minimum == 1) == fit
    assert not fit or all(part >= claim.minimum for part, claim in zip(given_out(found), found, strict=True))


@given(claims, st.fractions(1, 10, max_denominator=20))
def test_levels_only_rise_as_minima_weigh_less(found: list[Claim], growth: Fraction) -> None:
    """In a pool that has grown the same minima are a smaller part, and both levels at least what they were."""
    before = levels_of(found)
    after = levels_of([claim._replace(minimum=claim.minimum / growth) for claim in found])
    assert after.share >= before.share
    assert after.minimum >= before.minimum


def test_levels_by_hand() -> None:
    """A quarter kept for one minimum leaves three quarters for shares of 0.9; nothing asked leaves all."""
    asking, others = Claim(Fraction(1, 10), Fraction(1, 4)), Claim(Fraction(9, 10), Fraction(0))
    assert str(levels_of([asking, others]).share) == "0.8333"
    assert levels_of([others._replace(share=Fraction(1, 2))]) == levels_of([]) == Levels(Decimal(1), Decimal(1))
