"""The breaker before a cell's store: nobody waits for a Redis that is away, and it is found again."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ratelimit.gateway import breaker
from ratelimit.gateway.breaker import GuardedStore, StoreAwayError
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.meter import Admitted, Charge
from ratelimit.store import StoreUnavailableError
from tests.support.limiter import CellLimiter
from tests.support.waiting import eventually_async

CHARGES = (Charge("k:k1:requests", 1, 100, 100),)


class SlowStore(CellLimiter):
    """Answers an admission when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = asyncio.Event()
        self.answered.set()

    async def admit(self, request_id: str, *rest: object, **named: object) -> Admitted:
        """Admit, once it may answer."""
        self._call("admit", request_id)
        await self.answered.wait()
        return Admitted((), ())


@pytest.fixture
async def store() -> SlowStore:
    """A store that answers at once."""
    return SlowStore()


@pytest.fixture
async def guarded(store: SlowStore, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GuardedStore]:
    """The same behind a breaker that probes often."""
    monkeypatch.setattr(breaker, "PROBE_INTERVAL_S", 0.01)
    guarded = GuardedStore(store, "m", 0.05, GatewayMetrics())
    yield guarded
    await guarded.aclose()


def metric(guarded: GuardedStore, name: str) -> float:
    """A metric of the cell."""
    return guarded._metrics.registry.get_sample_value(name, {"cell": "m"}) or 0.0


async def closed(guarded: GuardedStore) -> None:
    """Wait for the breaker to close."""

    async def back() -> bool:
        return not guarded.away

    await eventually_async(back, 10, "the breaker's closing")


@pytest.mark.parametrize("call", ["admit", "extend", "settle", "peek"])
async def test_any_failure_opens_it_and_then_nobody_waits(store: SlowStore, guarded: GuardedStore, call: str) -> None:
    """The call that failed may have reached the store; those after it are known not to have."""
    store.away = StoreUnavailableError("gone")
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "admit": lambda: guarded.admit("1", CHARGES, 1, 1_000),
        "extend": lambda: guarded.extend("1", CHARGES, 1_000),
        "settle": lambda: guarded.settle("1", CHARGES),
        "peek": lambda: guarded.peek(CHARGES),
    }
    with pytest.raises(StoreUnavailableError) as first:
        await calls[call]()
    assert not isinstance(first.value, StoreAwayError)
    asked = len(store.calls)
    for again in calls.values():
        with pytest.raises(StoreAwayError):
            await again()
    assert [name for name, _ in store.calls[asked:] if name != "settle"] == []
    assert metric(guarded, "penstock_store_away") == 1


async def test_a_store_that_does_not_answer_is_away(store: SlowStore, guarded: GuardedStore) -> None:
    """An admission is given up after its timeout."""
    store.answered.clear()
    with pytest.raises(StoreUnavailableError):
        await guarded.admit("1", CHARGES, 1, 1_000)
    assert guarded.away
    await closed(guarded)


async def test_an_answer_that_came_while_the_gateway_was_busy_counts(store: SlowStore, guarded: GuardedStore) -> None:
    """The socket is read before the store is blamed: its answer was there in time, and nobody had looked."""
    redis, gateway = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=gateway)
    store.answered.clear()

    async def answer() -> None:
        await reader.readexactly(1)
        store.answered.set()

    answering = asyncio.create_task(answer())
    asking = asyncio.create_task(guarded.admit("1", CHARGES, 1, 1_000))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    redis.sendall(b"x")
    time.sleep(0.1)  # noqa: ASYNC251 - a busy event loop is what this is about
    assert isinstance(await asking, Admitted)
    await answering
    assert not guarded.away
    redis.close()
    writer.close()
    await writer.wait_closed()


async def test_a_probe_that_writes_closes_it(
    store: SlowStore, guarded: GuardedStore, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log when the store goes, one when it is back, and whoever waits is told."""
    caplog.set_level(logging.INFO)
    store.away = StoreUnavailableError("gone")
    with pytest.raises(StoreUnavailableError):
        await guarded.admit("1", CHARGES, 1, 1_000)
    waiting = asyncio.create_task(guarded.wait_back(10))
    with pytest.raises(StoreAwayError):
        await guarded.admit("2", CHARGES, 1, 1_000)
    store.away = None
    assert await waiting
    await closed(guarded)
    assert isinstance(await guarded.admit("3", CHARGES, 1, 1_000), Admitted)
    assert [line.split(",")[0].split(" after")[0] for line in caplog.messages] == [
        "Redis is away for m",
        "Redis is back for m",
    ]
    assert metric(guarded, "penstock_store_away") == 0
    assert metric(guarded, "penstock_outages_total") == 1
    probes = [request_id for name, request_id in store.calls if name == "settle"]
    assert probes
    assert len(set(probes)) == len(probes)


async def test_waiting_for_it_ends_in_time(guarded: GuardedStore, store: SlowStore) -> None:
    """Nobody waits where it is there, nor for ever where it is not."""
    assert not await guarded.wait_back(10)
    store.away = StoreUnavailableError("gone")
    with pytest.raises(StoreUnavailableError):
        await guarded.settle("1", CHARGES)
    assert await guarded.wait_back(0.001)
