"""Work on files that may fail without stopping anything: said once in the log, and tried again by whoever needs it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ratelimit.statefile import StateFileError

log = logging.getLogger(__name__)


class Attempts:
    """Remembers which work fails, so that each failure is said once, and its end too."""

    def __init__(self) -> None:
        self._failures: dict[str, str] = {}

    def make(self, what: str, work: Callable[[], None]) -> None:
        """Do it, or say once, by ``what``, why it cannot be done."""
        try:
            work()
        except (StateFileError, OSError) as error:
            if self._failures.get(what) != str(error):
                log.error("%s: %s", what, error)
            self._failures[what] = str(error)
        else:
            if self._failures.pop(what, None) is not None:
                log.warning("no longer: %s", what)
