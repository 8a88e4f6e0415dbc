"""The store with a clock that a test sets: the shipped scripts, their one clock read replaced by an argument."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha1
from typing import Any

import msgspec
from redis.asyncio import Redis

from ratelimit.meter import Bucket, Reservation
from ratelimit.store import Script, Store

CLOCK_READ = "redis.call('TIME')"


class ClockedStore(Store):
    """A store at ``now_us``; its Redis must hold this cell only."""

    def __init__(self, redis: Redis, cell: str = "test", now_us: int = 1_700_000_000_000_000) -> None:
        super().__init__(redis, cell, timeout_s=30)
        self.redis = redis
        self.now_us = now_us

    async def _evaluate(self, chosen: Script, keys: Sequence[str], arguments: Sequence[bytes]) -> Any:
        seconds, rest = divmod(self.now_us, 1_000_000)
        clock = msgspec.msgpack.encode([str(seconds), str(rest)])
        return await super()._evaluate(_clocked(chosen), keys, (*arguments, clock))

    async def state(self) -> StoredState:
        """All that Redis holds of the cell."""
        reservations, leases, tombstones, gauges = self._cell_keys
        names = sorted([key async for key in self.redis.scan_iter(self._bucket_prefix + "*", count=1000)])
        async with self.redis.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(reservations)
            pipeline.zrange(leases, 0, -1, withscores=True)
            pipeline.zrange(tombstones, 0, -1, withscores=True)
            pipeline.hgetall(gauges)
            for name in names:
                pipeline.get(name)
                pipeline.pttl(name)
            held, leased, buried, counted, *buckets = await pipeline.execute()
        start = len(self._bucket_prefix)
        return StoredState(
            rated={n.decode()[start:]: _bucket(b) for n, b in zip(names, buckets[::2], strict=True)},
            lifetimes_ms={n.decode()[start:]: ms for n, ms in zip(names, buckets[1::2], strict=True)},
            gauges={name.decode(): _bucket(packed) for name, packed in counted.items()},
            reservations={name.decode(): _reservation(packed) for name, packed in held.items()},
            leases={name.decode(): int(score) for name, score in leased},
            tombstones={name.decode(): int(score) for name, score in buried},
        )


class StoredState(msgspec.Struct):
    """A cell as Redis holds it, in the words of ``meter.Cell``."""

    rated: dict[str, Bucket]
    lifetimes_ms: dict[str, int]
    gauges: dict[str, Bucket]
    reservations: dict[str, Reservation]
    leases: dict[str, int]
    tombstones: dict[str, int]


@cache
def _clocked(chosen: Script) -> Script:
    if chosen.text.count(CLOCK_READ) != 1:
        raise AssertionError(f"the script reads the clock {chosen.text.count(CLOCK_READ)} times, not once")
    text = chosen.text.replace(CLOCK_READ, "cmsgpack.unpack(ARGV[2])")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def _bucket(packed: bytes) -> Bucket:
    return msgspec.msgpack.decode(packed, type=Bucket)


def _reservation(packed: bytes) -> Reservation:
    """Lua has one kind of table, so an empty map arrives as an empty list."""
    phase, remaining, reset_us, rated, gauges = msgspec.msgpack.decode(packed)
    return msgspec.convert([phase, remaining, reset_us, rated or {}, gauges or {}], Reservation)
