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
from ratelimit.link import LinkOverloadedError
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
    guarded = GuardedStore(store, "m", 0.05, GatewayMetrics(), asyncio.Semaphore(2))
    yield guarded
    await guarded.aclose()


def metric(guarded: GuardedStore, name: str) -> float:
    """A metric of the cell."""
    return guarded._metrics.registry.get_sample_value(name, {"cell": "m"}) or 0.0


def every_call(guarded: GuardedStore) -> dict[str, Callable[[], Awaitable[object]]]:
    """Each call by its name."""
    return {
        "admit": lambda: guarded.admit("1", CHARGES, 1, 1_000),
        "extend": lambda: guarded.extend("1", CHARGES, 1_000),
        "settle": lambda: guarded.settle("1", CHARGES),
        "peek": lambda: guarded.peek(CHARGES),
    }


async def closed(guarded: GuardedStore) -> None:
    """Wait for the breaker to close."""

    async def back() -> bool:
        return not guarded.away

    await eventually_async(back, 10, "the breaker's closing")


@pytest.mark.parametrize("call", ["admit", "extend", "settle", "peek"])
async def test_any_failure_opens_it_and_then_nobody_waits(store: SlowStore, guarded: GuardedStore, call: str) -> None:
    """The call that failed may have reached the store; those after it are known not to have."""
    store.away = StoreUnavailableError("gone")
    calls = every_call(guarded)
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
    await asyncio.sleep(0)
    assert ("settle", store.calls[-1][1]) == store.calls[-1]
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


class BusyStore(CellLimiter):
    """Settles when the test says so; counts those under way."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = asyncio.Event()
        self.under_way = 0
        self.most_under_way = 0

    async def settle(self, request_id: str, *rest: object, **named: object) -> bool:
        """Settle, once it may answer."""
        self._call("settle", request_id)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await self.answered.wait()
        self.under_way -= 1
        return True


async def test_settlements_beyond_what_the_link_takes_wait_their_turn() -> None:
    """A crowd that settles in one tick is no reason to think that Redis is away."""
    store = BusyStore()
    guarded = GuardedStore(store, "m", 0.05, GatewayMetrics(), asyncio.Semaphore(2))
    settling = [asyncio.create_task(guarded.settle(str(number), CHARGES)) for number in range(20)]

    async def under_way() -> bool:
        return store.under_way == 2

    await eventually_async(under_way, 10, "the first settlements")
    store.answered.set()
    assert all(await asyncio.gather(*settling))
    assert (store.most_under_way, guarded.away) == (2, False)


@pytest.mark.parametrize(("call", "opens"), [("admit", True), ("extend", False), ("settle", False), ("peek", False)])
async def test_a_full_link_opens_it_to_admissions_only(
    store: SlowStore, guarded: GuardedStore, call: str, opens: bool
) -> None:
    """What no request waits for is tried again; it was not sent, so it is as if the store had not been asked."""
    store.away = StoreUnavailableError("full")
    store.away.__cause__ = LinkOverloadedError("4096 commands wait")
    with pytest.raises(StoreUnavailableError) as raised:
        await every_call(guarded)[call]()
    assert guarded.away == opens
    assert isinstance(raised.value, StoreAwayError) != opens


async def test_a_settlement_answered_while_the_gateway_was_busy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no request waits for has the same patience: an answer in the socket is read before the store is blamed."""
    monkeypatch.setattr(breaker, "BACKGROUND_TIMEOUT_S", 0.05)
    store = BusyStore()
    guarded = GuardedStore(store, "m", 0.05, GatewayMetrics(), asyncio.Semaphore(2))
    redis, gateway = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=gateway)

    async def answer() -> None:
        await reader.readexactly(1)
        store.answered.set()

    answering = asyncio.create_task(answer())
    settling = asyncio.create_task(guarded.settle("1", CHARGES))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    redis.sendall(b"x")
    time.sleep(0.1)  # noqa: ASYNC251 - a busy event loop is what this is about
    assert await settling
    await answering
    assert not guarded.away
    redis.close()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("call", ["admit", "settle"])
async def test_what_a_standstill_kept_from_being_sent_has_its_time_afterwards(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The store is asked only after the event loop has stood still, and answers a while later: it is there."""
    monkeypatch.setattr(breaker, "BACKGROUND_TIMEOUT_S", 0.2)
    redis, gateway = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=gateway)
    echo_reader, echo_writer = await asyncio.open_connection(sock=redis)

    class Distant(CellLimiter):
        """Asked over a socket."""

        async def _ask(self) -> None:
            await asyncio.sleep(0)  # a link writes at the end of the turn
            writer.write(b"x")
            await reader.readexactly(1)

        async def admit(self, *_: object, **__: object) -> Admitted:
            await self._ask()
            return Admitted((), ())

        async def settle(self, *_: object, **__: object) -> bool:
            await self._ask()
            return True

    async def echo() -> None:
        for _ in range(20):
            await asyncio.sleep(0)  # more than the passes
        echo_writer.write(await echo_reader.readexactly(1))

    guarded = GuardedStore(Distant(), "m", 0.2, GatewayMetrics(), asyncio.Semaphore(2))
    asking = asyncio.ensure_future(every_call(guarded)[call]())
    await asyncio.sleep(0)
    echoing = asyncio.create_task(echo())
    time.sleep(0.22)  # noqa: ASYNC251 - a busy event loop is what this is about
    assert await asking
    await echoing
    assert not guarded.away
    for end in (writer, echo_writer):
        end.close()
        await end.wait_closed()


async def test_a_settlement_without_an_answer_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patience ends: a store that does not answer is away, and those who wait for a turn are told at once."""
    monkeypatch.setattr(breaker, "BACKGROUND_TIMEOUT_S", 0.05)
    guarded = GuardedStore(BusyStore(), "m", 0.05, GatewayMetrics(), asyncio.Semaphore(1))
    raised = await asyncio.gather(
        *(guarded.settle(str(number), CHARGES) for number in range(5)), return_exceptions=True
    )
    assert [type(error) for error in raised] == [StoreUnavailableError, *4 * [StoreAwayError]]
    assert guarded.away
    await guarded.aclose()


async def test_the_first_probe_is_sent_at_once(store: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hiccup does not cost the pause between two probes."""
    monkeypatch.setattr(breaker, "PROBE_INTERVAL_S", 3_600)
    guarded = GuardedStore(store, "m", 0.05, GatewayMetrics(), asyncio.Semaphore(1))
    store.away = StoreUnavailableError("gone")
    with pytest.raises(StoreUnavailableError):
        await guarded.admit("1", CHARGES, 1, 1_000)
    store.away = None
    await closed(guarded)
    await guarded.aclose()
