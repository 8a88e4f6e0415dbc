"""The store on a real Redis: many callers at once, its own clock, and what happens when Redis is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from ratelimit.meter import MINUTE_US, Admitted, Charge, Denied, Reading
from ratelimit.store import MOST_REAPED, Store, StoreUnavailableError, script
from tests.support.clocked_store import ClockedStore

LEASE_MS = 60_000
SCRIPTS = ("admit", "extend", "settle", "reap", "peek")


@pytest.fixture
async def stores(redis_url: str, redis_client: Redis) -> AsyncIterator[tuple[Store, Store]]:
    """Two stores of one cell on connections of their own, as two gateways have."""
    async with Redis.from_url(redis_url) as first, Redis.from_url(redis_url) as second:
        yield Store(first, "c", timeout_s=30), Store(second, "c", timeout_s=30)


async def redis_now_us(client: Redis) -> int:
    seconds, rest = await client.time()
    return int(seconds) * 1_000_000 + int(rest)


class TestManyAtOnce:
    """Decisions that race."""

    async def test_never_more_than_burst_and_rate(self, stores: tuple[Store, Store], redis_client: Redis) -> None:
        """Of 200 concurrent requests through two gateways no more pass than burst + rate × time, and no fewer."""
        charge = Charge("k:a:output_tokens", 30, 1_000, 6_000)
        in_flight = Charge("k:a:concurrency", 1, 1_000, 0)
        before_us = await redis_now_us(redis_client)
        answers = await asyncio.gather(
            *(stores[i % 2].admit(f"r{i}", [charge, in_flight], 1, LEASE_MS) for i in range(200))
        )
        elapsed_us = await redis_now_us(redis_client) - before_us
        admitted = sum(isinstance(answer, Admitted) for answer in answers)
        assert admitted >= charge.capacity // charge.cost
        assert admitted * charge.cost * MINUTE_US <= charge.capacity * MINUTE_US + charge.rate * elapsed_us
        assert (await stores[0].peek([in_flight]))[0].used == admitted

    async def test_settlements_balance(self, stores: tuple[Store, Store]) -> None:
        """Concurrent extensions and repeated settlements leave exactly what was used, and nothing in flight."""
        charge = Charge("k:a:output_tokens", 50, 1_000_000, 1)
        in_flight = Charge("k:a:concurrency", 1, 1_000, 0)

        async def one(i: int) -> None:
            store = stores[i % 2]
            assert isinstance(await store.admit(f"r{i}", [charge, in_flight], 1, LEASE_MS), Admitted)
            await store.extend(f"r{i}", [charge.costing(60 + i)], LEASE_MS)
            settled = await asyncio.gather(*(s.settle(f"r{i}", [charge.costing(i)]) for s in stores))
            assert sorted(settled) == [False, True]

        await asyncio.gather(*(one(i) for i in range(100)))
        tokens, flight = await stores[1].peek([charge, in_flight])
        assert tokens.used == sum(range(100))
        assert flight == Reading("k:a:concurrency", 0, 1_000, 0)

    async def test_one_request_admitted_twice_at_once_is_charged_once(self, stores: tuple[Store, Store]) -> None:
        """Both callers get the same answer, and one charge is made."""
        charge = Charge("pool", 1_000, 1_000_000, 1, 1000)
        answers = await asyncio.gather(*(stores[i % 2].admit("r", [charge], 1, LEASE_MS) for i in range(20)))
        assert len(set(answers)) == 1
        assert (await stores[0].peek([charge]))[0].used == 1_000


class TestRealClock:
    """Redis's clock and its key expiry."""

    async def test_a_retry_after_the_wait_succeeds(self, stores: tuple[Store, Store], redis_client: Redis) -> None:
        """The wait counts on Redis's clock: refused while it lasts, admitted when it is over."""
        charge = Charge("k:a:requests", 2, 2, 600)
        assert isinstance(await stores[0].admit("first", [charge], 1, LEASE_MS), Admitted)
        refused = await stores[0].admit("second", [charge], 1, LEASE_MS)
        assert isinstance(refused, Denied)
        assert refused.wait_us is not None
        over_us = await redis_now_us(redis_client) + refused.wait_us
        async with asyncio.timeout(10):
            while await redis_now_us(redis_client) < over_us:  # the clock that counts is in another process
                pass
        assert isinstance(await stores[1].admit("second", [charge], 1, LEASE_MS), Admitted)

    async def test_buckets_outlive_their_debt_and_then_go(self, redis_client: Redis) -> None:
        """A rated bucket's key is kept until a minute after it is empty; what is in flight has no expiry."""
        store = ClockedStore(redis_client)
        debt = Charge("k:a:output_tokens", 300, 10, 60)
        await store.admit("r", [debt, Charge("k:a:concurrency", 1, 5, 0)], 1, LEASE_MS)
        assert 359_000 < await redis_client.pttl("pn1:{test}:b:k:a:output_tokens") <= 360_000
        for name in ("reservations", "leases", "gauges"):
            assert await redis_client.pttl(f"pn1:{{test}}:{name}") == -1

    async def test_a_cell_at_rest_leaves_only_buckets_that_expire(self, redis_client: Redis) -> None:
        """When all is settled or reaped and forgotten, nothing stays without an expiry."""
        store = ClockedStore(redis_client)
        charges = [Charge("k:a:requests", 1, 5, 60), Charge("k:a:concurrency", 1, 5, 0)]
        for i in range(5):
            await store.admit(f"r{i}", charges, 1, LEASE_MS)
        await store.settle("r0", [])
        for step_us in (LEASE_MS * 1000, 120_000_000):
            store.now_us += step_us
            await store.reap()
        assert await redis_client.keys() == [b"pn1:{test}:b:k:a:requests"]


