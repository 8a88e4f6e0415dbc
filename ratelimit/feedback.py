"""What live signals say a pool does of its measured supply: a control law over plain values. Pure.

A supply is measured once, and a fleet may do less of it later: throttled clocks, noisy neighbours, an engine of another
version. Each window of signals is judged, and a factor between ``LEAST_FACTOR`` and 1 that trims the supply follows:

- **missed**: over the last minutes clearly more requests were later than the SLO allows, or replicas refused work; or
  the queue is long and grows. The factor is cut by ``CUT``, or where work waits at once to what the fleet was seen to
  do, but by no more than ``MOST_CUT``.
- **met**: the factor recovers by ``RECOVERY`` every ``RECOVERY_S``, but stays below where it was last cut for as long
  as that is remembered: from ``MEMORY_S`` on, twice as long each time that a try beyond it was missed again.
- **unclear** windows change nothing, and the memory does not fade in them: a little late, too few samples, too little
  load to tell, or what is late is explained otherwise. An idle fleet meets every SLO, however slow it is.

Two things explain lateness otherwise. A queue that does not grow since the last cut: the factor suffices, and what
waits has to go. And more offered work than the measured supply, by callers who do not pass the gateways: a fleet that
does all of its profile would be late too. The backlog of such a fleet is counted; until it is gone nothing is blamed
on the real one. What replicas refuse is in no backlog: it leaves no queue, and comes again at the next replica, so that
one request may be refused many times. It shows that too much is offered only where the supply is served besides.

No signals, as when metrics are lost, change nothing either.
"""

from __future__ import annotations

from math import exp, sqrt
from typing import Literal

import msgspec

LEAST_FACTOR = 0.5
#: One cut, and the largest where the fleet was seen to be saturated at less.
CUT, MOST_CUT = 0.05, 0.15
RECOVERY, RECOVERY_S = 0.02, 120.0
#: How long a missed factor is not tried again: at first, and at most.
MEMORY_S, MOST_MEMORY_S = 600.0, 7200.0
#: After a cut, the time that gateways, and requests already admitted, need to show its effect.
SETTLE_S = 30.0

#: What is late is judged by its mean over so long, weighted to the newest: much that is late is seen soon, and what is
#: late by little in time. Less than ``LEAST_SPAN_S`` and ``LEAST_SAMPLES`` requests are nothing to go by.
HORIZONS_S = (300.0, 1200.0)
LEAST_SPAN_S, LEAST_SAMPLES = 120.0, 50
#: The share that must be late beyond what may be, over ``CLEARLY_LATE_SPAN_S``; it falls as 1/√span. A fleet that does
#: all of its profile is late in bursts at its knee: simulated for hours, up to 0.13 more than may be over this span.
CLEARLY_LATE, CLEARLY_LATE_SPAN_S = 0.3, 300.0
#: The SLO is met where the fleet serves this share at least of what callers may ask of the trimmed supply.
ENOUGH_SERVED = 0.8
#: Windows in a row in which the queue must have grown long.
GROWN_BEFORE_CUT = 2
#: A queue is long when the fleet, as fast as it goes, needs this many TTFT bounds to start what waits.
LONG_QUEUE_TTFTS = 2.0
#: The share of arrivals that replicas may refuse before it counts, and how many refusals at least.
REFUSED_SHARE, LEAST_REFUSED = 0.02, 5.0
#: Offered work up to this share of the supply is within it: what is offered is estimated from means.
WITHIN_SUPPLY = 1.02

Verdict = Literal["missed", "met", "unclear"]


class LateShare(msgspec.Struct, frozen=True):
    """Of one bound, named and in seconds: the requests seen, and how many of them were beyond it for certain.

    Where replicas have bounds of their own, requests are held to those, and ``bound_s`` is their mean.
    """

    name: str
    bound_s: float
    seen: float = 0.0
    late: float = 0.0

    @property
    def share(self) -> float:
        """The share of them that was late; 0 of none."""
        return self.late / self.seen if self.seen else 0.0


class Signals(msgspec.Struct, frozen=True):
    """One pool over one window.

    ``offered`` and ``served`` are shares of the measured supply, untrimmed, in work: a long request counts more.
    ``offered`` and ``arrivals`` are without what was ``refused``. What waits at the window's end needs ``waiting_s`` to
    be started. ``may_be_late`` is what the SLO's percentile leaves.
    """

    duration_s: float
    offered: float
    served: float
    arrivals: float
    ttft: LateShare
    tpot: LateShare
    may_be_late: float
    waiting_s: float = 0.0
    refused: float = 0.0


