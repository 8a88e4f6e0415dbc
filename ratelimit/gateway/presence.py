"""What gateways tell each other by Redis: that they live, and when each key was last used.

The number of live gateways is what each of them divides the limits by while Redis is away, so the largest number of
the last seconds counts: after a restart that lost everything, the others take a moment to say that they are there.
After an outage, however long, the number before it counts until Redis has answered for as long without a break.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from time import time

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.cancellation import is_cancelled
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.keyuse import told_time
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


class LiveCount:
    """How many gateways live, from counts of those that were heard of. Times are seconds of one steady clock. Pure."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()
        self._before = 0
        self._since_s = 0.0

    @property
    def value(self) -> int:
        """The number to go by; 0 before the first count."""
        return max(self._before, *(count for _, count in self._counts), 0)

    def counted(self, now_s: float, live: int) -> None:
        """So many were heard of."""
        if self._counts and now_s - self._counts[-1][0] > LIVE_S:  # this gateway was silent, so others may have been
            self.missed()
        if not self._counts:
            self._since_s = now_s
        self._counts.append((now_s, live))
        while self._counts[0][0] < now_s - LIVE_S:
            self._counts.popleft()
        if now_s - self._since_s >= LIVE_S:
            self._before = 0

    def missed(self) -> None:
        """They could not be counted: what was known counts until they could be for ``LIVE_S`` without a break."""
        self._before = self.value
        self._counts.clear()


class Presence:
    """A gateway among the others. ``used`` holds what is not told yet: key ids to seconds since 1970."""

    def __init__(self, redis: Redis, gateway_id: str, metrics: GatewayMetrics) -> None:
        self._redis = redis
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._live = LiveCount()
        self._failing = False
        self.used: dict[str, int] = {}

    def note_use(self, key_id: str) -> None:
        """A key was used just now."""
        self.used[key_id] = int(time())

    def gateways(self) -> int:
        """Live gateways, this one among them, as far as it is known; 0 before Redis was ever reached."""
        return self._live.value

    async def run(self) -> None:
        """Beat until cancelled, then say goodbye. A Redis that is away is logged once."""
        beats = 0
        try:
            while not is_cancelled():
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
        try:
            live = await self._heard_of()
        except (RedisError, OSError):
            self._live.missed()
            raise
        self._live.counted(asyncio.get_running_loop().time(), max(1, live))
        self._metrics.gateways.set(self.gateways())

    async def _heard_of(self) -> int:
        """Say that this gateway lives; how many have said so lately."""
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            now_s = int((await self._redis.time())[0])
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.zadd(GATEWAYS_KEY, {self._gateway_id: now_s})
                pipe.zremrangebyscore(GATEWAYS_KEY, "-inf", now_s - LIVE_S - 1)
                pipe.zcard(GATEWAYS_KEY)
                *_, live = await pipe.execute()
        return int(live)

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
                if used_at > (told_time(before) or 0)
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
