from __future__ import annotations

import os
import signal
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.embedded_redis import connect
from ratelimit.supervisor.redis import RedisKeeper
from ratelimit.supervisor.tasks import background
from tests.support.waiting import eventually_async


async def test_a_redis_that_was_killed_comes_back_at_its_address_with_its_data(tmp_path: Path) -> None:
    """The limiter's state outlives its server: clients reconnect to the same URL and find what was written."""
    keeper = RedisKeeper(tmp_path / "data", tmp_path / "redis.log")
    url = await keeper.start()
    client: Redis = await connect(url)
    try:
        async with background(keeper.run()):
            await client.config_set("appendfsync", "always")  # so that nothing of the last second is lost
            await client.set("level", "42")
            killed = keeper.pids
            os.kill(killed[0], signal.SIGKILL)

            async def back() -> bool:
                try:
                    return bool(keeper.pids) and keeper.pids != killed and await client.get("level") == b"42"
                except (RedisError, OSError):
                    return False

            await eventually_async(back, 20, "the return of Redis and its data")
            assert keeper.pids != killed
            assert await client.get("level") == b"42"
    finally:
        await client.aclose()
        await keeper.stop()
