"""The store with a clock that a test sets: the shipped scripts, their one clock read replaced by an argument."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha1
from struct import unpack
from typing import Any

import msgspec
from redis.asyncio import Redis

from ratelimit.cell import Hold, Reservation, UsageEntry
from ratelimit.meter import Bucket
from ratelimit.store import Script, Store

CLOCK_READ = "redis_call('TIME')"


class ClockedStore(Store):
    """A store at ``now_us``; its Redis must hold this cell only."""

    def __init__(self, redis: Redis, cell: str = "test", now_us: int = 1_700_000_000_000_000) -> None:
        super().__init__(redis, cell, timeout_s=30)
        self.redis = redis
        self.now_us = now_us

    async def _evaluate(self, chosen: Script, keys: Sequence[str], arguments: Sequence[bytes | str | int]) -> Any:
        seconds, rest = divmod(self.now_us, 1_000_000)
        clock = msgspec.msgpack.encode([str(seconds), str(rest)])
        return await super()._evaluate(_clocked(chosen), keys, (*arguments, clock))

    async def state(self) -> StoredState:
        """All that Redis holds of the cell."""
        leases, usage = self._cell_keys
        names = sorted([key async for key in self.redis.scan_iter(self._scope_prefix + "*", count=1000)])
        reservations = sorted([key async for key in self.redis.scan_iter(self._reservation_prefix + "*", count=1000)])
        async with self.redis.pipeline(transaction=True) as pipeline:
            pipeline.zrange(leases, 0, -1, withscores=True)
            pipeline.xrange(usage)
            for name in names:
                pipeline.hgetall(name)
                pipeline.pttl(name)
            for name in reservations:
                pipeline.get(name)
            leased, used, *values = await pipeline.execute()
        held = values[2 * len(names) :]
        scopes = {n.decode()[len(self._scope_prefix) :]: v for n, v in zip(names, values[::2], strict=False)}
        start = len(self._reservation_prefix)
        return StoredState(
            buckets={f"{scope}:{name}": bucket for scope, v in scopes.items() for name, bucket in _buckets(v)},
            lifetimes_ms=dict(zip(scopes, values[1 : 2 * len(names) : 2], strict=True)),
            reservations={n.decode()[start:]: _reservation(v) for n, v in zip(reservations, held, strict=True)},
            leases={name.decode(): int(score) for name, score in leased},
            usage=[_usage(fields) for _, fields in used],
        )


class StoredState(msgspec.Struct):
    """A cell as Redis holds it, in the words of ``cell.Cell``; lifetimes are by scope, -1 for ever."""

    buckets: dict[str, Bucket]
    lifetimes_ms: dict[str, int]
    reservations: dict[str, Reservation]
    leases: dict[str, int]
    usage: list[UsageEntry]


@cache
def _clocked(chosen: Script) -> Script:
    if chosen.text.count(CLOCK_READ) != 1:
        raise AssertionError(f"the script reads the clock {chosen.text.count(CLOCK_READ)} times, not once")
    text = chosen.text.replace(CLOCK_READ, "cmsgpack.unpack(ARGV[#ARGV])")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def _buckets(fields: dict[bytes, bytes]) -> list[tuple[str, Bucket]]:
    return [(name.decode(), Bucket(*_integers(value))) for name, value in fields.items() if name != b".until"]


def _reservation(packed: bytes) -> Reservation:
    phase, forget_us, count, names_length = _integers(packed[:32])
    answer = _integers(packed[32 : 32 + 8 * (2 * count + 1)]) if count >= 0 else []
    holds_at = 32 + 8 * len(answer)
    names_at = holds_at + 32 * max(0, count)
    names = packed[names_at : names_at + names_length].decode().splitlines()
    holds = [Hold(*_integers(packed[at : at + 32])) for at in range(holds_at, names_at, 32)]
    by_name = dict(zip(names, holds, strict=True)) if names else {}
    return Reservation(
        phase=phase,
        forget_us=forget_us,
        memo=packed[names_at + names_length :],
        green=bool(answer) and answer[0] == 1,
        remaining=tuple(answer[1::2]) if answer else None,
        reset_us=tuple(answer[2::2]),
        holds={name: hold for name, hold in by_name.items() if hold.held >= 0},
    )


def _integers(doubles: bytes) -> list[int]:
    return [int(number) for number in unpack(f"<{len(doubles) // 8}d", doubles)]


def _usage(fields: dict[bytes, bytes]) -> UsageEntry:
    held = msgspec.msgpack.decode(fields.get(b"held", b"\x90"), type=tuple[tuple[str, int], ...])
    return UsageEntry(fields.get(b"record", b""), fields.get(b"expired", b""), held)
