"""Redis is stopped, slow, killed or put back in time under two gateways at full load: who is served meanwhile, and
whether what Redis, its usage stream and the gateways say was charged agrees afterwards.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from ratelimit.embedded_redis import redis_server_executable
from ratelimit.gateway.limits_route import key_charges
from ratelimit.gateway.settings import GatewaySettings
from ratelimit.gateway.terms import TermsBook
from ratelimit.publication import LimitRule
from ratelimit.publisher import KEYS_KEY
from ratelimit.store import Store
from tests.support.books import balance, end_leases, ledger, open_reservations, pool_work_us, twice
from tests.support.callers import Load
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings, make_key, publication, publish
from tests.support.servers import Server
from tests.support.slow_replica import SlowReplica
from tests.support.stack import metric
from tests.support.waiting import eventually, eventually_async

#: Whole gateways under load, by the second.
pytestmark = pytest.mark.slow

CALLERS, OUTPUT, TOKEN_S = 24, 8, 0.01
#: Output tokens of the key, a minute and at once: about what the callers want, or far less.
ENOUGH, TIGHT = (60_000, 2_000), (12_000, 200)
#: Two gateways' parts of the limits, as ``outage`` has it.
SAFE_SHARE = 0.8
WITHIN_S = 10.0


def chat(stream: bool) -> dict[str, Any]:
    """A chat request's body; its prompt is 11 tokens long on the stand-in replica."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x" * 44}],
        "max_tokens": OUTPUT,
        "stream": stream,
    }


