from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ratelimit.supervisor.departures import Departures
from ratelimit.supervisor.tasks import background
from serving.fleet import probe_session
from tests.support.waiting import eventually_async


class Engine:
    """An engine's metrics page that tells of one request fewer each time, and what happened around it, in order."""

    def __init__(self, held: int) -> None:
        self.held: Iterator[int] = iter(range(held, -1, -1))
        self.story: list[str] = []

    async def metrics(self, _: web.Request) -> web.Response:
        held = next(self.held, 0)
        self.story.append(f"held {held}")
        return web.Response(text=f'vllm:num_requests_running{{engine="0"}} {held}\n')

    async def published_without(self, urls: Collection[str], timeout_s: float) -> bool:
        self.story.append("published")
        return True

    async def let_go(self, urls: Collection[str]) -> None:
        self.story.append("stopped")


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    made = Engine(held=2)
    app = web.Application()
    app.router.add_get("/metrics", made.metrics)
    async with TestServer(app) as server:
        yield made, str(server.make_url("")).rstrip("/")


async def test_limits_go_first_then_the_open_requests_then_the_process(engine: tuple[Engine, str]) -> None:
    """Scaling down cuts no stream: the engine is stopped when nobody is sent to it and nothing runs on it."""
    made, url = engine

    async def stopped() -> bool:
        return "stopped" in made.story

    async with probe_session() as session:
        departures = Departures(session, made.published_without, made.let_go)
        async with background(departures.run()):
            departures.add([url])
            await eventually_async(stopped, 10, "the engine's stop")

    assert made.story == ["published", "held 2", "held 1", "held 0", "stopped"]


async def test_an_engine_that_cannot_answer_is_stopped_without_waiting() -> None:
    """A dead engine has nothing to drain."""
    made = Engine(held=0)

    async def stopped() -> bool:
        return "stopped" in made.story

    async with probe_session() as session:
        departures = Departures(session, made.published_without, made.let_go)
        async with background(departures.run()):
            departures.add(["http://127.0.0.1:9"])
            await eventually_async(stopped, 10, "the engine's stop")

    assert made.story == ["published", "stopped"]
