"""The search for the largest rate that meets an SLO: a state machine over the rates tried so far. Pure.

The next rate is a function of the plan and of what was tried, in order: double while the SLO is met, or halve while it
is missed, then bisect the bracket. Nothing else is remembered, so a search that was interrupted goes on from its
recorded points, and one that runs twice asks for the same rates. The number of points is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tried(NamedTuple):
    """One rate, in requests a second, and whether the SLO was met at it."""

    requests_per_s: float
    met: bool


class SearchPlan(NamedTuple):
    """Where a search starts, when its bracket is narrow enough (as a share of its upper end), and its bound."""

    start_per_s: float
    tolerance: float = 0.1
    most_points: int = 7


class Bracket(NamedTuple):
    """The largest rate met below every rate missed, and the smallest rate missed; None where there is none."""

    met: float | None
    missed: float | None


def check_plan(plan: SearchPlan) -> None:
    """Raise ``ValueError`` for a plan that no search can follow, saying what it would need."""
    if not 0 < plan.start_per_s < float("inf"):
        raise ValueError(f"a search starts at {plan.start_per_s} requests/s; it needs a positive rate")
    if not 0 < plan.tolerance < 1:
        raise ValueError(f"a search's tolerance is {plan.tolerance}; it must lie between 0 and 1")
    if plan.most_points < 1:
        raise ValueError(f"a search of {plan.most_points} points finds nothing; it needs at least 1")


def bracket(tried: Sequence[Tried]) -> Bracket:
    """What the verdicts say of the knee. A rate met above one that was missed is chance, and counts for nothing."""
    missed = min((one.requests_per_s for one in tried if not one.met), default=None)
    met = max(
        (one.requests_per_s for one in tried if one.met and (missed is None or one.requests_per_s < missed)),
        default=None,
    )
    return Bracket(met, missed)


def contradictions(tried: Sequence[Tried]) -> tuple[float, ...]:
    """Rates that met the SLO above one that missed it, in order: noise that a longer point would settle."""
    missed = bracket(tried).missed
    return tuple(
        sorted(one.requests_per_s for one in tried if one.met and missed is not None and one.requests_per_s > missed)
    )


def is_closed(plan: SearchPlan, found: Bracket) -> bool:
    """Whether the knee is known to within the plan's tolerance."""
    return (
        found.met is not None and found.missed is not None and found.missed - found.met <= plan.tolerance * found.missed
    )


def next_rate(plan: SearchPlan, tried: Sequence[Tried]) -> float | None:
    """The rate to try next; None when the search is over."""
    found = bracket(tried)
    if len(tried) >= plan.most_points or is_closed(plan, found):
        return None
    if found.met is not None and found.missed is not None:
        return (found.met + found.missed) / 2
    if found.met is not None:
        return 2 * found.met
    return plan.start_per_s if found.missed is None else found.missed / 2
