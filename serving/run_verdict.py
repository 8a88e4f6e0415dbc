"""When a run has been watched for long enough, when it is hopeless, and what it was. Pure.

A run is sampled while it lasts, and read at *marks*, where the engine's counters are read too. Its window begins at the
first mark after the warm-up and after what MSER calls the start-up, and ends at the mark at which it is long enough:
so many seconds, so many lives of a request, so many requests, or the bound on its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from serving.enginefacts import Counters
from serving.outcomes import RequestOutcome, Window
from serving.steady_points import LEAST_LIVES
from serving.stepsim import percentile
from serving.trend import Sample, drift, is_over_saturated, start_up_s

State = Literal["steady", "unsteady", "over-saturated", "lagged", "short"]

#: A little more than what a fit asks for, since the mean life is known only at the end.
LIVES = 1.05 * LEAST_LIVES
#: A run is called over-saturated no sooner than after this share of its planned time.
_LEAST_LOOK_SHARE = 0.4
#: Requests without which a lag has no 99th percentile.
_LEAST_LAGS = 20


class PointSettings(msgspec.Struct, frozen=True):
    """How one point is run; seconds where not said otherwise.

    It is watched for ``watch_s`` after ``warm_up_s``; longer, until it has covered ten lives of its requests and
    ``least_requests`` of them. From its start to the last answer that counts it takes ``most_s`` at most.
    ``lag_bound_s`` bounds how late the client sends (p99). ``turnaround_s`` is what a lone request is on its way while
    the engine computes nothing.
    """

    warm_up_s: float = 5.0
    watch_s: float = 30.0
    most_s: float = 180.0
    least_requests: int = 50
    lag_bound_s: float = 0.05
    most_in_flight: int = 4096
    turnaround_s: float = 0.0


class Seen(NamedTuple):
    """A run so far: requests in flight over time, first tokens with the time that they took, the answered requests."""

    in_flight: Sequence[Sample]
    ttft: Sequence[Sample]
    outcomes: Sequence[RequestOutcome]
    marks: Sequence[Counters]
    offered_per_s: float | None


class Verdict(NamedTuple):
    """What a run was, why, and the part of it that counts."""

    state: State
    why: str
    window: Window


def verdict(settings: PointSettings, seen: Seen) -> Verdict | None:
    """The verdict at the last mark; None while the run has to go on."""
    window = window_of(settings, seen)
    late_s = lag_p99_s(seen.outcomes)
    if len(seen.outcomes) >= _LEAST_LAGS and late_s > settings.lag_bound_s:
        late = f"{late_s * 1e3:.0f} ms in the 99th percentile, bound {settings.lag_bound_s * 1e3:.0f} ms"
        return Verdict("lagged", f"the client sent late: {late}", window)
    over = _over_saturation(settings, seen, window)
    if over:
        return Verdict("over-saturated", over, window)
    short = shortfall(settings, seen, window)
    if short:
        is_over = window.end_s >= settings.most_s
        return Verdict("short", f"{short}; raise --most-point-s", window) if is_over else None
    drifting = "" if seen.offered_per_s is None else drift(_since(seen.in_flight, window.start_s))
    return Verdict("unsteady" if drifting else "steady", drifting, window)


def window_of(settings: PointSettings, seen: Seen) -> Window:
    """From the first mark after warm-up and start-up to the last mark; empty while there is none."""
    marks = [mark.time_s for mark in seen.marks] or [0.0]
    after_s = max(settings.warm_up_s, start_up_s(seen.in_flight)) if seen.in_flight else settings.warm_up_s
    return Window(next((time_s for time_s in marks if time_s >= after_s), marks[-1]), marks[-1])


def shortfall(settings: PointSettings, seen: Seen, window: Window) -> str:
    """What the window still lacks; empty where it is long enough."""
    if window.duration_s < settings.watch_s:
        return f"only {window.duration_s:.0f} s were left to watch after its start-up"
    answered = sum(window.start_s <= o.scheduled_s and o.finish_s <= window.end_s for o in seen.outcomes)
    if answered < settings.least_requests:
        return f"only {answered} of {settings.least_requests} requests ended in {window.duration_s:.0f} s"
    lives = window.duration_s / life_s(seen, window)
    return "" if lives >= LIVES else f"it covers {lives:.1f} lives of a request, {LIVES:g} are needed"


def life_s(seen: Seen, window: Window) -> float:
    """Mean time that a request lives: of those answered, or by Little's law, whichever is longer."""
    lives = [o.e2e_s for o in seen.outcomes if o.scheduled_s >= window.start_s]
    mean_s = sum(lives) / len(lives) if lives else window.duration_s
    flying = [sample.value for sample in _since(seen.in_flight, window.start_s)]
    if not flying or not seen.offered_per_s:
        return mean_s
    return max(mean_s, sum(flying) / len(flying) / seen.offered_per_s)


def lag_p99_s(outcomes: Sequence[RequestOutcome]) -> float:
    """How late requests were sent, at the 99th percentile; 0 for none."""
    return percentile([o.lag_s for o in outcomes], 99)


def expected_s(settings: PointSettings, life: float) -> float:
    """About how long a steady run takes whose requests live so many seconds, its end included."""
    return min(settings.most_s, settings.warm_up_s + max(settings.watch_s, LIVES * life) + 2 * life)


def _over_saturation(settings: PointSettings, seen: Seen, window: Window) -> str:
    if seen.offered_per_s is None:
        return ""
    if seen.in_flight and seen.in_flight[-1].value > settings.most_in_flight:
        return f"more than {settings.most_in_flight} requests were in flight"
    if window.end_s < settings.warm_up_s + _LEAST_LOOK_SHARE * settings.watch_s:
        return ""
    since_s = settings.warm_up_s  # not the window: a queue that grows has no end of its start-up
    if is_over_saturated(_since(seen.in_flight, since_s), _since(seen.ttft, since_s)):
        return "requests in flight and time to first token both kept rising"
    return ""


def _since(samples: Sequence[Sample], time_s: float) -> list[Sample]:
    return [sample for sample in samples if sample.time_s >= time_s]
