from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import cast

import aiohttp
import pytest
from aiohttp import web

from serving import fleet as fleet_module
from serving.fleet import Fleet, ReplicaSpec, ReplicaStatus, open_all_files, probe_session
from serving.health import Observation

WAIT_S = 20.0


class FakeReplica:
    """A vLLM server as a probe sees it: healthy, with the metrics of the moment."""

    url = ""
    generated = 0
    kv_usage = 0.25
    held = 1
    odd_metrics = ""
    load = '{"server_load": 0}'
    silent_for = 0

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            text=self.odd_metrics + f'vllm:num_requests_running{{engine="0"}} {self.held}\n'
            f'vllm:generation_tokens_total{{engine="0"}} {self.generated}\n'
            f'vllm:kv_cache_usage_perc{{engine="0"}} {self.kv_usage}\n'
        )

    async def healthy(self, _request: web.Request) -> web.Response:
        if self.silent_for > 0:
            self.silent_for -= 1
            await asyncio.Event().wait()
        return web.Response()

    async def server_load(self, _request: web.Request) -> web.Response:
        return web.Response(text=self.load)


@pytest.fixture
async def replica(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeReplica]:
    """A fake replica that listens on a port of its own, and is probed often."""
    monkeypatch.setattr(fleet_module, "PROBE_INTERVAL_S", 0.02)
    fake, app = FakeReplica(), web.Application()
    app.router.add_get("/health", fake.healthy)
    app.router.add_get("/metrics", fake.metrics)
    app.router.add_get("/load", fake.server_load)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
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


@pytest.mark.parametrize(
    "odd",
    [
        {"odd_metrics": 'vllm:num_requests_running{engine="0"}\n'},
        {"odd_metrics": "vllm:num_requests_running many\n"},
        {"odd_metrics": "#" * (fleet_module.MOST_ANSWER_BYTES + 1)},
        {"load": '{"server_load": [1]}'},
        {"load": "[" * 10_000},
    ],
)
async def test_an_answer_that_nobody_understands_is_a_refusal_and_the_probes_go_on(
    replica: FakeReplica, fleet: tuple[Fleet, Changes], odd: dict[str, str]
) -> None:
    """Whatever a replica answers, a start does not wait for it for ever, and its health stays that of now."""
    watching, changes = fleet
    usual = {name: getattr(replica, name) for name in odd}
    vars(replica).update(odd)
    watching.watch([spec_of(replica.url)])
    await asyncio.wait_for(watching.probed_once(), WAIT_S)
    assert watching.statuses()[replica.url].health.phase == "starting"

    vars(replica).update(usual)
    assert await changes.next() == "healthy"
    vars(replica).update(odd)
    assert await changes.next() == "down"


async def test_what_nobody_foresaw_is_counted_and_a_refusal(
    replica: FakeReplica,
    fleet: tuple[Fleet, Changes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No exception ends the probes of a replica; the log says each type once."""
    watching, changes = fleet
    times = iter(range(2))

    def failing(_exposition: str, _at_s: float) -> None:
        if next(times, None) is not None:
            raise LookupError("a defect")

    monkeypatch.setattr(fleet_module, "read_counters", failing)
    with caplog.at_level(logging.ERROR, "serving.fleet"):
        watching.watch([spec_of(replica.url)])
        assert await changes.next() == "healthy"

    assert watching.unforeseen == {"LookupError": 2}
    assert caplog.text.count("failed by LookupError") == 1


@pytest.mark.parametrize(("silences", "phase"), [(1, "healthy"), (2, "starting")])
async def test_one_silent_probe_is_no_answer(
    replica: FakeReplica, monkeypatch: pytest.MonkeyPatch, silences: int, phase: str
) -> None:
    """One packet that is lost as a leader starts takes no replica out of its first limits; a second one does."""
    replica.silent_for = silences
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.3)) as session:
        watching = Fleet(session, lambda _status: None)
        watching.watch([spec_of(replica.url)])
        await asyncio.wait_for(watching.probed_once(), WAIT_S)
        assert watching.statuses()[replica.url].health.phase == phase
        watching.watch(())


class Looked(Fleet):
    """A fleet that is looked at as the test says."""

    def __init__(self, looks: Callable[[str], Awaitable[Observation]]) -> None:
        super().__init__(cast("aiohttp.ClientSession", None), lambda _status: None)
        self.looks = looks

    async def _look_at(self, url: str) -> Observation:
        return await self.looks(url)


async def test_probes_are_bounded_and_a_large_fleet_is_found_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many replicas a controller starts with, no more are probed at a time than it can follow."""
    monkeypatch.setattr(fleet_module, "MOST_PROBES", 3)
    now, most = 0, 0

    async def look(_url: str) -> Observation:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return Observation(monotonic(), "healthy")

    watching = Looked(look)
    watching.watch([spec_of(f"http://r{i}") for i in range(50)])
    await asyncio.wait_for(watching.probed_once(), WAIT_S)

    assert most == 3
    assert {each.health.phase for each in watching.statuses().values()} == {"healthy"}
    watching.watch(())


async def test_replicas_that_hang_hold_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were silent have places of their own: a rack that hangs must not slow what is told of all others."""
    monkeypatch.setattr(fleet_module, "MOST_PROBES", 1)
    monkeypatch.setattr(fleet_module, "PROBE_INTERVAL_S", 0.001)
    hung, looks, seen = iter([TimeoutError]), 0, asyncio.Event()

    async def look(url: str) -> Observation:
        nonlocal looks
        if url == "http://hung":
            if error := next(hung, None):
                raise error
            await asyncio.Event().wait()
        looks += 1
        if looks == 20:
            seen.set()
        return Observation(monotonic(), "healthy")

    watching = Looked(look)
    watching.watch([spec_of("http://hung"), spec_of("http://well")])
    await asyncio.wait_for(seen.wait(), WAIT_S)
    watching.watch(())


def test_a_controller_may_open_a_connection_to_each_replica() -> None:
    """The usual soft limit of open files would make every replica after the thousandth look as if it refused."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 1024), before[1]))
        open_all_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
