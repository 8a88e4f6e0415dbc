"""Which benchmark runs were in a steady state, and why the others were not. Pure.

In a steady state requests leave as fast as they come, so that what is seen does not depend on how long one looks. A run
says that it was not by what it took: it is shorter than ten of its requests' lives, its requests were all sent at once,
or the first token took a large part of the run, which is what a queue that grows looks like from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serving.points import MeasuredPoint

#: A run lasts at least so many lives of its requests.
LEAST_LIVES = 10.0
#: Sent at once: this share of all requests was in flight together.
BURST_SHARE = 0.9
#: A queue has grown where the mean wait for the first token is this share of the run.
QUEUED_SHARE = 0.05


class Unsteady(NamedTuple):
    """A run that was not steady, and the sign of it."""

    point: MeasuredPoint
    reason: str


def steady_points(points: Sequence[MeasuredPoint]) -> tuple[tuple[MeasuredPoint, ...], tuple[Unsteady, ...]]:
    """The steady runs among these, in their order, and the others, each with why it is not one."""
    signs = [(point, unsteady_sign(point)) for point in points]
    steady = tuple(point for point, sign in signs if sign is None)
    return steady, tuple(Unsteady(point, sign) for point, sign in signs if sign is not None)


def unsteady_sign(point: MeasuredPoint) -> str | None:
    """What shows that the run was not steady; None where nothing does."""
    life_s = _life_s(point)
    if life_s is None:
        return "it tells neither latency nor concurrency, so nothing shows that it was steady"
    if point.duration_s < LEAST_LIVES * life_s:
        return f"it lasted {point.duration_s / life_s:.1f} lives of a request, {LEAST_LIVES:g} are needed"
    if point.concurrency is not None and point.requests > 1 and point.concurrency >= BURST_SHARE * point.requests:
        return f"{point.concurrency:.0f} of its {point.requests} requests were in flight at once: a burst"
    if point.ttft_mean_s is not None and point.ttft_mean_s > QUEUED_SHARE * point.duration_s:
        return (
            f"the mean wait for a first token was {point.ttft_mean_s / point.duration_s:.0%} of the run: a queue grew"
        )
    return None


def _life_s(point: MeasuredPoint) -> float | None:
    """A request's life; of a closed loop that tells no latency, by Little's law from its concurrency."""
    if point.life_s is None and point.concurrency is not None:
        return point.concurrency * point.duration_s / point.requests
    return point.life_s
