"""Which keys are in use on which model: gateways say so in Redis, the controller reads what is new.

Names in Redis: ``penstock:keys:active:MODEL``, a sorted set of key ids by the time (of Redis's clock) at which a
gateway last said so. A gateway says each key at once when it comes into use, and again while it is used, some
``RETELL_S`` later at most, so that the sets and the traffic grow with the keys in use, not with requests. The
controller reads only what is newer than what it has read.

It reads by time, page by page, each with a timeout of its own, and goes on where it was when one fails. A page begins
at the last time of the one before, never at a position: a key that is told again meanwhile leaves its place, and those
behind it move up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from redis.asyncio import Redis

ACTIVE_KEY = "penstock:keys:active:"
#: A gateway says a key in use again within this long; times of use may be this much older than they were.
RETELL_S = 60.0
REDIS_TIMEOUT_S = 5.0
#: What was told for this long is read again: a gateway asks for the time before it tells, and may be slow.
_OVERLAP_S = 5
#: Uses read at a time; more, where more than that were told at one and the same time.
_BATCH = 20_000
_FORGET_INTERVAL_S = 60.0


def active_key(model: str) -> str:
    """The sorted set of a model."""
    return f"{ACTIVE_KEY}{model}"


class UseReader:
    """Reads the uses that gateways have told since the last time, by Redis's clock."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._read_to: dict[str, float] = {}
        self._forgot_at_s = float("-inf")

    async def read(
        self, models: Iterable[str], keep_s: float, now_s: float, used: Callable[[str, str, float], None]
    ) -> None:
        """Hand every new use to ``used`` (key, model, time by the clock of ``now_s``), and forget those ``keep_s`` old.

        The same use may be handed over several times. Raises ``RedisError`` or ``OSError``, of which ``TimeoutError``
        is one: then not all has been read, and the next call goes on from there.
        """
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            told_s, _ = await self._redis.time()
        for model in models:
            await self._read_model(model, told_s, now_s - told_s, used)
        if told_s - self._forgot_at_s >= _FORGET_INTERVAL_S:
            for model in self._read_to:
                async with asyncio.timeout(REDIS_TIMEOUT_S):
                    await self._redis.zremrangebyscore(active_key(model), "-inf", told_s - keep_s)
            self._forgot_at_s = told_s

    async def _read_model(
        self, model: str, told_s: int, ahead_s: float, used: Callable[[str, str, float], None]
    ) -> None:
        read_to, most = float(told_s - _OVERLAP_S), _BATCH
        start = self._read_to.get(model, float("-inf"))
        while True:
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                found: Any = await self._redis.zrange(
                    active_key(model), start, "+inf", byscore=True, withscores=True, offset=0, num=most
                )
            for key_id, at_s in found:
                used(key_id.decode() if isinstance(key_id, bytes) else key_id, model, at_s + ahead_s)
            if len(found) < most:
                break
            last_s = float(found[-1][1])
            most = _BATCH if last_s > start else 2 * most
            start = last_s
            self._read_to[model] = min(start, read_to)
        self._read_to[model] = read_to
