"""The store on real servers: many callers at once, the server's clock, and what happens when it is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from ratelimit.cell import REAPED_KEPT_US
from ratelimit.link import open_link
from ratelimit.meter import MINUTE_US, Admitted, Charge, Denied, Reading, Role
from ratelimit.store import MOST_REAPED, Store, StoreUnavailableError, script
from tests.support.clocked_store import ClockedStore
from tests.support.servers import Cluster, Server
from tests.support.waiting import eventually_async

LEASE_MS = 60_000
CONNECT_S = 5.0
DAY_MS = 86_400_000
IN_FLIGHT = Charge("k:a:concurrency", 1, 1_000, 0)
REQUESTS = Charge("k:a:requests", 1, 5, 1)
WORK = Charge("pool:work", 1_000, 1_000_000, 60, 1_000, Role.COUNTED)
WEEK = Charge("o:x:output_tokens.week", 5, 1_000, 0, window_s=604_800)


@pytest.fixture
async def client(server_url: str) -> AsyncIterator[Redis]:
    """A client of a Redis, then of a Valkey, that holds nothing."""
    async with Redis.from_url(server_url) as made:
        yield made


@pytest.fixture
async def stores(server_url: str) -> AsyncIterator[tuple[Store, Store]]:
    """Two stores of one cell, as two gateways have: one over redis-py, one over a link."""
    async with Redis.from_url(server_url) as first, aclosing(open_link(server_url, CONNECT_S)) as second:
        yield Store(first, "c", timeout_s=30), Store(second, "c", timeout_s=30)


async def server_now_us(client: Redis) -> int:
    seconds, rest = await client.time()
    return int(seconds) * 1_000_000 + int(rest)


class TestManyAtOnce:
    """Decisions that race."""

    async def test_never_more_than_burst_and_rate(self, stores: tuple[Store, Store], client: Redis) -> None:
        """Of 200 concurrent requests through two gateways no more pass than burst + rate × time, and no fewer."""
        charge = Charge("k:a:output_tokens", 30, 1_000, 6_000)
        before_us = await server_now_us(client)
        answers = await asyncio.gather(
            *(stores[i % 2].admit(f"r{i}", [charge, IN_FLIGHT], 1, LEASE_MS) for i in range(200))
        )
        elapsed_us = await server_now_us(client) - before_us
        admitted = sum(isinstance(answer, Admitted) for answer in answers)
        assert admitted >= charge.capacity // charge.cost
        assert admitted * charge.cost * MINUTE_US <= charge.capacity * MINUTE_US + charge.rate * elapsed_us
        assert (await stores[0].peek([IN_FLIGHT]))[0].used == admitted

    async def test_settlements_balance(self, stores: tuple[Store, Store]) -> None:
        """Concurrent extensions and repeated settlements leave exactly what was used, and nothing in flight."""
        charge = Charge("k:a:output_tokens", 50, 1_000_000, 1)

        async def one(i: int) -> None:
            store = stores[i % 2]
            assert isinstance(await store.admit(f"r{i}", [charge, IN_FLIGHT], 1, LEASE_MS), Admitted)
            await store.extend(f"r{i}", [charge.costing(60 + i)], LEASE_MS)
            settled = await asyncio.gather(*(s.settle(f"r{i}", [charge.costing(i)]) for s in stores))
            assert sorted(settled) == [False, True]

        await asyncio.gather(*(one(i) for i in range(100)))
        tokens, flight = await stores[1].peek([charge, IN_FLIGHT])
        assert tokens.used == sum(range(100))
        assert flight == Reading("k:a:concurrency", 0, 1_000, 0)

    async def test_one_request_admitted_twice_at_once_is_charged_once(self, stores: tuple[Store, Store]) -> None:
        """Both callers get the same answer, and one charge is made."""
        charge = Charge("o:x:input_tokens", 1_000, 1_000_000, 1, 1000)
        answers = await asyncio.gather(*(stores[i % 2].admit("r", [charge], 1, LEASE_MS) for i in range(20)))
        assert len(set(answers)) == 1
        assert (await stores[0].peek([charge]))[0].used == 1_000


class TestRealClock:
    """The server's clock and its key expiry."""

    async def test_a_retry_after_the_wait_succeeds(self, stores: tuple[Store, Store], client: Redis) -> None:
        """The wait counts on the server's clock: refused while it lasts, admitted when it is over."""
        charge = Charge("k:a:requests", 2, 2, 600)
        assert isinstance(await stores[0].admit("first", [charge], 1, LEASE_MS), Admitted)
        refused = await stores[0].admit("second", [charge], 1, LEASE_MS)
        assert isinstance(refused, Denied)
        assert refused.wait_us is not None
        over_us = await server_now_us(client) + refused.wait_us

        async def is_over() -> bool:  # the clock that counts is in another process
            return await server_now_us(client) >= over_us

        await eventually_async(is_over, 10, "the end of the wait")
        assert isinstance(await stores[1].admit("second", [charge], 1, LEASE_MS), Admitted)

    @pytest.mark.parametrize(
        ("charge", "at_least_ms"),
        [
            (Charge("k:a:output_tokens", 10_000, 10, 60), DAY_MS),
            (Charge("k:a:output_tokens", 10_000, 10, 1), 10_000 * 60_000),
            (Charge("k:a:output_tokens", 5_000_000, 10, 1, 1_000), 5_000_000 * 60_000),
            (WEEK, 604_800_000),
            (WEEK.costing(3_500), 4 * 604_800_000),
            (IN_FLIGHT, DAY_MS),
        ],
    )
    async def test_a_scope_outlives_its_debt_and_then_goes(
        self, client: Redis, charge: Charge, at_least_ms: int
    ) -> None:
        """Its key is kept until a while after its buckets are unused, for a day at least, and not for ever."""
        store = ClockedStore(client)
        await store.admit("r", [charge], 1, LEASE_MS)
        (lifetime_ms,) = (await store.state()).lifetimes_ms.values()
        assert at_least_ms < lifetime_ms + 1_000 < at_least_ms + 300_000

    async def test_a_pool_is_never_forgotten(self, client: Redis) -> None:
        """A pool's bucket that is not stored is taken for full, so an idle one has to stay."""
        store = ClockedStore(client)
        await store.admit("r", [WORK, REQUESTS], 1, LEASE_MS)
        assert (await store.state()).lifetimes_ms["pool"] == -1

    async def test_a_cell_at_rest_leaves_only_what_expires(self, client: Redis) -> None:
        """When all is settled, or reaped and forgotten, only the pool and the usage to be fetched stay for good."""
        store = ClockedStore(client)
        charges = [Charge("k:a:requests", 1, 5, 60), IN_FLIGHT, WORK]
        for i in range(5):
            await store.admit(f"r{i}", charges, 1, LEASE_MS)
        await store.settle("r0", [])
        for step_us in (LEASE_MS * 1000, REAPED_KEPT_US):
            store.now_us += step_us
            await store.reap()
        stays = {name for name in await client.keys() if await client.pttl(name) == -1}
        assert stays == {b"pn2:{test}:s:pool", b"pn2:{test}:usage"}
        assert await client.xlen("pn2:{test}:usage") == 4


