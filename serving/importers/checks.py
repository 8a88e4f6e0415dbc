"""Runs that cannot be vouched for are refused, whichever tool wrote them. Pure.

What cannot be true of a run is in ``serving.pointchecks`` and ``serving.denominators``; here it becomes a refusal.
"""

from __future__ import annotations

from collections.abc import Iterable

from serving.denominators import flag_problem
from serving.importers.results import RunRefusedError
from serving.pointchecks import StatedRate, point_problems
from serving.points import MeasuredPoint

#: With more failures than this, what succeeded had a lighter load than the file says.
MOST_FAILED_SHARE = 0.01


def checked(point: MeasuredPoint, rates: tuple[StatedRate, ...] = ()) -> MeasuredPoint:
    """The same point. Raises ``RunRefusedError`` with the first thing that cannot be true of it."""
    problem = next(point_problems(point, rates), None)
    if problem is not None:
        raise RunRefusedError(problem)
    return point


def check_flags(flags: Iterable[tuple[str, object]]) -> None:
    """Raise ``RunRefusedError`` where a key or column says that the row is of a disaggregated deployment."""
    problem = flag_problem(flags)
    if problem is not None:
        raise RunRefusedError(problem)


def check_succeeded(completed: int, failed: int) -> None:
    """Raise ``RunRefusedError`` for a run in which nothing succeeded, or too much failed."""
    if completed == 0:
        raise RunRefusedError(
            f"none of its {failed} requests succeeded, so it measured nothing; mend what failed, and run it again"
        )
    if failed > MOST_FAILED_SHARE * (completed + failed):
        raise RunRefusedError(
            f"{failed} of its {completed + failed} requests failed, so the rest had a lighter load than it says; "
            f"mend what made them fail and run it again"
        )
