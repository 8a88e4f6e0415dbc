"""Ends the reservations of gateways that died, also in cells where nobody asks for admission."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from redis.asyncio import Redis

from ratelimit.cancellation import is_cancelled
from ratelimit.store import Store, StoreUnavailableError

log = logging.getLogger(__name__)

REAP_INTERVAL_S = 1.0
STORE_TIMEOUT_S = 1.0
#: Reservations ended in one call, which holds Redis for some milliseconds.
BATCH = 100


class Reaper:
    """Reaps the cells of the models that ``models`` names at the time, until cancelled."""

    def __init__(self, redis: Redis, models: Callable[[], Iterable[str]]) -> None:
        self._redis = redis
        self._models = models
        self._failing: set[str] = set()

    async def run(self) -> None:
        """Reap every cell once a second."""
        while not is_cancelled():
            await self.round()
            await asyncio.sleep(REAP_INTERVAL_S)

    async def round(self) -> None:
        """Reap every cell until nothing in it is overdue. A Redis that is away is logged once, and tried again."""
        for model in self._models():
            try:
                await self._reap(model)
            except StoreUnavailableError as error:
                if model not in self._failing:
                    log.error("overdue reservations of %s cannot be ended: %s", model, error)
                self._failing.add(model)
            else:
                self._failing.discard(model)

    async def _reap(self, model: str) -> None:
        store = Store(self._redis, model, STORE_TIMEOUT_S)
        while await store.reap(BATCH) == BATCH:
            pass
