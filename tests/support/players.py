"""One cell to play a history to, in memory or in Redis, at a clock that the history sets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeVar

from redis.asyncio import Redis

from ratelimit.cell import Cell, Reservation
from ratelimit.meter import Admitted, Bucket, Charge, Denied
from tests.support.clocked_store import ClockedStore
from tests.support.meters import START_US

T = TypeVar("T")


class Player(Protocol):
    """The calls of a cell, what it stores, and what may happen to it."""

    now_us: int

    def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted | Denied:
        """As ``Store.admit``."""

    def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """As ``Store.extend``."""

    def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        """As ``Store.settle``."""

    def reap(self, most: int) -> int:
        """As ``Store.reap``."""

    def configure(self, charges: Sequence[Charge], epoch: int) -> None:
        """As ``Store.configure``."""

    def lose(self, scope: str) -> None:
        """The buckets of a scope are gone: expired, or not written before a crash."""

    def buckets(self) -> dict[str, Bucket]:
        """All that are stored, as they are stored."""

    def reservations(self) -> dict[str, Reservation]:
        """All that are stored."""

    def close(self) -> None:
        """Give up what it holds."""


class CellPlayer:
    """The reference model."""

    def __init__(self) -> None:
        self.now_us = START_US
        self.cell = Cell()

    def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted | Denied:
        """As ``Cell.admit``."""
        return self.cell.admit(request_id, charges, epoch, lease_ms, self.now_us)

    def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """As ``Cell.extend``."""
        return self.cell.extend(request_id, usage, lease_ms, self.now_us)

    def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        """As ``Cell.settle``."""
        return self.cell.settle(request_id, usage, self.now_us)

    def reap(self, most: int) -> int:
        """As ``Cell.reap``."""
        return self.cell.reap(self.now_us, most)

    def configure(self, charges: Sequence[Charge], epoch: int) -> None:
        """As ``Cell.configure``."""
        self.cell.configure(charges, epoch, self.now_us)

    def lose(self, scope: str) -> None:
        """Drop the buckets of a scope."""
        self.cell.buckets = {n: b for n, b in self.cell.buckets.items() if n.rpartition(":")[0] != scope}

    def buckets(self) -> dict[str, Bucket]:
        """Copies, so that later calls do not change them."""
        return dict(self.cell.buckets)

    def reservations(self) -> dict[str, Reservation]:
        """The cell's own."""
        return self.cell.reservations

    def close(self) -> None:
        """Nothing to give up."""


class StorePlayer:
    """The store on a Redis that holds this cell only."""

    def __init__(self, redis_url: str) -> None:
        self._runner = asyncio.Runner()
        self._store = ClockedStore(Redis.from_url(redis_url), now_us=START_US)
        self._wait(self._store.redis.flushall())

    def _wait(self, call: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await call

        return self._runner.run(awaited())

    @property
    def now_us(self) -> int:
        """The time that the scripts are told."""
        return self._store.now_us

    @now_us.setter
    def now_us(self, now_us: int) -> None:
        self._store.now_us = now_us

    def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted | Denied:
        """As ``Store.admit``."""
        return self._wait(self._store.admit(request_id, charges, epoch, lease_ms))

    def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """As ``Store.extend``."""
        return self._wait(self._store.extend(request_id, usage, lease_ms))

    def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        """As ``Store.settle``."""
        return self._wait(self._store.settle(request_id, usage))

    def reap(self, most: int) -> int:
        """As ``Store.reap``."""
        return self._wait(self._store.reap(most))

    def configure(self, charges: Sequence[Charge], epoch: int) -> None:
        """As ``Store.configure``."""
        self._wait(self._store.configure(charges, epoch))

    def lose(self, scope: str) -> None:
        """Delete a scope's key."""
        self._wait(self._store.redis.delete(self._store._scope_prefix + scope))

    def buckets(self) -> dict[str, Bucket]:
        """As Redis holds them."""
        return self._wait(self._store.state()).buckets

    def reservations(self) -> dict[str, Reservation]:
        """As Redis holds them."""
        return self._wait(self._store.state()).reservations

    def close(self) -> None:
        """Close the connection and the loop."""
        self._wait(self._store.redis.aclose())
        self._runner.close()