class Seen(msgspec.Struct, frozen=True):
    """Sums over the windows that count, each fading with its age; those of work are in seconds of the supply."""

    span_s: float = 0.0
    offered_s: float = 0.0
    served_s: float = 0.0
    arrivals: float = 0.0
    refused: float = 0.0
    ttft_seen: float = 0.0
    ttft_late: float = 0.0
    tpot_seen: float = 0.0
    tpot_late: float = 0.0

    def also(self, window: Signals, horizon_s: float) -> Seen:
        """One more window."""
        kept = exp(-window.duration_s / horizon_s)
        return Seen(
            span_s=self.span_s * kept + window.duration_s,
            offered_s=self.offered_s * kept + window.offered * window.duration_s,
            served_s=self.served_s * kept + window.served * window.duration_s,
            arrivals=self.arrivals * kept + window.arrivals,
            refused=self.refused * kept + window.refused,
            ttft_seen=self.ttft_seen * kept + window.ttft.seen,
            ttft_late=self.ttft_late * kept + window.ttft.late,
            tpot_seen=self.tpot_seen * kept + window.tpot.seen,
            tpot_late=self.tpot_late * kept + window.tpot.late,
        )


class Feedback(msgspec.Struct, frozen=True):
    """The factor in force and why, and what the law remembers; all times are seconds that are left.

    ``backlog_s`` is the work offered beyond the measured supply and not worked off, in seconds of the supply.
    ``queue_s`` is the shortest that the queue was since the last cut; ``grown`` windows in a row it was longer by much.
    ``missed_at`` is not tried again for ``memory_left_s``; ``memory_s`` is how long that was in the beginning.
    ``used`` is the share of the factor that was served when it was missed: spare replicas and unsold supply may keep
    callers from more.
    """

    factor: float = 1.0
    reason: str = ""
    seen: tuple[Seen, ...] = tuple(Seen() for _ in HORIZONS_S)
    backlog_s: float = 0.0
    queue_s: float = 0.0
    grown: int = 0
    settling_s: float = 0.0
    recovering_s: float = 0.0
    missed_at: float = 1.0
    memory_left_s: float = 0.0
    memory_s: float = 0.0
    used: float = 1.0

    def __post_init__(self) -> None:
        """Raises ``ValueError`` where a figure cannot be, as in a file that others have written to."""
        for name in ("factor", "missed_at"):
            if not LEAST_FACTOR <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from {LEAST_FACTOR} to 1, not {getattr(self, name)}")
        if len(self.seen) != len(HORIZONS_S):
            raise ValueError(f"seen must have {len(HORIZONS_S)} entries, not {len(self.seen)}")
        for name in (
            "backlog_s",
            "queue_s",
            "grown",
            "settling_s",
            "recovering_s",
            "memory_left_s",
            "memory_s",
            "used",
        ):
            if not getattr(self, name) >= 0:  # nor is NaN
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


def after(state: Feedback, window: Signals | None) -> Feedback:
    """The state after one more window; None, where nothing could be seen, changes nothing."""
    if window is None:
        return state
    state = _noted(state, window)
    verdict, why = judge(state, window)
    if verdict == "missed":
        return _cut(state, window, why)
    return _recovered(state, window.duration_s) if verdict == "met" else state


def judge(state: Feedback, window: Signals) -> tuple[Verdict, str]:
    """What is to be said of the fleet after this window, which the state has noted, and in words why it was missed."""
    if _is_explained(state, window):
        return "unclear", ""
    if state.grown >= GROWN_BEFORE_CUT:
        return (
            "missed",
            f"what waits needs {window.waiting_s:.3g} s to be started (TTFT bound {window.ttft.bound_s:.3g} s)",
        )
    recent = state.seen[0]
    if state.grown or recent.span_s < LEAST_SPAN_S:
        return "unclear", ""
    if why := next(filter(None, (_late(seen, window) for seen in state.seen)), "") or _refused(recent):
        return "missed", why
    late = any(part.share > window.may_be_late for part in _late_shares(recent, window))
    return ("met", "") if not late and _is_loaded(state) else ("unclear", "")


def _is_loaded(state: Feedback) -> bool:
    """Whether the fleet has lately done enough for its lateness to say anything of the factor."""
    recent = state.seen[0]
    served = recent.served_s / recent.span_s
    return recent.ttft_seen >= LEAST_SAMPLES and served >= ENOUGH_SERVED * state.used * state.factor


def _is_explained(state: Feedback, window: Signals) -> bool:
    """Whether lateness now says nothing of the fleet's speed."""
    if state.settling_s > 0 or state.backlog_s > window.ttft.bound_s:
        return True
    if window.served >= 1 and _are_many(window.refused, window.arrivals):
        return True
    return window.waiting_s > _long_queue_s(window) and not state.grown


