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
    life_s = life_of_request_s(point)
    if life_s is None:
        return "it tells no latency, so nothing shows that it was steady"
    if point.duration_s < LEAST_LIVES * life_s:
        return f"it lasted {point.duration_s / life_s:.1f} lives of a request, {LEAST_LIVES:g} are needed"
    if point.concurrency is not None and point.requests > 1 and point.concurrency >= BURST_SHARE * point.requests:
        return f"{point.concurrency:.0f} of its {point.requests} requests were in flight at once: a burst"
    if point.ttft_mean_s is not None and point.ttft_mean_s > QUEUED_SHARE * point.duration_s:
        return (
            f"the mean wait for a first token was {point.ttft_mean_s / point.duration_s:.0%} of the run: a queue grew"
        )
    return None


def life_of_request_s(point: MeasuredPoint) -> float | None:
    """Mean time from sending a request to its last token: stated, or TTFT + TPOT·(O − 1); None where neither is known.

    Medians stand in for means that a source leaves out.
    """
    if point.e2e_mean_s is not None:
        return point.e2e_mean_s
    ttft_s = point.ttft_p50_s if point.ttft_mean_s is None else point.ttft_mean_s
    tpot_s = point.tpot_p50_s if point.tpot_mean_s is None else point.tpot_mean_s
    if ttft_s is None or tpot_s is None:
        return None
    return ttft_s + tpot_s * max(0.0, point.output_tokens / point.requests - 1)