class TestUnavailable:
    """Redis away, slow or new."""

    async def test_a_server_that_lost_its_scripts_is_sent_them_again(
        self, stores: tuple[Store, Store], redis_client: Redis
    ) -> None:
        """After a restart or failover the next call works, and is one decision."""
        charge = Charge("k:a:requests", 1, 5, 1)
        for i in range(3):
            await redis_client.script_flush()
            assert isinstance(await stores[0].admit(f"r{i}", [charge], 1, LEASE_MS), Admitted)
        assert (await stores[0].peek([charge]))[0].used == 3

    async def test_a_dead_redis_is_reported(self, tmp_path: Path) -> None:
        """Every call says that the store is unavailable, and nothing else is raised."""
        async with Redis(unix_socket_path=str(tmp_path / "none.sock"), retry=Retry(NoBackoff(), 0)) as client:
            store = Store(client, "c", timeout_s=30)
            for call in (store.admit("r", [], 1, 1), store.extend("r", [], 1), store.settle("r", []), store.reap()):
                with pytest.raises(StoreUnavailableError, match="Redis"):
                    await call
            with pytest.raises(StoreUnavailableError, match="Redis failed at peek"):
                await store.peek([])

    async def test_a_silent_redis_is_given_up_after_the_timeout(
        self, redis_url: str, redis_client: Redis, stores: tuple[Store, Store]
    ) -> None:
        """A server that does not answer costs the timeout and no more; the call may still take effect, once."""
        charge = Charge("k:a:requests", 1, 5, 1)
        async with Redis.from_url(redis_url) as client:
            hurried = Store(client, "c", timeout_s=0.05)
            await hurried.peek([charge])
            await redis_client.client_pause(300)
            with pytest.raises(StoreUnavailableError, match="did not answer admit in"):
                await hurried.admit("r", [charge], 1, LEASE_MS)
        assert isinstance(await stores[0].admit("r", [charge], 1, LEASE_MS), Admitted)
        assert (await stores[0].peek([charge]))[0].used == 1

    async def test_what_is_in_the_way_is_reported(self, stores: tuple[Store, Store], redis_client: Redis) -> None:
        """A key of another type, as any error of Redis, reaches the caller as unavailable, with Redis's words."""
        await redis_client.set("pn1:{c}:reservations", "text")
        with pytest.raises(StoreUnavailableError, match="WRONGTYPE"):
            await stores[0].admit("r", [], 1, LEASE_MS)

    async def test_reservations_that_redis_lost_block_nobody(self, redis_client: Redis) -> None:
        """Leases without their reservations are cleared away, and admissions go on."""
        store = ClockedStore(redis_client)
        charge = Charge("k:a:requests", 1, 5, 60)
        await store.admit("lost", [charge], 1, LEASE_MS)
        await redis_client.delete("pn1:{test}:reservations")
        store.now_us += LEASE_MS * 1000
        assert isinstance(await store.admit("next", [charge], 1, LEASE_MS), Admitted)
        assert await store.reap() == 0

    async def test_a_cancelled_call_leaves_the_connection_usable(self, stores: tuple[Store, Store]) -> None:
        """A caller that goes away mid-call spoils no later answer on the same client."""
        charge = Charge("k:a:requests", 1, 1_000, 1)
        calls = [asyncio.create_task(stores[0].admit(f"r{i}", [charge], 1, LEASE_MS)) for i in range(50)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, Admitted) for answer in answers[1::2])
        readings = [await stores[0].peek([charge]) for _ in range(20)]
        assert all(reading[0].bucket == "k:a:requests" for reading in readings)