class TestUnavailable:
    """A server away, slow or new."""

    async def test_a_server_that_lost_its_scripts_is_sent_them_again(
        self, stores: tuple[Store, Store], client: Redis
    ) -> None:
        """After a restart or failover the next call works, and is one decision."""
        for i in range(4):
            await client.script_flush()
            assert isinstance(await stores[i % 2].admit(f"r{i}", [REQUESTS], 1, LEASE_MS), Admitted)
        assert (await stores[0].peek([REQUESTS]))[0].used == 4

    async def test_a_server_that_lost_everything_gives_nothing_of_the_pool_away(self, own_server: Server) -> None:
        """After a restart empty, callers start afresh, and borrowers wait until what is in flight must have ended."""
        borrowed = WORK._replace(role=Role.POOL)
        async with aclosing(open_link(own_server.url, CONNECT_S)) as link:
            store = Store(link, "c", timeout_s=30)
            assert isinstance(await store.admit("green", [REQUESTS, WORK], 1, LEASE_MS), Admitted)
            own_server.kill()
            own_server.start()

            async def answers() -> bool:
                try:
                    return bool(await store.peek([REQUESTS]))
                except StoreUnavailableError:
                    return False

            await eventually_async(answers, 10, "an answer of the restarted server")
            refused = await store.admit("borrower", [borrowed], 1, LEASE_MS)
            assert isinstance(refused, Denied)
            assert isinstance(await store.admit("next", [REQUESTS, WORK], 1, LEASE_MS), Admitted)
            assert await store.settle("green", [REQUESTS, WORK])

    async def test_a_dead_server_is_reported(self, tmp_path: Path) -> None:
        """Every call says that the store is unavailable, and nothing else is raised."""
        async with Redis(unix_socket_path=str(tmp_path / "none.sock"), retry=Retry(NoBackoff(), 0)) as client:
            store = Store(client, "c", timeout_s=30)
            for call in (
                store.admit("r", [], 1, 1),
                store.extend("r", [], 1),
                store.settle("r", []),
                store.reap(),
                store.configure([], 1),
            ):
                with pytest.raises(StoreUnavailableError, match="Redis"):
                    await call
            with pytest.raises(StoreUnavailableError, match="Redis failed at peek"):
                await store.peek([])

    async def test_a_silent_server_is_given_up_after_the_timeout(
        self, server_url: str, client: Redis, stores: tuple[Store, Store]
    ) -> None:
        """A server that does not answer costs the timeout and no more; the call may still take effect, once."""
        async with aclosing(open_link(server_url, CONNECT_S)) as link:
            hurried = Store(link, "c", timeout_s=0.05)
            await Store(link, "c", timeout_s=30).peek([REQUESTS])
            await client.client_pause(300)
            with pytest.raises(StoreUnavailableError, match="did not answer admit in"):
                await hurried.admit("r", [REQUESTS], 1, LEASE_MS)
            assert isinstance(await stores[0].admit("r", [REQUESTS], 1, LEASE_MS), Admitted)
        assert (await stores[0].peek([REQUESTS]))[0].used == 1

    async def test_what_is_in_the_way_is_reported(self, stores: tuple[Store, Store], client: Redis) -> None:
        """A key of another type, as any error of the server, reaches the caller as unavailable, with its words."""
        await client.set("pn2:{c}:s:k:a", "text")
        for store in stores:
            with pytest.raises(StoreUnavailableError, match="WRONGTYPE"):
                await store.admit("r", [REQUESTS], 1, LEASE_MS)

    async def test_reservations_that_the_server_lost_block_nobody(self, client: Redis) -> None:
        """Leases without their reservations are cleared away, and admissions go on."""
        store = ClockedStore(client)
        await store.admit("lost", [REQUESTS], 1, LEASE_MS)
        await client.delete("pn2:{test}:r:lost")
        store.now_us += LEASE_MS * 1000
        assert isinstance(await store.admit("next", [REQUESTS], 1, LEASE_MS), Admitted)
        assert await store.reap() == 0
        assert (await store.state()).leases.keys() == {"next"}

    async def test_a_cancelled_call_leaves_the_connection_usable(self, stores: tuple[Store, Store]) -> None:
        """A caller that goes away mid-call spoils no later answer on the same client."""
        charge = Charge("k:a:requests", 1, 1_000, 1)
        for store in stores:
            calls = [asyncio.create_task(store.admit(f"r{i}", [charge], 1, LEASE_MS)) for i in range(50)]
            await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(answer, Admitted) for answer in answers[1::2])
            readings = [await store.peek([charge]) for _ in range(20)]
            assert all(reading[0].bucket == "k:a:requests" for reading in readings)


