"""An engine that is started here serves requests of lower priority first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from serving.engine.launch import Engine, all_ready
from tests.support.engines import complete, metric, profile_of, prompt_of, until, virtual_spec

pytestmark = pytest.mark.e2e


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """A slow virtual GPU with room for one sequence."""
    started = await Engine.start(virtual_spec(profile_of(0.02, max_num_seqs=1)), tmp_path)
    try:
        await all_ready([started])
        yield started
    finally:
        await started.stop()


async def test_the_better_priority_is_served_first(engine: Engine) -> None:
    """Of two that wait, the one of lower priority runs first, though it came later."""
    served: list[int] = []
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:

        async def ask(priority: int, tokens: int) -> None:
            await complete(session, engine.url, prompt=prompt_of(8), max_tokens=tokens, priority=priority)
            served.append(priority)

        async def waiting(count: int) -> bool:
            return await metric(session, engine.url, "num_requests_waiting") == count

        async def running() -> bool:
            return await metric(session, engine.url, "num_requests_running") == 1

        tasks.create_task(ask(0, 400))
        await until(running, 20, "the first request's start")
        for count, priority in enumerate((1000, 1), start=1):
            tasks.create_task(ask(priority, 4))
            await until(lambda count=count: waiting(count), 20, f"{count} waiting")  # type: ignore[misc]  # a default
    assert served == [0, 1, 1000]
