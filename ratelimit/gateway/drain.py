"""A gateway's end as its parts see it: whether it has begun, and whether the time of open requests is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Drain:
    """Begins once, with ``begin``; ``cut_off`` takes the time that is left from every request under way."""

    def __init__(self) -> None:
        self.has_begun = False
        self.is_over = False
        self._open: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """From now on this gateway is on its way out."""
        self.has_begun = True

    def cut_off(self) -> None:
        """End everything inside ``until``, now and from now on."""
        self.is_over = True
        for timeout in self._open:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def until(self, deadline: float | None) -> AsyncIterator[None]:
        """As ``asyncio.timeout_at``, of the loop's clock; ``cut_off`` ends it sooner. Raises ``TimeoutError``."""
        async with asyncio.timeout_at(asyncio.get_running_loop().time() if self.is_over else deadline) as timeout:
            self._open.add(timeout)
            try:
                yield
            finally:
                self._open.discard(timeout)