class TestWiring:
    """Keys, clients and arguments."""

    async def test_every_key_is_in_the_cell_s_slot(self, client: Redis) -> None:
        """One hash tag puts all of a cell into one slot of a cluster, also what reaping reaches."""
        store = ClockedStore(client, "llama-3.1-8b:0")
        charges = [Charge("k:a:requests", 1, 5, 60), WORK, WEEK, IN_FLIGHT]
        for name in ("r", "s", "t"):
            await store.admit(name, charges, 1, LEASE_MS)
        await store.settle("s", [], b"record")
        store.now_us += LEASE_MS * 1000
        await store.reap(1)
        names: list[bytes] = [name async for name in client.scan_iter()]
        assert len(names) == len(("leases", "usage")) + len(("r", "s", "t")) + len(("k:a", "o:x", "pool"))
        assert {key_slot(name) for name in names} == {key_slot(b"llama-3.1-8b:0")}

    @pytest.mark.parametrize("name", ["admit", "extend", "settle", "reap", "configure", "peek"])
    def test_scripts_name_no_version(self, name: str) -> None:
        """Every name is made of the keys that a script is given, so two versions of it share none."""
        assert "pn2" not in script(name).text

    async def test_a_client_that_decodes_answers_serves_too(self, server_url: str, stores: tuple[Store, Store]) -> None:
        """The scripts' binary answers are not taken for text."""
        async with Redis.from_url(server_url, decode_responses=True) as decoding:
            store = Store(decoding, "c", timeout_s=5)
            charge = Charge("k:a:requests", 200, 100_000, 1)
            assert isinstance(await store.admit("r", [charge], 1, LEASE_MS), Admitted)
            assert (await store.peek([charge]))[0].used == (await stores[0].peek([charge]))[0].used == 200

    async def test_cells_are_apart(self, client: Redis) -> None:
        """The same bucket name in another cell is another bucket."""
        first, second = (Store(client, cell, timeout_s=5) for cell in ("a", "b"))
        await first.admit("r", [REQUESTS], 1, LEASE_MS)
        assert (await second.peek([REQUESTS]))[0].used == 0

    async def test_binary_memos_and_records_come_out_as_they_went_in(self, client: Redis) -> None:
        """Any bytes may be kept with a reservation, and given with a settlement."""
        store, every_byte = ClockedStore(client), bytes(range(256))
        await store.admit("settled", [REQUESTS], 1, LEASE_MS)
        await store.settle("settled", [], every_byte)
        await store.admit("left", [REQUESTS], 1, LEASE_MS, every_byte[::-1])
        for step_us in (LEASE_MS * 1000, REAPED_KEPT_US):
            store.now_us += step_us
            await store.reap()
        settled, left = (await store.state()).usage
        assert (settled.record, left.expired, left.held) == (every_byte, every_byte[::-1], (("k:a:requests", 1),))

    async def test_arguments_are_checked(self, client: Redis) -> None:
        """A cell that would break the hash tag, no timeout, a bucket twice, and a boundless reap are refused."""
        for cell in ("", "a{b", "a}b"):
            with pytest.raises(ValueError, match="without braces"):
                Store(client, cell, timeout_s=1)
        with pytest.raises(ValueError, match="timeout_s must be above 0"):
            Store(client, "c", timeout_s=0)
        store = Store(client, "c", timeout_s=5)
        with pytest.raises(ValueError, match="named once"):
            await store.admit("r", [REQUESTS, REQUESTS], 1, LEASE_MS)
        with pytest.raises(ValueError, match=f"1 to {MOST_REAPED}"):
            await store.reap(MOST_REAPED + 1)


