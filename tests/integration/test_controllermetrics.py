from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest
from redis.asyncio import Redis

from ratelimit import controllermetrics
from ratelimit.controllermetrics import ControllerMetrics, serve_metrics
from ratelimit.groupsupply import Trim
from ratelimit.publication import Publication, PublishedPool
from tests.integration.test_controller import A, B, Knees, config_of, knees, running, urls
from tests.integration.test_discovery_controller import api
from tests.integration.test_discovery_controller import config_of as discovering
from tests.support.kube_api import KubeApi
from tests.support.waiting import eventually, eventually_async

__all__ = ["api", "knees"]  # fixtures that these tests ask for

GPUS = ("H100", "H200")

WAIT_S = 20.0


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def fetched(port: int) -> str:
    """The metrics, as soon as the port answers."""
    async with asyncio.timeout(WAIT_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                    return await response.text()
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)


async def test_the_metrics_are_served_on_their_port_until_cancelled() -> None:
    """Prometheus finds the epoch there; the port is free again afterwards."""
    metrics, port = ControllerMetrics(), free_port()
    metrics.published(Publication(7, "", "", True, (), ()), {})
    serving = asyncio.create_task(serve_metrics(metrics, "127.0.0.1", port))
    try:
        assert "penstock_epoch 7.0" in await fetched(port)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    with closing(socket.socket()) as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


async def test_a_port_that_is_taken_does_not_end_the_controller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and the metrics are there as soon as the port is free."""
    monkeypatch.setattr(controllermetrics, "RETRY_S", 0.01)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serving = asyncio.create_task(serve_metrics(ControllerMetrics(), "127.0.0.1", port))
        await asyncio.to_thread(eventually, lambda: "cannot listen" in caplog.text, WAIT_S, "the word in the log")
    try:
        assert "penstock_failed_rounds_total 0.0" in await fetched(port)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert caplog.text.count("cannot listen") == 1


async def test_probes_are_answered_beside_the_metrics() -> None:
    """Unready until Redis has answered, and then ready; alive all the time; each says why not."""
    metrics, port = ControllerMetrics(), free_port()
    serving = asyncio.create_task(serve_metrics(metrics, "127.0.0.1", port))
    try:
        await fetched(port)
        assert await probed(port, "/health") == (503, {"ready": False, "why": "Redis does not answer"})
        metrics.health.lease_asked(answered=True)
        assert await probed(port, "/health") == (200, {"ready": True})
        assert await probed(port, "/live") == (200, {"live": True})
        metrics.leads()
        metrics.round_ended(good=False)
        assert await probed(port, "/health") == (503, {"ready": False, "why": "the last round failed"})
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def probed(port: int, path: str) -> tuple[int, object]:
    async with (
        asyncio.timeout(WAIT_S),
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return response.status, await response.json()


def test_a_standby_tells_of_no_fleet(publication_of_one_pool: Publication) -> None:
    """What a leader has told of is gone when another leads, so that sums over controllers stay true."""
    metrics = ControllerMetrics()
    metrics.leads()
    metrics.published(publication_of_one_pool, {})
    assert metrics.registry.get_sample_value("penstock_leader") == 1
    assert metrics.registry.get_sample_value("penstock_replicas", {"model": "m"}) == 0

    metrics.stands_by()
    assert metrics.registry.get_sample_value("penstock_leader") == 0
    assert metrics.registry.get_sample_value("penstock_leader_changes_total") == 2
    assert metrics.registry.get_sample_value("penstock_replicas", {"model": "m"}) is None
    assert metrics.registry.get_sample_value("penstock_epoch") == 0


async def test_nothing_is_served_without_a_port() -> None:
    """The default: the controller listens nowhere."""
    serving = asyncio.create_task(serve_metrics(ControllerMetrics(), "127.0.0.1", None))
    await asyncio.sleep(0)
    assert not serving.done()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


def test_a_trim_is_shown_by_model(publication_of_one_pool: Publication) -> None:
    """The gauge is the factor; 1 where nothing is trimmed, so that an alert can compare it."""
    metrics = ControllerMetrics()

    metrics.published(publication_of_one_pool, {"m": Trim(0.75, "slow")})
    assert metrics.registry.get_sample_value("penstock_supply_trim", {"model": "m"}) == 0.75

    metrics.published(publication_of_one_pool, {})
    assert metrics.registry.get_sample_value("penstock_supply_trim", {"model": "m"}) == 1


@pytest.fixture
def publication_of_one_pool() -> Publication:
    """A pool without replicas."""
    pool = PublishedPool("m", (), (), 4096, 1.0, 100, 0, 0, 0.0, 0.0, 0.0, "")
    return Publication(1, "", "", True, (pool,), ())


async def test_what_autoscaling_needs_is_told_of_the_fleet(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """How many replicas count, what one more adds, and the health of all that are watched; a loss is told at once."""

    def told(name: str, **labels: str) -> float | None:
        return stack.controller.metrics.registry.get_sample_value(name, {"model": "m", **labels})

    def counting(replicas: int) -> Callable[[], Awaitable[bool]]:
        async def probe() -> bool:
            return told("penstock_fleet_replicas", gpu="H100") == replicas

        return probe

    async with running(config_of(tmp_path), redis_client) as stack:
        await stack.until(lambda p: urls(p) == {A, B})
        await eventually_async(counting(2), WAIT_S, "both")
        adds = told("penstock_replica_adds_requests_per_second", gpu="H100")
        usable = told("penstock_usable_requests_per_second")
        assert adds
        assert usable == pytest.approx(2 * adds, rel=1e-3)
        assert told("penstock_watched_replicas", gpu="H100", phase="healthy") == 2

        stack.fleet.turn(A, "down")
        await stack.until(lambda p: urls(p) == {B})
        await eventually_async(counting(1), WAIT_S, "the loss")
        assert told("penstock_watched_replicas", gpu="H100", phase="down") == 1
        assert told("penstock_usable_requests_per_second") == pytest.approx(adds, rel=1e-3)

        stack.fleet.turn(B, "down")
        await stack.until(lambda p: urls(p) == set())
        await eventually_async(counting(0), WAIT_S, "the end")
        assert told("penstock_replica_adds_requests_per_second", gpu="H100") == pytest.approx(adds, rel=1e-3)


async def test_a_fleet_may_be_scaled_from_none(redis_client: Redis, tmp_path: Path, knees: Knees, api: KubeApi) -> None:
    """What a first replica would add is told of every GPU type that may be discovered, also where none ever was."""
    api.remove("h100")
    async with running(discovering(tmp_path), redis_client) as stack:
        value = stack.controller.metrics.registry.get_sample_value

        async def told() -> bool:
            adds = [value("penstock_replica_adds_requests_per_second", {"model": "m", "gpu": g}) for g in GPUS]
            return all(adds)

        await eventually_async(told, WAIT_S, "what one of each would add")
        assert [value("penstock_fleet_replicas", {"model": "m", "gpu": gpu}) for gpu in GPUS] == [0, 0]
        assert value("penstock_usable_requests_per_second", {"model": "m"}) == 0
