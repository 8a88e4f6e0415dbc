"""Tells the controller which keys are in use on which model, so that it knows by how many to divide a tier's share.

A key that comes into use is told at once, for its promise must fit; then again at its first use after a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from time import monotonic

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.cancellation import is_cancelled
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.usereader import RETELL_S, active_key

log = logging.getLogger(__name__)

#: Uses are gathered for so long before they are told together.
GATHER_S = 0.2
RETRY_S = 1.0
#: What was told is forgotten after this long, so that a key in use is told again within ``RETELL_S`` in all: gathering
#: and telling take a moment, and one that fails is tried again.
FORGET_S = RETELL_S - 5.0
#: Uses told in one call.
_BATCH = 5_000
_CALL_TIMEOUT_S = 2.0

#: A key's id and a model.
_Use = tuple[str, str]


class Activity:
    """The keys in use at this gateway. What was told is forgotten every ``FORGET_S``, and told anew if it recurs."""

    def __init__(self, redis: Redis, metrics: GatewayMetrics, clock: Callable[[], float] = monotonic) -> None:
        self._redis = redis
        self._metrics = metrics
        self._new: set[_Use] = set()
        self._told: set[_Use] = set()
        self._clock = clock
        self._forgot_s = clock()
        self._wake = asyncio.Event()
        self._failing = False

    def note(self, key_id: str, model: str) -> None:
        """A key was used on a model just now."""
        now_s = self._clock()
        if now_s - self._forgot_s >= FORGET_S:
            self._told, self._forgot_s = set(), now_s
        use = (key_id, model)
        if use not in self._told:
            self._new.add(use)
            self._wake.set()

    async def run(self) -> None:
        """Tell until cancelled. A Redis that is away is logged once; what is new is kept until it is back."""
        while not is_cancelled():
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            self._wake.clear()
            try:
                await self.tell()
                self._failing = False
            except (RedisError, OSError) as error:  # OSError: TimeoutError too
                self._metrics.directory_errors.labels("activity").inc()
                if not self._failing:
                    log.error("cannot tell which keys are in use: %s", error)
                self._failing = True
                self._wake.set()
                await asyncio.sleep(RETRY_S)

    async def tell(self) -> None:
        """Tell what is new. Raises ``RedisError`` or ``OSError``."""
        while self._new:
            uses = [use for use, _ in zip(self._new, range(_BATCH), strict=False)]
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                await self._tell(uses)
            self._new.difference_update(uses)
            self._told.update(uses)

    async def _tell(self, uses: list[_Use]) -> None:
        seconds, microseconds = await self._redis.time()
        now_s = seconds + microseconds / 1e6
        by_model: dict[str, dict[str, float]] = defaultdict(dict)
        for key_id, model in uses:
            by_model[model][key_id] = now_s
        async with self._redis.pipeline(transaction=False) as pipe:
            for model, keys in by_model.items():
                pipe.zadd(active_key(model), dict(keys), gt=True)
            await pipe.execute()