def _is_behind(window: Signals) -> bool:
    return window.waiting_s > 0 or any(part.share > window.may_be_late for part in (window.ttft, window.tpot))


def _long_queue_s(window: Signals) -> float:
    return LONG_QUEUE_TTFTS * window.ttft.bound_s


def _late_shares(seen: Seen, window: Signals) -> tuple[LateShare, LateShare]:
    return (
        msgspec.structs.replace(window.ttft, seen=seen.ttft_seen, late=seen.ttft_late),
        msgspec.structs.replace(window.tpot, seen=seen.tpot_seen, late=seen.tpot_late),
    )


def _late(seen: Seen, window: Signals) -> str:
    may_be_late = window.may_be_late
    too_late = may_be_late + CLEARLY_LATE * sqrt(CLEARLY_LATE_SPAN_S / seen.span_s)
    for part in _late_shares(seen, window):
        if part.seen >= LEAST_SAMPLES and part.share > too_late:
            return (
                f"{part.share:.0%} of {part.seen:.0f} requests were beyond the {part.name} bound of "
                f"{part.bound_s:.3g} s ({may_be_late:.2g} of them may be)"
            )
    return ""


def _are_many(refused: float, arrivals: float) -> bool:
    return refused >= max(LEAST_REFUSED, REFUSED_SHARE * (arrivals + refused))


def _refused(seen: Seen) -> str:
    if not _are_many(seen.refused, seen.arrivals):
        return ""
    return f"replicas refused {seen.refused:.0f} of {seen.arrivals + seen.refused:.0f} requests (503)"


def _noted(state: Feedback, window: Signals) -> Feedback:
    """The state with the window in its sums, its times and its queues."""
    backlog_s = max(0.0, state.backlog_s + (window.offered - WITHIN_SUPPLY) * window.duration_s)
    if _are_many(window.refused, window.arrivals):
        # A full queue holds no more than what waits, whatever the estimate of offered work adds up to.
        backlog_s = min(backlog_s, window.waiting_s)
    settling_s = max(0.0, state.settling_s - window.duration_s)
    # While a cut takes effect the queue goes on to grow.
    queue_s = window.waiting_s if state.settling_s > 0 else min(state.queue_s, window.waiting_s)
    noted = msgspec.structs.replace(
        state,
        backlog_s=backlog_s if _is_behind(window) else 0.0,
        settling_s=settling_s,
        queue_s=queue_s,
        grown=state.grown + 1 if window.waiting_s > queue_s + _long_queue_s(window) else 0,
    )
    if _is_explained(noted, window):
        return msgspec.structs.replace(noted, seen=Feedback().seen)
    pairs = zip(state.seen, HORIZONS_S, strict=True)
    return msgspec.structs.replace(noted, seen=tuple(seen.also(window, horizon_s) for seen, horizon_s in pairs))


def _cut(state: Feedback, window: Signals, why: str) -> Feedback:
    recent = state.seen[0]
    taken_in, served = recent.offered_s / recent.span_s, recent.served_s / recent.span_s
    # Where work waits, what is served is all that the fleet can do.
    seen_to_do = served if state.grown else 1.0
    factor = max(LEAST_FACTOR, state.factor - MOST_CUT, min(state.factor - CUT, seen_to_do))
    tried_again = state.memory_s > 0 and state.memory_left_s == 0
    memory_s = min(MOST_MEMORY_S, 2 * state.memory_s) if tried_again else state.memory_s or MEMORY_S
    return Feedback(
        factor=round(factor, 2),
        reason=f"{why}, while {taken_in:.0%} of the measured supply was taken in",
        queue_s=window.waiting_s,
        settling_s=SETTLE_S,
        missed_at=state.factor,
        memory_left_s=memory_s,
        memory_s=memory_s,
        used=min(1.0, served / state.factor),
    )


def _recovered(state: Feedback, duration_s: float) -> Feedback:
    state = msgspec.structs.replace(state, memory_left_s=max(0.0, state.memory_left_s - duration_s))
    most = min(1.0, state.missed_at - CUT / 2) if state.memory_left_s > 0 else 1.0
    recovering_s = state.recovering_s + duration_s
    if state.factor >= most or recovering_s < RECOVERY_S:
        return msgspec.structs.replace(state, recovering_s=min(recovering_s, RECOVERY_S))
    factor = round(min(most, state.factor + RECOVERY), 3)
    reason = state.reason if factor < 1.0 else ""
    return msgspec.structs.replace(state, factor=factor, reason=reason, recovering_s=0.0)
