"""What gateways tell each other by Redis: that they live, and when each key was last used.

The number of live gateways is what each of them divides the limits by while Redis is away, so the largest number of
the last seconds counts: after a restart that lost everything, the others take a moment to say that they are there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from time import time

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.publisher import KEYS_USED_KEY

log = logging.getLogger(__name__)

#: Sorted set of the gateways' ids by when each was last heard of, in seconds of Redis's clock.
GATEWAYS_KEY = "penstock:gateways"
HEARTBEAT_S = 2.0
#: A gateway that was silent for so long is not counted, and forgotten.
LIVE_S = 10
#: Uses are told every so many heartbeats, so many at once; the rest follow at the next.
_BEATS_PER_TELLING = 2
_MOST_TOLD = 10_000
_CALL_TIMEOUT_S = 2.0

#: What redis-py takes for a hash's fields and values; its mapping type is invariant.
_Encodable = bytes | bytearray | memoryview | str | int | float


class Presence:
    """A gateway among the others. ``used`` holds what is not told yet: key ids to seconds since 1970."""

    def __init__(self, redis: Redis, gateway_id: str, metrics: GatewayMetrics) -> None:
        self._redis = redis
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._counts: deque[tuple[float, int]] = deque()
        self._failing = False
        self.used: dict[str, int] = {}

    def note_use(self, key_id: str) -> None:
        """A key was used just now."""
        self.used[key_id] = int(time())

    def gateways(self) -> int:
        """Live gateways, this one among them, as far as it is known; 0 before Redis was ever reached."""
        return max((count for _, count in self._counts), default=0)

    async def run(self) -> None:
        """Beat until cancelled, then say goodbye. A Redis that is away is logged once."""
        beats = 0
        try:
            while True:
                try:
                    await self.beat()
                    if beats % _BEATS_PER_TELLING == 0:
                        await self.tell_uses()
                    self._failing = False
                except (RedisError, OSError) as error:  # OSError: TimeoutError too
                    self._metrics.directory_errors.labels("presence").inc()
                    if not self._failing:
                        log.error("cannot tell the other gateways that this one lives: %s", error)
                    self._failing = True
                beats += 1
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            await self._leave()

    async def beat(self) -> None:
        """Say that this gateway lives, and count those that do. Raises ``RedisError`` or ``OSError``."""
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            now_s = int((await self._redis.time())[0])
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.zadd(GATEWAYS_KEY, {self._gateway_id: now_s})
                pipe.zremrangebyscore(GATEWAYS_KEY, "-inf", now_s - LIVE_S - 1)
                pipe.zcard(GATEWAYS_KEY)
                *_, live = await pipe.execute()
        loop_s = asyncio.get_running_loop().time()
        self._counts.append((loop_s, max(1, int(live))))
        while self._counts[0][0] < loop_s - LIVE_S:
            self._counts.popleft()
        self._metrics.gateways.set(self.gateways())

    async def tell_uses(self) -> None:
        """Tell the uses noted since the last time; a later one known to Redis stays. Raises as ``beat``."""
        telling = {key_id: self.used[key_id] for key_id, _ in zip(list(self.used), range(_MOST_TOLD), strict=False)}
        if not telling:
            return
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            known = await self._redis.hmget(KEYS_USED_KEY, list(telling))
            later: dict[_Encodable, _Encodable] = {
                key_id: used_at
                for (key_id, used_at), before in zip(telling.items(), known, strict=True)
                if used_at > int(before or 0)
            }
            if later:
                await self._redis.hset(KEYS_USED_KEY, mapping=later)
        for key_id, used_at in telling.items():
            if self.used.get(key_id) == used_at:
                del self.used[key_id]

    async def _leave(self) -> None:
        try:
            await self.tell_uses()
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                await self._redis.zrem(GATEWAYS_KEY, self._gateway_id)
        except (RedisError, OSError):
            self._metrics.directory_errors.labels("presence").inc()  # the others forget it after LIVE_S