class Pair:
    """Two gateways on one port, and the Redis that is theirs alone."""

    def __init__(self, server: Server, gateways: tuple[GatewayProcess, GatewayProcess]) -> None:
        self.server = server
        self.gateways = gateways
        self.url = gateways[0].url
        self.epoch = 0

    def total(self, name: str, /, **labels: str) -> float:
        """A metric of both."""
        return sum(metric(gateway.metrics(), name, **labels) for gateway in self.gateways)

    def each(self, name: str, /, **labels: str) -> list[float]:
        """A metric of each."""
        return [metric(gateway.metrics(), name, **labels) for gateway in self.gateways]

    def told(self) -> str:
        """What they have logged."""
        return "".join(gateway.log() for gateway in self.gateways)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two gateways that have counted each other."""
    with Server(redis_server_executable()) as server, GatewayProcess(settings_of(server)) as first:
        # Its ports are taken by now, so the other finds others.
        other = msgspec.structs.replace(settings_of(server), port=first.settings.port)
        with GatewayProcess(other) as second:
            made = Pair(server, (first, second))
            eventually(lambda: made.each("penstock_gateways") == [2, 2], WITHIN_S, "the gateways' counting")
            yield made


def settings_of(server: Server) -> GatewaySettings:
    """A gateway that is less patient with Redis than the others of the tests."""
    return msgspec.structs.replace(gateway_settings(server.url), store_timeout_s=0.3, lease_s=5.0)


class Scene:
    """A key whose callers want more than it may have, on two gateways and a replica."""

    def __init__(self, pair: Pair, redis: Redis, replica: SlowReplica, limit: tuple[int, int]) -> None:
        self.pair = pair
        self.redis = redis
        self.replica = replica
        self.burst = limit[1]
        self.secret, self.record = make_key()
        pair.epoch += 1
        rules = [LimitRule("output_tokens", 10**9, "key", "5h")]  # does not leak, so it tells all that was charged
        self.published = publication([replica.url], pair.epoch, pool_budget=(1, 1), output_tokens=limit, rules=rules)

    async def publish(self) -> None:
        """Put the limits in force on both gateways, as the controller does, also in a Redis that lost them."""
        await self.redis.hset(KEYS_KEY, self.record.digest, msgspec.json.encode(self.record).decode())
        await publish(self.redis, self.published, self.record)  # the limits after the keys: who knows them knows both

    async def in_force(self) -> bool:
        """Whether both gateways have read the limits, and say what they would give out without Redis."""
        shown = await asyncio.to_thread(self.pair.each, "penstock_local_bound", name="output_tokens", per="burst")
        return shown == [SAFE_SHARE * self.burst / 2] * 2 and {
            await asyncio.to_thread(gateway.epoch) for gateway in self.pair.gateways
        } == {self.pair.epoch}

    def load(self) -> Load:
        """Callers who stream, and as many who do not."""
        return Load(self.pair.url, self.secret, CALLERS, chat(stream=True), chat(stream=False))

    async def answered(self, load: Load, more: int, status: int = 200) -> None:
        """Wait until so many more got an answer of this status."""
        until = load.statuses[status] + more

        async def enough() -> bool:
            return load.statuses[status] >= until

        await eventually_async(enough, WITHIN_S, f"{more} more of {status}")

    async def away(self) -> list[float]:
        """For each gateway 1 while it does without Redis."""
        return await asyncio.to_thread(self.pair.each, "penstock_store_away")

    async def back(self) -> bool:
        """Whether both gateways ask Redis."""
        return await self.away() == [0, 0]

    async def disagreements(self) -> list[str]:
        """Where the accounts differ, once nothing is open: what Redis has charged, its usage stream, the gateways."""
        lines = await ledger(self.redis)
        terms = TermsBook(self.published).find(self.record.id, self.record.org, self.record.tier, MODEL)
        assert terms is not None
        readings = await Store(self.redis, MODEL, timeout_s=5).peek(key_charges(self.record, terms))
        charged = {reading.bucket.rpartition(":")[2]: reading.used for reading in readings}
        told = {
            "requests": sum(line.outcome != "unserved" for line in lines),
            "input_tokens": sum(line.input_tokens for line in lines),
            "output_tokens": charged["output_tokens"],  # it leaks; the one below does not
            "concurrency": 0,
            "output_tokens.5h": sum(line.output_tokens for line in lines),
        }
        found = [] if charged == told else [f"Redis has charged {charged}, its usage stream says {told}"]
        work_us, cost_us = await pool_work_us(self.redis, self.published), sum(line.cost_us for line in lines)
        found += [] if work_us == cost_us else [f"the pool is charged {work_us} µs, of {cost_us} in the stream"]
        found += [f"more than one record of {request_id}" for request_id in twice(lines)]
        found += [f"{count} reservations are open" for count in [await open_reservations(self.redis)] if count]
        for kind in ("input", "output"):
            account = await asyncio.to_thread(balance, self.pair.gateways, kind)
            found += [f"the gateways do not balance: {kind} {account}"] if account.open else []
        return found

    async def agree(self) -> None:
        """Wait until the accounts agree; they do as soon as what waited for Redis has been told."""
        found: list[str] = []

        async def agreed() -> bool:
            found[:] = await self.disagreements()
            return not found

        try:
            await eventually_async(agreed, WITHIN_S, "the accounts' agreement")
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(found)) from None


@pytest.fixture
async def scene(pair: Pair, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    """A new key, known to both gateways, in an empty Redis; whatever happens, neither gateway has failed."""
    async with Redis.from_url(pair.server.url) as redis, SlowReplica(TOKEN_S) as replica:
        await redis.flushall()
        made = Scene(pair, redis, replica, getattr(request, "param", ENOUGH))
        await made.publish()
        await eventually_async(made.in_force, WITHIN_S, "the limits' coming into force")
        yield made
        assert "Traceback" not in pair.told()


@pytest.mark.parametrize("scene", [TIGHT], indirect=True)
@pytest.mark.parametrize("stopped_s", [2.5, 20])
async def test_redis_stopped_under_load(scene: Scene, stopped_s: float) -> None:
    """Nobody gets an answer that a client could not live with; what is admitted meanwhile is within the bound that the
    metric tells; both gateways are back within 2 s, and all that was served is charged.
    """
    pair, replica = scene.pair, scene.replica
    at_once = pair.total("penstock_local_bound", name="output_tokens", per="burst")
    a_minute = pair.total("penstock_local_bound", name="output_tokens", per="minute")
    alone = pair.total("penstock_local_decisions_total", answer="admitted")
    outages = pair.each("penstock_outages_total")
    async with scene.load() as load:
        await scene.answered(load, CALLERS)
        stopped_at, said = time.monotonic(), sum(replica.emitted.values())
        pair.server.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(stopped_s)
            said = sum(replica.emitted.values()) - said
            away = await scene.away()
        finally:
            pair.server.signal(signal.SIGCONT)
        elapsed_s, returned_at = time.monotonic() - stopped_at, time.monotonic()
        await eventually_async(scene.back, WITHIN_S, "the gateways' return")
        back_s = time.monotonic() - returned_at
        await scene.answered(load, CALLERS, 429)  # which only Redis says
    bound = at_once + a_minute / 60 * elapsed_s
    alone = pair.total("penstock_local_decisions_total", answer="admitted") - alone
    assert load.complaints == []
    assert load.statuses.keys() == {200, 429, 503}
    assert away == [1, 1]
    assert bound / 2 <= alone * OUTPUT <= at_once + a_minute / 60 * (elapsed_s + back_s)
    assert said <= bound + CALLERS * OUTPUT  # and what was open when it stopped
    assert back_s <= 2 * 2  # twice what is claimed: the machine may be busy
    assert [now - before for now, before in zip(pair.each("penstock_outages_total"), outages, strict=True)] == [1, 1]
    await scene.agree()


async def test_redis_that_stutters(scene: Scene) -> None:
    """Pauses shorter and longer than a gateway's patience, one after the other: nothing is lost and nothing doubled."""
    async with scene.load() as load:
        for pause_s in (0.1, 0.6) * 3:
            await scene.answered(load, 5)
            scene.pair.server.signal(signal.SIGSTOP)
            await asyncio.sleep(pause_s)
            scene.pair.server.signal(signal.SIGCONT)
        await eventually_async(scene.back, WITHIN_S, "the gateways' return")
        await scene.answered(load, CALLERS)
    assert load.complaints == []
    await scene.agree()


async def test_redis_restarted_empty(scene: Scene) -> None:
    """A Redis that lost everything is charged what its gateways settle from then on; nobody is turned away for a key
    that it does not know until the controller has published again, and no place in flight is lost or taken twice.
    """
    server = scene.pair.server
    async with scene.load() as load:
        await scene.answered(load, CALLERS)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await eventually_async(scene.back, WITHIN_S, "the gateways' return")
        await scene.answered(load, CALLERS)
        await scene.publish()
        await scene.answered(load, CALLERS)
    assert load.complaints == []
    await scene.agree()


async def test_redis_that_lost_its_last_writes(scene: Scene) -> None:
    """A Redis that comes back as it was a while ago: what it still holds open ends with its lease, with a record, what
    it never heard of is charged when it is settled, and what it forgot is in neither of its accounts.
    """
    server = scene.pair.server
    async with scene.load() as load:
        await scene.answered(load, CALLERS)
        await scene.redis.save()
        await scene.answered(load, CALLERS)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await eventually_async(scene.back, WITHIN_S, "the gateways' return")
        await scene.answered(load, CALLERS)
    assert load.complaints == []
    expired = await end_leases(scene.redis)
    lines = await ledger(scene.redis)
    assert sum(line.outcome == "expired" for line in lines) == expired > 0
    await scene.agree()
