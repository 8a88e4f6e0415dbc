"""Readings of a caller's own limits, reused for a moment: asking again and again costs the store nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from time import monotonic

from ratelimit.meter import Reading

#: How old a reading may be that is told.
FRESH_S = 0.1
#: The most readings kept; beyond, the oldest goes.
MAX_KEPT = 1024

Read = Callable[[], Awaitable[Sequence[Reading]]]


class RecentReadings:
    """The last reading of each caller; those who ask meanwhile share the one under way, and its failure."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._kept: dict[Hashable, tuple[float, asyncio.Task[Sequence[Reading]]]] = {}

    async def of(self, asked: Hashable, read: Read) -> Sequence[Reading]:
        """What ``read`` gives, or gave at most ``FRESH_S`` ago for the same that was ``asked``; raises what it does."""
        now = self._clock()
        begun, reading = self._kept.get(asked, (0.0, None))
        if reading is None or (reading.done() and now - begun >= FRESH_S):
            reading = asyncio.create_task(_awaited(read))
            reading.add_done_callback(_see)
            self._kept.pop(asked, None)
            self._kept[asked] = now, reading
            if len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
        return await asyncio.shield(reading)  # whoever leaves does not end it for the others


async def _awaited(read: Read) -> Sequence[Reading]:
    return await read()


def _see(reading: asyncio.Task[Sequence[Reading]]) -> None:
    """Take note of a failure that nobody waits for any more: whoever asked has left."""
    if not reading.cancelled():
        reading.exception()
