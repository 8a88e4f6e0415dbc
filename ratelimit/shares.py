"""What each assured tier of a pool is given: its share, or its minimum where that is more. Pure.

Every tier is given max(its minimum, its share × level), with one ``level`` ≤ 1 at which they come to no more than the
whole. So minima are served first, the other tiers give way in proportion to their shares, and nothing is promised
twice. Where the minima alone exceed the whole, each keeps the same part of its own, and whoever has none gets nothing.
With more capacity the level only rises, so nobody's grant ever falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from ratelimit.explain import Factor, factor_down, number
from ratelimit.keylimits import Grant, carrier_sizes, lengths_of
from ratelimit.policy import PoolPolicy, TierPolicy, promise_of
from ratelimit.poolsupply import Supply

_WHOLE = Decimal(1)


class Claim(NamedTuple):
    """A tier's claim on a pool: its share and what its minima take, both as parts of what it could serve of it.

    ``said`` is how the requests/s of the minimum follow from it.
    """

    share: Fraction
    minimum: Fraction
    said: str = ""


class Levels(NamedTuple):
    """The part of every share, and of every minimum, that can be kept; both as printed, rounded down."""

    share: Decimal
    minimum: Decimal


def levels_of(claims: Sequence[Claim]) -> Levels:
    """The highest levels at which all that is given comes to no more than the whole."""
    minima = sum((claim.minimum for claim in claims), Fraction(0))
    if minima > 1:
        return Levels(Decimal(0), factor_down(1 / minima))
    pinned: set[int] = set()
    while True:
        free = [claim for i, claim in enumerate(claims) if i not in pinned]
        shares = sum((claim.share for claim in free), Fraction(0))
        left = 1 - sum((claims[i].minimum for i in pinned), Fraction(0))
        level = min(Fraction(1), left / shares) if shares else Fraction(1)
        over = {i for i, claim in enumerate(claims) if i not in pinned and claim.minimum > claim.share * level}
        if not over:
            return Levels(factor_down(level), _WHOLE)
        pinned |= over


def grants_of(
    pool: PoolPolicy, tiers: Sequence[TierPolicy], keys: Mapping[str, int], supplies: Sequence[Supply]
) -> list[Grant]:
    """What each tier is given of the pool, in their order; ``supplies`` are those of the tiers' own promises."""
    claims = [_claim(tier, pool, keys[tier.name], supply) for tier, supply in zip(tiers, supplies, strict=True)]
    levels = levels_of(claims)
    return [_grant(tier, claim, levels, supply) for tier, claim, supply in zip(tiers, claims, supplies, strict=True)]


def _claim(tier: TierPolicy, pool: PoolPolicy, keys: int, supply: Supply) -> Claim:
    if not (tier.share and supply.usable):
        return Claim(Fraction(0), Fraction(0))
    sizes = carrier_sizes(tier, lengths_of(promise_of(tier, pool).mix))
    needed = [
        (Fraction(least) / 60 / Fraction(size), f"{keys} active keys × {least:,} {name} ÷ {number(size)} ÷ 60 s")
        for name, size in sizes.items()
        if (least := tier.minimum.of(name))
    ]
    of_one, said = max(needed, default=(Fraction(0), ""))
    return Claim(Fraction(Decimal(str(tier.share))), keys * of_one / Fraction(supply.usable), said)


def _grant(tier: TierPolicy, claim: Claim, levels: Levels, supply: Supply) -> Grant:
    kept = Factor("×", levels.minimum, "of the minimum, all that the pool has for minima")
    if claim.minimum > claim.share * Fraction(levels.share):
        start = factor_down(claim.minimum * Fraction(supply.usable))
        factors = (kept,) if levels.minimum < 1 else ()
        return Grant(
            start, f"{number(start)} requests/s for the tier's minimum ({claim.said})", factors, levels.minimum
        )
    share = Factor("×", Decimal(str(tier.share)), "tier share")
    left = Factor("×", levels.share, "left by the minima of other tiers")
    return Grant(
        supply.usable,
        f"{number(supply.usable)} requests/s",
        (share,) if levels.share == 1 else (share, left),
        levels.minimum,
    )
