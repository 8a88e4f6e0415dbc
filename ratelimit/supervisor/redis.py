"""The Redis of one machine: the one that the config names, or our own, restarted when it exits."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from time import monotonic

from ratelimit.embedded_redis import EmbeddedRedis, EmbeddedRedisError, start_embedded_redis
from ratelimit.supervisor.backoff import Backoff

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.25


class RedisKeeper:
    """Our own Redis on the data in ``data_dir``; its address stays the same over restarts."""

    def __init__(self, data_dir: Path, log_path: Path) -> None:
        self._data_dir = data_dir
        self._log_path = log_path
        self._backoff = Backoff()
        self._server: EmbeddedRedis | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the server and its guard."""
        return [self._server.pid, self._server.guard_pid] if self._server else []

    async def start(self) -> str:
        """Start it and return its URL. Raises ``EmbeddedRedisError``."""
        self._backoff.started(monotonic())
        self._server = await start_embedded_redis(self._data_dir, self._log_path)
        return self._server.url

    async def run(self) -> None:
        """Start another when it exits, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if self._server is not None and self._server.poll() is not None:
                log.error("Redis exited with status %d, starting another on its data", self._server.poll())
                await self._server.stop()
                self._server = None
                self._backoff.failed(monotonic())
            if self._server is None and self._backoff.may_start(monotonic()):
                await self._try_start()

    async def stop(self) -> None:
        """Stop it; what it holds is on disk."""
        if self._server is not None:
            await self._server.stop()

    async def _try_start(self) -> None:
        try:
            await self.start()
        except EmbeddedRedisError as error:
            self._backoff.failed(monotonic())
            log.error("%s", error)
