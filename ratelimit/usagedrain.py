"""Moves usage records from the cells' streams in Redis into the day files, each exactly once.

A batch is read from the stream's beginning, appended and synced to disk, and only then trimmed from the stream. Whoever
dies in between finds the same entries again. Entry ids rise within a stream, and a stream is written to disk in its
order, so what is on disk of it is always its beginning:

- an entry above the last one that this process wrote is new;
- any other (the first batch after a start, or after an error; an older state of Redis that came back; a Redis that lost
  the stream and whose clock is behind) is looked up in the files by its id and its request's. Where the last record of
  a batch is not there, nothing after it is.

A stream keeps some ``MOST_USAGE_RECORDS`` entries: when nobody has drained for long, the oldest ones beyond them are
dropped rather than Redis filled. That is said in the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.cancellation import is_cancelled
from ratelimit.statefile import StateFileError
from ratelimit.store import KEY_VERSION, MOST_USAGE_RECORDS
from ratelimit.usage import EntryId, LedgerLine, ledger_line
from ratelimit.usagefiles import Unreadable, UsageFiles

log = logging.getLogger(__name__)

DRAIN_INTERVAL_S = 1.0
#: Entries read, written and trimmed at a time.
BATCH = 1000
REDIS_TIMEOUT_S = 5.0
#: For what was settled last, when the controller ends.
LAST_ROUND_S = 3.0


def usage_stream(cell: str) -> str:
    """The name of a cell's usage stream."""
    return f"{KEY_VERSION}:{{{cell}}}:usage"


class UsageDrain:
    """Drains the cells of the models that ``models`` has named so far, until cancelled."""

    def __init__(self, redis: Redis, models: Callable[[], Iterable[str]], state_dir: Path) -> None:
        self._redis = redis
        self._models = models
        self._cells: set[str] = set()
        self._files = UsageFiles(state_dir)
        #: The last entry written of each cell, once it is known that the stream goes on from there.
        self._written: dict[str, EntryId] = {}
        self._full: set[str] = set()
        self._failure = ""

    async def run(self) -> None:
        """Drain once a second, and once more at the end. One process at a time writes the files of a state folder."""
        while not is_cancelled():
            try:
                with self._files.writing() as alone:
                    if alone:
                        await self._rounds()
                self._note_failure(f"another process writes the files in {self._files.folder}")
            except (OSError, StateFileError) as error:
                self._note_failure(str(error))
            await asyncio.sleep(DRAIN_INTERVAL_S)

    async def _rounds(self) -> None:
        try:
            while not is_cancelled():
                await self._try_round()
                await asyncio.sleep(DRAIN_INTERVAL_S)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_ROUND_S):
                    await self._try_round()

    async def _try_round(self) -> None:
        try:
            await self.round()
        except (RedisError, OSError, StateFileError) as error:  # OSError: TimeoutError too
            self._note_failure(str(error) or type(error).__name__)
        else:
            self._failure = ""

    def _note_failure(self, failure: str) -> None:
        if failure != self._failure:
            log.error("usage records stay in Redis for now: %s", failure)
        self._failure = failure

    async def round(self) -> None:
        """Drain every cell until nothing is left in it. Raises ``RedisError``, ``OSError`` or ``StateFileError``."""
        self._cells |= set(self._models())
        for cell in sorted(self._cells):
            while await self._drain_batch(cell) == BATCH:
                pass

    async def _drain_batch(self, cell: str) -> int:
        entries = await self._read(cell)
        if not entries:
            return 0
        first, last = min(entries), max(entries)
        written = self._written.pop(cell, None)  # unknown again, should anything fail from here on
        lines, unreadable = _sorted_out(cell, entries)
        new, is_caught_up = lines, True
        if written is None or first <= written:
            found = await asyncio.to_thread(self._files.written, cell, first, last)
            new = [line for line in lines if (line.entry, line.id) not in found]
            is_caught_up = bool(new) and new[-1] is lines[-1]
        self._keep(new, unreadable)
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            await self._redis.xtrim(usage_stream(cell), minid=str(last.after()), approximate=False)
        if is_caught_up:
            self._written[cell] = last
        return len(entries)

    async def _read(self, cell: str) -> dict[EntryId, Mapping[bytes, bytes]]:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            length = await self._redis.xlen(usage_stream(cell))
            found: Any = await self._redis.xrange(usage_stream(cell), count=BATCH)
        self._note_length(cell, length)
        return {EntryId.parse(entry.decode()): fields for entry, fields in found}

    def _note_length(self, cell: str, length: int) -> None:
        if length < MOST_USAGE_RECORDS - BATCH:  # it may have been full before the last batch was trimmed
            self._full.discard(cell)
        elif cell not in self._full:
            self._full.add(cell)
            log.error(
                "the usage stream of %s is full (%d records): its oldest records may have been dropped unseen",
                cell,
                length,
            )

    def _keep(self, lines: list[LedgerLine], unreadable: list[Unreadable]) -> None:
        if unreadable:
            self._files.append_unreadable(unreadable)
            log.error("%d usage records cannot be read; they are in %s", len(unreadable), self._files.folder)
        if lines:
            self._files.append(lines)


def _sorted_out(
    cell: str, entries: Mapping[EntryId, Mapping[bytes, bytes]]
) -> tuple[list[LedgerLine], list[Unreadable]]:
    lines, unreadable = [], []
    for entry, fields in entries.items():
        try:
            line = ledger_line(cell, entry, fields)
        except ValueError as error:  # msgspec's are ValueErrors too
            told = {_text(name): _text(value) for name, value in fields.items()}
            unreadable.append(Unreadable(cell, str(entry), str(error), told))
        else:
            lines += [] if line is None else [line]
    return lines, unreadable


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
