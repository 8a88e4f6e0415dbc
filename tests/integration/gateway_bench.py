"""A gateway, a replica and a key, put together for one test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
import openai
from msgspec.structs import replace
from redis.asyncio import Redis

from ratelimit.gateway.hold import Usage
from ratelimit.keys import KeyRecord
from ratelimit.publication import Publication
from ratelimit.store import KEY_VERSION
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import MODEL, GatewayProcess, make_key, publication, publish
from tests.support.stack import metric

_WITHIN_S = 10.0
_POLL_S = 0.02


class Bench:
    """What a gateway test needs. The gateway process is shared by many tests; metrics are told as differences."""

    def __init__(self, gateway: GatewayProcess, redis: Redis, upstream: FakeUpstream, epoch: int) -> None:
        self.gateway = gateway
        self.redis = redis
        self.upstream = upstream
        self.url = gateway.url
        self.epoch = epoch
        self.secret, self.record = make_key()
        self.published: Publication
        self._before = gateway.metrics()

    async def publish(self, urls: list[str] | None = None, *more_keys: KeyRecord, **options: Any) -> None:
        """Put limits in force, and wait until they are."""
        self.epoch += 1
        self.published = publication(urls or [self.upstream.url], self.epoch, **options)
        await publish(self.redis, self.published, self.record, *more_keys)
        await self.until(lambda: self.gateway.epoch() == self.epoch)
        async with self.http() as http:
            await self.until_answered(http, "/v1/models", 200)

    async def republish(self, *more_keys: KeyRecord, **changes: Any) -> None:
        """Put the limits in force once more, with these changes, and wait until they are."""
        self.epoch += 1
        self.published = replace(self.published, epoch=self.epoch, **changes)
        await publish(self.redis, self.published, self.record, *more_keys)
        await self.until(lambda: self.gateway.epoch() == self.epoch)

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        """The official client with this bench's key."""
        return openai.AsyncOpenAI(base_url=self.url + "/v1", **{"api_key": self.secret, "max_retries": 0, **options})

    def http(self) -> httpx.AsyncClient:
        """A bare client with this bench's key."""
        headers = {"authorization": f"Bearer {self.secret}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        """By how much a metric has grown in this test."""
        return metric(self.gateway.metrics(), name, **labels) - metric(self._before, name, **labels)

    def denials(self, bucket: str) -> float:
        """Refusals in this test for want of room in this bucket."""
        return self.metric("penstock_denials_total", bucket=bucket)

    async def until(self, probe: Callable[[], object]) -> None:
        """Wait until ``probe`` holds."""
        await _until(lambda: asyncio.to_thread(probe))

    async def until_answered(self, http: httpx.AsyncClient, path: str, status: int) -> None:
        """Wait until a GET has this status."""

        async def answered() -> bool:
            return (await http.get(path)).status_code == status

        await _until(answered)

    async def used(self) -> dict[str, float]:
        """What this key has used of each limit; exact under the slow rates of ``AMPLE``."""
        async with self.http() as http:
            limits = (await http.get("/v1/limits")).json()["limits"]
        return {limit["name"]: limit["burst"] - limit["remaining"] for limit in limits}

    async def idle(self) -> None:
        """Wait until every reservation is settled."""

        async def none_open() -> bool:
            return await self.redis.zcard(f"{KEY_VERSION}:{{{MODEL}}}:leases") == 0

        await _until(none_open)

    async def settled(self, usage: Usage, requests: int = 1) -> None:
        """Wait until every reservation is settled, and check that this and nothing else is charged."""
        await self.idle()
        charged = {
            "requests": requests,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "concurrency": 0,
        }

        async def shown() -> bool:  # a gateway shows for a moment what it has read before
            return await self.used() == charged

        with suppress(TimeoutError):
            await _until(shown)
        assert await self.used() == charged


async def _until(probe: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(_WITHIN_S):
        while not await probe():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(_POLL_S)