class TestWiring:
    """Keys, clients and arguments."""

    async def test_every_key_is_in_the_cell_s_slot(self, redis_client: Redis) -> None:
        """One hash tag puts all of a cell into one slot of a cluster."""
        store = Store(redis_client, "llama-3.1-8b:0", timeout_s=5)
        charges = [Charge("k:a:requests", 1, 5, 60), Charge("pool", 1, 5, 60, 1000), Charge("k:a:concurrency", 1, 5, 0)]
        await store.admit("r", charges, 1, LEASE_MS)
        await store.admit("s", charges, 1, LEASE_MS)
        await store.settle("s", [])
        names: list[bytes] = [name async for name in redis_client.scan_iter()]
        assert len(names) == 6
        assert {key_slot(name) for name in names} == {key_slot(b"llama-3.1-8b:0")}

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_scripts_touch_only_the_keys_that_they_are_given(self, name: str) -> None:
        """No script makes a key's name, so a cluster and its proxies know every key beforehand."""
        text = script(name).text
        assert ".." not in "".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
        assert "pn1" not in text

    async def test_a_client_that_decodes_answers_serves_too(self, redis_url: str, stores: tuple[Store, Store]) -> None:
        """The scripts' binary answers are not taken for text."""
        async with Redis.from_url(redis_url, decode_responses=True) as client:
            store = Store(client, "c", timeout_s=5)
            charge = Charge("k:a:requests", 200, 100_000, 1)
            assert isinstance(await store.admit("r", [charge], 1, LEASE_MS), Admitted)
            assert (await store.peek([charge]))[0].used == (await stores[0].peek([charge]))[0].used == 200

    async def test_cells_are_apart(self, redis_client: Redis) -> None:
        """The same bucket name in another cell is another bucket."""
        charge = Charge("pool", 5, 5, 1)
        first, second = (Store(redis_client, cell, timeout_s=5) for cell in ("a", "b"))
        await first.admit("r", [charge], 1, LEASE_MS)
        assert (await second.peek([charge]))[0].used == 0

    async def test_arguments_are_checked(self, redis_client: Redis) -> None:
        """A cell that would break the hash tag, no timeout, a bucket twice, and a boundless reap are refused."""
        for cell in ("", "a{b", "a}b"):
            with pytest.raises(ValueError, match="without braces"):
                Store(redis_client, cell, timeout_s=1)
        with pytest.raises(ValueError, match="timeout_s must be above 0"):
            Store(redis_client, "c", timeout_s=0)
        store = Store(redis_client, "c", timeout_s=5)
        with pytest.raises(ValueError, match="named once"):
            await store.admit("r", [Charge("b", 1, 1, 1), Charge("b", 1, 1, 1)], 1, LEASE_MS)
        with pytest.raises(ValueError, match=f"1 to {MOST_REAPED}"):
            await store.reap(MOST_REAPED + 1)