class TestCluster:
    """Cells on the primaries of a real cluster."""

    def cells(self, cluster: Cluster) -> list[str]:
        """Two cells on each primary."""
        found: dict[Server, list[str]] = {node: [] for node in cluster.nodes}
        for number in range(200):
            cell = f"model:{number}"
            found[cluster.owner(key_slot(cell.encode()))].append(cell)
        return [cell for cells in found.values() for cell in cells[:2]]

    async def test_cells_on_every_primary_decide_and_settle(self, redis_cluster: Cluster) -> None:
        """Whatever primary a cell lives on, its whole life works there, and cells stay apart."""
        cells = self.cells(redis_cluster)
        assert len(cells) == 6
        async with AsyncExitStack() as opened:
            links = [await opened.enter_async_context(aclosing(open_link(redis_cluster.url, CONNECT_S))) for _ in "ab"]
            charges = [Charge("k:a:output_tokens", 50, 1_000_000, 1), IN_FLIGHT, WORK, WEEK]

            async def one(cell: str, i: int) -> None:
                first, second = (Store(link, cell, timeout_s=30) for link in links)
                assert isinstance(await first.admit(f"r{i}", charges, 1, LEASE_MS), Admitted)
                assert await second.extend(f"r{i}", [charges[0].costing(60)], LEASE_MS)
                assert await first.settle(f"r{i}", [charges[0].costing(i), charges[3]], b"record")
                assert not await second.settle(f"r{i}", [charges[0].costing(i)])

            await asyncio.gather(*(one(cell, i) for cell in cells for i in range(30)))
            for cell in cells:
                store = Store(links[0], cell, timeout_s=30)
                await store.admit("dead", [IN_FLIGHT], 1, lease_ms=1)
                assert [reading.used for reading in (await store.peek(charges))[::3]] == [sum(range(30)), 150]

                async def reaped(store: Store = store) -> bool:
                    await store.reap()
                    return (await store.peek([IN_FLIGHT]))[0].used == 0

                await eventually_async(reaped, 10, "the end of the dead one")

    async def test_a_cell_that_moves_while_it_is_used_keeps_its_books(self, redis_cluster: Cluster) -> None:
        """Every call is made once, on the old primary or the new: what is charged is what was admitted."""
        cell = self.cells(redis_cluster)[0] + ":moving"
        slot = key_slot(cell.encode())
        source = redis_cluster.owner(slot)
        target = next(node for node in redis_cluster.nodes if node is not source)
        tokens = Charge("k:a:output_tokens", 1, 1_000_000, 1)
        stop, admitted = asyncio.Event(), 0

        async def call(store: Store, name: int) -> None:
            nonlocal admitted
            i = 0
            while not stop.is_set():
                i += 1
                # Refused while keys are on both sides for a moment: the same request again.
                again = partial(self.admitted_if_there, store, f"r{name}-{i}", tokens)
                answer = await eventually_async(again, 10, "an answer")
                admitted += isinstance(answer, Admitted)

        async with aclosing(open_link(redis_cluster.url, CONNECT_S)) as link:
            store = Store(link, cell, timeout_s=5)
            callers = [asyncio.create_task(call(store, name)) for name in range(5)]
            for here, there in ((source, target), (target, source)):
                await asyncio.to_thread(redis_cluster.begin_move, slot, here, there)
                await asyncio.to_thread(redis_cluster.finish_move, slot, here, there)
                before = admitted

                async def goes_on(beyond: int = before + 20) -> bool:
                    return admitted > beyond

                await eventually_async(goes_on, 10, "admissions by the new owner")
            stop.set()
            await asyncio.gather(*callers)
            assert [reading.used for reading in await store.peek([tokens, IN_FLIGHT])] == [admitted, admitted]

    @staticmethod
    async def admitted_if_there(store: Store, request_id: str, tokens: Charge) -> Admitted | Denied | None:
        """The answer; None while the store is away."""
        try:
            return await store.admit(request_id, [tokens, IN_FLIGHT], 1, LEASE_MS)
        except StoreUnavailableError:
            return None
