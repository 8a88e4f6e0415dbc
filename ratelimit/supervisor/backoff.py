"""How long to wait before a process that exited is started again."""

from __future__ import annotations

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
#: A process that ran this long before it exited is restarted as if it had never failed.
STEADY_AFTER_S = 120.0
#: 2 to this power exceeds the longest delay; it keeps the delay of one that fails for weeks a number.
_MOST_DOUBLINGS = 10


class Backoff:
    """The restart delays of one process: 1 s after its first failure, doubling with each that follows soon."""

    def __init__(self) -> None:
        self._failures = 0
        self._started_at_s = float("-inf")

    def started(self, now_s: float) -> None:
        """The process was started."""
        self._started_at_s = now_s

    def failed(self, now_s: float) -> None:
        """It exited, or could not be started."""
        steady = now_s - self._started_at_s >= STEADY_AFTER_S
        self._failures = 1 if steady else self._failures + 1

    def may_start(self, now_s: float) -> bool:
        """Whether it is time to start it."""
        if self._failures == 0:
            return True
        delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures - 1, _MOST_DOUBLINGS))
        return now_s - self._started_at_s >= delay_s
