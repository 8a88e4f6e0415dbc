"""How far the throttled shares were held against the exact meter, and which plans lie beyond that. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

#: The fluid's error in the share of the work that is throttled, in all and tier by tier, and what it was tested with:
#: ``tests/unit/test_planning_throttling.py`` holds the errors and spans these ranges.
ERROR_OVERALL, ERROR_BY_TIER, ERROR_BY_TIER_OF_SMALL_POOLS = 0.02, 0.05, 0.16
#: A pool is small below so many requests/s.
SMALL_POOL_PER_S = 100.0
TESTED_POOLS_PER_S = (20.0, 200.0)
#: The work asked for, in the busiest minute, as a multiple of what the pool gives out.
TESTED_LOADS = (0.75, 13.5)
TESTED_TIERS = 3


class Planned(NamedTuple):
    """A fleet as the errors know it; ``load`` is the work asked for as a multiple of what its pool gives out."""

    word: str
    pool_per_s: float
    load: float
    tiers: int


def error_by_tier(pool_per_s: float) -> float:
    """The error tier by tier in a pool of so many requests/s."""
    return ERROR_BY_TIER_OF_SMALL_POOLS if pool_per_s < SMALL_POOL_PER_S else ERROR_BY_TIER


def error_stated(fleets: Sequence[Planned]) -> str:
    """What the throttled shares of these fleets are worth. Where nothing is given out they are exact: all of it."""
    serving = [fleet for fleet in fleets if fleet.pool_per_s > 0]
    by_tier = max((error_by_tier(fleet.pool_per_s) for fleet in serving), default=ERROR_BY_TIER)
    outside = [said for fleet in serving for said in _outside(fleet)]
    where = f"; outside what was tested: {', '.join(outside)}" if outside else ""
    return (
        f"throttled shares: within {ERROR_OVERALL:.0%} of the work in all and {by_tier:.0%} tier by tier of the exact "
        f"meter's, as tested with Poisson callers of {TESTED_TIERS} tiers in pools of {_range(TESTED_POOLS_PER_S)} "
        f"requests/s that are asked for {_range(TESTED_LOADS)} times what they give out (docs/planning.md){where}"
    )


def _outside(fleet: Planned) -> Iterator[str]:
    if not TESTED_POOLS_PER_S[0] <= fleet.pool_per_s <= TESTED_POOLS_PER_S[1]:
        yield f"{fleet.word}, a pool of {fleet.pool_per_s:,.4g} requests/s"
    if not TESTED_LOADS[0] <= fleet.load <= TESTED_LOADS[1]:
        yield f"{fleet.word}, asked for {fleet.load:,.3g} times that"
    if fleet.tiers != TESTED_TIERS:
        yield f"{fleet.word}, {fleet.tiers} tier(s)"


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:g} to {bounds[1]:g}"
