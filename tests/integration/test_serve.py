"""``penstock controller``, in this process, on a Redis that comes late or refuses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from ratelimit.cli.serve import _control
from ratelimit.embedded_redis import redis_server_executable
from ratelimit.leadership import RefusedError
from ratelimit.watch import ConfigWatch
from tests.support.installation import Controller, Installation
from tests.support.servers import Server
from tests.support.waiting import eventually_async

WAIT_S = 20.0
NO_REPLICA = "http://127.0.0.1:2"
USER = 'user penstock on ">right" ~* &* +@all\nuser default on nopass ~* &* +@all\n'


@asynccontextmanager
async def controlling(folder: Path, url: str) -> AsyncIterator[tuple[Installation, asyncio.Task[None]]]:
    installation = Installation(folder, url, [NO_REPLICA], controllers=1, gateways=0)
    task = asyncio.create_task(_control(ConfigWatch(installation.controllers[0].config), url))
    try:
        yield installation, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await installation._http.aclose()


async def status(controller: Controller, path: str) -> int:
    """Of a probe; 0 where nobody answers."""
    async with httpx.AsyncClient() as http:
        try:
            return (await http.get(controller.probe_url + path)).status_code
        except httpx.TransportError:
            return 0


@pytest.mark.slow
async def test_a_controller_waits_for_redis(tmp_path: Path) -> None:
    """It lives and is unready meanwhile, and leads once there is one."""
    server = Server(redis_server_executable())
    with server:
        server.kill()
        async with controlling(tmp_path, server.url) as (installation, task):
            (controller,) = installation.controllers

            async def is_up() -> bool:
                return task.done() or await status(controller, "/live") > 0

            await eventually_async(is_up, WAIT_S, "its port for probes")
            assert not task.done()
            assert await status(controller, "/live") == 200
            assert await status(controller, "/health") == 503
            server.start()

            async def leads() -> bool:
                return await controller.metric("penstock_leader") == 1

            await eventually_async(leads, WAIT_S, "its lead")


async def test_a_redis_that_refuses_ends_the_controller(tmp_path: Path) -> None:
    """With what to check, and without the password."""
    with Server(redis_server_executable(), config=USER) as server:
        url = server.url.replace("unix://", "unix://penstock:wrong@")
        async with controlling(tmp_path, url) as (_, task):
            with pytest.raises(RefusedError, match="password in the URL") as refused:
                async with asyncio.timeout(WAIT_S):
                    await task
    assert "wrong@" not in str(refused.value)
