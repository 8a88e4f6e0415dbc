"""Which cells may hold reservations or usage records: those of the config, and those that left it until they are empty.

Their names are kept in the state folder, so that a cell that left is reaped and drained also by the next controller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Annotated

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.cancellation import is_cancelled
from ratelimit.statefile import StateFile, StateFileError
from ratelimit.store import KEY_VERSION

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
REDIS_TIMEOUT_S = 5.0
#: A cell that has left is not forgotten before: gateways may not know yet, or bring what they served in an outage.
KEPT_S = 3600.0


class KnownCell(msgspec.Struct, frozen=True):
    """One cell; its name is the hash tag of its keys."""

    name: Annotated[str, msgspec.Meta(pattern="^[^{}]+$")]


def cells_file(state_dir: Path) -> StateFile[KnownCell]:
    """Where they are kept."""
    return StateFile(state_dir / "cells.json", KnownCell)


class KnownCells:
    """The cells of the models that ``models`` names, and those that it named before; ``clock`` is in steady seconds."""

    def __init__(
        self, redis: Redis, models: Callable[[], Iterable[str]], state_dir: Path, clock: Callable[[], float] = monotonic
    ) -> None:
        self._redis = redis
        self._models = models
        self._file = cells_file(state_dir)
        self._clock = clock
        self._kept: set[str] | None = None
        self._left_s: dict[str, float] = {}
        self._failure = ""

    def names(self) -> list[str]:
        """All that are known; those of earlier processes from the first ``round`` on."""
        return sorted((self._kept or set()).union(self._models()))

    async def run(self) -> None:
        """Follow the config until cancelled. A fault is logged once, and tried again."""
        while not is_cancelled():
            try:
                await self.round()
            except (RedisError, OSError, StateFileError) as error:  # OSError: TimeoutError too
                if str(error) != self._failure:
                    log.error("which cells are to be drained is not noted: %s", error)
                self._failure = str(error)
            else:
                self._failure = ""
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def round(self) -> None:
        """Note those that are new, and forget those that are empty, long after they left.

        Raises ``RedisError``, ``OSError`` or ``StateFileError``.
        """
        configured = set(self._models())
        if self._kept is None:
            self._kept = {cell.name for cell in self._file.read()}
        if not configured <= self._kept:
            self._keep(self._kept | configured)
        now_s = self._clock()
        self._left_s = {cell: self._left_s.get(cell, now_s) for cell in self._kept - configured}
        for cell, left_s in self._left_s.items():
            if now_s - left_s >= KEPT_S and await self._is_empty(cell):
                self._keep(self._kept - {cell})

    def _keep(self, cells: set[str]) -> None:
        with self._file.changing() as kept:
            kept[:] = [KnownCell(name) for name in sorted(cells)]
        self._kept = cells

    async def _is_empty(self, cell: str) -> bool:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            leases = await self._redis.zcard(f"{KEY_VERSION}:{{{cell}}}:leases")
            return not leases and not await self._redis.xlen(f"{KEY_VERSION}:{{{cell}}}:usage")
