"""Fixtures: one real Redis for the whole run, on a Unix socket, emptied before each test that asks for it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.embedded_redis import redis_server_executable
from serving.engine.guard import GuardedProcess

START_TIMEOUT_S = 30.0


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a Redis that lives as long as the test run and keeps nothing on disk."""
    with tempfile.TemporaryDirectory(prefix="pn-test-") as folder:
        socket = Path(folder) / "redis.sock"
        argv = [redis_server_executable(), "--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", ""]
        server = GuardedProcess.start(argv, log_path=Path(folder) / "redis.log")
        try:
            _wait_until_it_answers(socket, server)
            yield f"unix://{socket}"
        finally:
            asyncio.run(server.stop())


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    """A client of the session's Redis, which is empty when the test begins."""
    async with Redis.from_url(redis_url) as client:
        await client.flushall()
        yield client


def _wait_until_it_answers(socket: Path, server: GuardedProcess) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while True:
            try:
                client.ping()
            except RedisConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the tests' Redis does not answer:\n{server.log_tail()}") from None
                time.sleep(0.02)
            else:
                return
