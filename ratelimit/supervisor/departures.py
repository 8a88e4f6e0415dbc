"""How an engine that the config no longer wants leaves: first the limits, then its open requests, then its process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

import aiohttp

from serving.fleet import HELD_METRICS, sum_metrics

log = logging.getLogger(__name__)

#: The limits follow the config within a round; after this they do not, and the engine goes all the same.
PUBLISH_TIMEOUT_S = 10.0
#: How long open requests may take to end on an engine that takes no new ones.
DRAIN_TIMEOUT_S = 30.0
DRAIN_INTERVAL_S = 0.5


class Departures:
    """Sends engines off, one change of the config after the other."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        published_without: Callable[[Collection[str], float], Awaitable[bool]],
        let_go: Callable[[Collection[str]], Awaitable[None]],
    ) -> None:
        self._session = session
        self._published_without = published_without
        self._let_go = let_go
        self._waiting: set[str] = set()
        self._changed = asyncio.Event()

    def add(self, urls: Collection[str]) -> None:
        """These engines are no longer wanted."""
        self._waiting.update(urls)
        self._changed.set()

    async def run(self) -> None:
        """See every departure through, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            urls, self._waiting = self._waiting, set()
            if not urls:
                continue
            if not await self._published_without(urls, PUBLISH_TIMEOUT_S):
                log.error("limits still count %s, which is stopped nevertheless", ", ".join(sorted(urls)))
            await asyncio.gather(*(self._drained(url) for url in urls))
            await self._let_go(urls)

    async def _drained(self, url: str) -> None:
        """Wait until the engine holds no request, cannot say, or has had its time."""
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while await self._requests_held(url):  # noqa: ASYNC110 - what is waited for happens in another process
                    await asyncio.sleep(DRAIN_INTERVAL_S)
        except TimeoutError:
            log.warning("%s still held requests after %.0f s", url, DRAIN_TIMEOUT_S)
        except (aiohttp.ClientError, OSError, ValueError):
            return

    async def _requests_held(self, url: str) -> float:
        async with self._session.get(f"{url}/metrics") as response:
            return sum_metrics(await response.text(), HELD_METRICS)
