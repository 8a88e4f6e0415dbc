"""What a controller says to a cluster's probes: whether it is ready, and whether it still lives.

Ready: it leads and its last round was good, or it stands by and Redis answers, so that it could lead. Live: its loops
go on. A Redis that is away makes a controller unready; it does not make it dead, for a restart would mend nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

#: Several askings for the lease, which come every half second.
ANSWER_WITHIN_S: Final = 10.0
#: Longer than any round or asking takes, in the largest fleet.
STUCK_AFTER_S: Final = 60.0


class ControllerHealth:
    """Told by the controller's loops, asked by ``/health`` and ``/live``; ``clock`` is in steady seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._asked_s = clock()
        self._answered_s = float("-inf")
        self._rounds_s: float | None = None
        self._round_failed = "no round yet"
        self._kept_out = ""

    def leads(self) -> None:
        """It leads from now on."""
        self._rounds_s, self._round_failed = self._clock(), "no round yet"

    def stands_by(self) -> None:
        """It leads no longer."""
        self._rounds_s = None

    def lease_asked(self, answered: bool) -> None:
        """It has asked Redis for the lease."""
        self._asked_s = self._clock()
        self._answered_s = self._asked_s if answered else self._answered_s

    def kept_out(self, why: str) -> None:
        """It may not lead, for this reason; empty where it may."""
        self._kept_out = why

    def round_ended(self, good: bool) -> None:
        """A round of the leader has ended."""
        if self._rounds_s is not None:
            self._rounds_s, self._round_failed = self._clock(), "" if good else "the last round failed"

    def unready(self) -> str:
        """Why it is not ready; empty where it is."""
        if self._rounds_s is not None:
            return self._round_failed
        return self._kept_out if self._clock() - self._answered_s <= ANSWER_WITHIN_S else "Redis does not answer"

    def stuck(self) -> str:
        """Why it is to be started again; empty where it lives."""
        now_s = self._clock()
        if now_s - self._asked_s > STUCK_AFTER_S:
            return f"it has not asked for the lease for {now_s - self._asked_s:.0f} s"
        if self._rounds_s is not None and now_s - self._rounds_s > STUCK_AFTER_S:
            return f"no round has ended for {now_s - self._rounds_s:.0f} s"
        return ""
