"""Fixtures: one gateway process for the run, and a replica, limits and a key for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count

import pytest
from redis.asyncio import Redis

from tests.integration.gateway_bench import Bench
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import GatewayProcess, gateway_settings

#: Far apart, so that a test that publishes several times stays below the next one's.
_EPOCHS = count(1_000, 1_000)


@pytest.fixture(scope="session")
def gateway(redis_url: str) -> Iterator[GatewayProcess]:
    """A gateway with short timeouts and a small body bound, on the session's Redis."""
    with GatewayProcess(gateway_settings(redis_url)) as process:
        yield process


@pytest.fixture
async def bench(gateway: GatewayProcess, redis_client: Redis) -> AsyncIterator[Bench]:
    """The gateway with ample limits in force on one replica."""
    async with FakeUpstream() as upstream:
        made = Bench(gateway, redis_client, upstream, next(_EPOCHS))
        await made.publish()
        yield made
