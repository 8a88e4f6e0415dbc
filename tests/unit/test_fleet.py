from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from serving.fleet import Fleet, ReplicaSpec, ReplicaStatus, probe_session

WAIT_S = 20.0


class FakeReplica:
    """A vLLM server as a probe sees it: healthy, with the metrics of the moment."""

    url = ""
    generated = 0
    kv_usage = 0.25
    held = 1

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {self.held}\n'
            f'vllm:generation_tokens_total{{engine="0"}} {self.generated}\n'
            f'vllm:kv_cache_usage_perc{{engine="0"}} {self.kv_usage}\n'
        )

    async def healthy(self, _request: web.Request) -> web.Response:
        return web.Response()


@pytest.fixture
async def replica() -> AsyncIterator[FakeReplica]:
    """A fake replica that listens on a port of its own."""
    fake, app = FakeReplica(), web.Application()
    app.router.add_get("/health", fake.healthy)
    app.router.add_get("/metrics", fake.metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


class Changes:
    """The phases a fleet reports, and a way to wait for one."""

    def __init__(self) -> None:
        self._seen: asyncio.Queue[str] = asyncio.Queue()

    def note(self, status: ReplicaStatus) -> None:
        self._seen.put_nowait(status.health.phase)

    async def next(self) -> str:
        return await asyncio.wait_for(self._seen.get(), WAIT_S)


@pytest.fixture
async def fleet() -> AsyncIterator[tuple[Fleet, Changes]]:
    """A fleet that watches nothing yet, and its changes."""
    changes = Changes()
    async with probe_session() as session:
        watching = Fleet(session, changes.note)
        yield watching, changes
        watching.watch(())


def spec_of(url: str, **changed: object) -> ReplicaSpec:
    fields: dict[str, object] = {"model": "m", "gpu": "H100", "profile": "p", "slowdown": 1.0, "stuck_after_s": 60.0}
    return ReplicaSpec(url=url, **(fields | changed))  # type: ignore[arg-type]  # the names above are the struct's


async def test_chunks_of_a_long_prompt_are_progress(replica: FakeReplica, fleet: tuple[Fleet, Changes]) -> None:
    """While no token counter moves, a KV cache that fills shows that steps end, so a stuck replica is freed by it."""
    watching, changes = fleet
    watching.watch([spec_of(replica.url, stuck_after_s=0.1)])
    assert [await changes.next(), await changes.next()] == ["healthy", "stuck"]

    replica.kv_usage += 0.01

    assert await changes.next() == "healthy"


async def test_the_log_says_after_which_time_a_replica_counts_as_stuck(
    replica: FakeReplica, fleet: tuple[Fleet, Changes], caplog: pytest.LogCaptureFixture
) -> None:
    """The time in force may be longer than the configured one, so it is stated where it took effect."""
    watching, changes = fleet
    with caplog.at_level(logging.WARNING, "serving.fleet"):
        watching.watch([spec_of(replica.url, stuck_after_s=0.125)])
        while await changes.next() != "stuck":
            pass

    assert "no step ended for 0.125 s" in caplog.text


@pytest.mark.parametrize("changed", [{"model": "n"}, {"gpu": "H200"}, {"profile": "q"}, {"slowdown": 2.0}])
async def test_another_engine_at_a_known_url_starts_anew(
    replica: FakeReplica, fleet: tuple[Fleet, Changes], changed: dict[str, object]
) -> None:
    """The health of what was at the URL before says nothing of what comes after it."""
    watching, changes = fleet
    watching.watch([spec_of(replica.url)])
    assert await changes.next() == "healthy"

    watching.watch([spec_of(replica.url, **changed)])

    assert watching.statuses()[replica.url].health.phase == "starting"
    assert await changes.next() == "healthy"


async def test_a_replica_that_is_taken_off_and_put_back_is_one_that_flaps(
    replica: FakeReplica, fleet: tuple[Fleet, Changes]
) -> None:
    """Its losses are remembered, so that it counts later each time; those of another engine at its URL are not."""
    watching, changes = fleet
    for _ in range(3):
        watching.watch([spec_of(replica.url)])
        assert await changes.next() == "healthy"
        watching.watch(())
    watching.watch([spec_of(replica.url, domain="node-1")])
    assert await changes.next() == "healthy"
    assert watching.statuses()[replica.url].health.losses == 3

    watching.watch(())
    watching.watch([spec_of(replica.url, gpu="H200")])
    assert watching.statuses()[replica.url].health.losses == 0


async def test_a_replica_watched_in_another_way_keeps_its_health(
    replica: FakeReplica, fleet: tuple[Fleet, Changes]
) -> None:
    """A changed stuck_after_s, or a node that is told later, is no reason to doubt a healthy replica."""
    watching, changes = fleet
    watching.watch([spec_of(replica.url)])
    assert await changes.next() == "healthy"

    watching.watch([spec_of(replica.url, stuck_after_s=90.0, domain="node-1")])

    status = watching.statuses()[replica.url]
    assert (status.health.phase, status.spec.stuck_after_s) == ("healthy", 90.0)
