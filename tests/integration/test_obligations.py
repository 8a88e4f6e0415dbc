"""The proof obligations of the limiter on real Redis: the shipped scripts, at a clock of the test's or at their own.

1 to 4, 6, 7, 10, 12 and 13 are held by the state machine over any history; the fifth is ``test_store_model.py``; the
fourteenth is about gateways without Redis (``tests/unit``), and here about what they charge when it is back.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from redis.asyncio import Redis

from ratelimit.meter import MINUTE_US, Admitted, Charge, Denied, Role
from ratelimit.store import Store
from tests.support.clocked_store import ClockedStore
from tests.support.histories import Histories
from tests.support.meters import POOL, START_US
from tests.support.players import StorePlayer
from tests.support.rivals import CELL, IN_FLIGHT, REQUESTS, TIGHT, TOTAL, Told
from tests.support.waiting import eventually_async

LEASE_MS = 600_000
RIVALS = 3
HISTORIES = 30
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
ASSURED = Charge("k:a:t", 0, 20, 600, role=Role.ASSURED)
CEILING = Charge("k:a:t.ceiling", 0, 30, 900, role=Role.CEILING)
WORK = Charge(POOL, 0, 60, 1800, 1000, Role.POOL, borrow_up_to=900)
WINDOW = Charge("o:x:t.5h", 0, 40, 0, window_s=10)
COSTS = st.integers(0, 30)


def test_obligations_01_to_04_06_07_10_12_13_over_any_history(server_url: str) -> None:
    """Whatever callers, clocks, limits, crashes and losses do, Redis and Valkey keep to the books."""
    played: list[str] = []

    class StoreHistories(Histories):
        def player(self) -> StorePlayer:
            played.append(server_url)
            return StorePlayer(server_url)

    run_state_machine_as_test(StoreHistories, settings=settings(FEW, max_examples=HISTORIES, stateful_step_count=30))
    assert len(played) >= HISTORIES


@FEW
@given(level=st.integers(0, 80), thetas=st.tuples(st.integers(0, 1000), st.integers(0, 1000)), cost=st.integers(0, 60))
def test_obligation_08_priority_is_monotone(redis_url: str, level: int, thetas: tuple[int, int], cost: int) -> None:
    """In one state, where a lower priority is admitted a higher one is."""

    def admitted(theta: int) -> bool:
        cell = StorePlayer(redis_url)
        cell.settle("before", [WORK._replace(role=Role.COUNTED).costing(0)])
        cell.configure([WORK], 1)
        cell.now_us += 60_000_000
        cell.settle("others", [WORK._replace(role=Role.COUNTED).costing(level)])
        answer = cell.admit("r", [WORK.costing(cost)._replace(borrow_up_to=theta)], 1, LEASE_MS)
        cell.close()
        return isinstance(answer, Admitted)

    low, high = sorted(thetas)
    assert admitted(high) or not admitted(low)


@FEW
@given(
    levels=st.lists(st.integers(0, 80), min_size=4, max_size=4),
    costs=st.lists(COSTS, min_size=4, max_size=4),
    late_us=st.integers(0, 2_000_000),
)
def test_obligation_09_the_wait_is_tight(redis_url: str, levels: list[int], costs: list[int], late_us: int) -> None:
    """Alone, whatever the buckets hold: refused 1 µs before the time that was told, and admitted at it."""
    cell = StorePlayer(redis_url)
    kinds = (ASSURED, WINDOW, CEILING, WORK)
    cell.settle("before", [charge.costing(level) for charge, level in zip(kinds, levels, strict=True)])
    cell.now_us += late_us
    charges = [charge.costing(cost) for charge, cost in zip(kinds, costs, strict=True)]
    answer = cell.admit("r", charges, 1, LEASE_MS)
    if isinstance(answer, Denied):
        assert answer.wait_us is not None
        cell.now_us += answer.wait_us - 1
        assert isinstance(cell.admit("r", charges, 1, LEASE_MS), Denied)
        cell.now_us += 1
        assert isinstance(cell.admit("r", charges, 1, LEASE_MS), Admitted)
    cell.close()


async def test_obligation_09_a_herd_of_200_is_admitted_in_one_pass(redis_client: Redis) -> None:
    """Each of 200 callers refused at one instant returns at its time, 1 µs earlier is refused, and is admitted."""
    store, charge = ClockedStore(redis_client, now_us=START_US), Charge("o:x:t", 10, 2_000, 20_000)
    await store.admit("full", [charge.costing(2_000)], 1, LEASE_MS)
    refused = [await store.admit(f"r{i}", [charge], 1, LEASE_MS) for i in range(200)]
    times_us = [START_US + (answer.wait_us or 0) for answer in refused if isinstance(answer, Denied)]
    assert times_us == [START_US + 30_000 * (i + 1) for i in range(200)]
    for i, at_us in enumerate(times_us):
        store.now_us = at_us
        assert isinstance(await store.admit(f"r{i}", [charge], 1, LEASE_MS), Admitted)


async def test_obligation_11_more_capacity_is_more_sustained_work(redis_client: Redis) -> None:
    """A caller that returns when it is told gets the whole rate, and twice of it at twice the rate."""
    costs, minutes = (3, 17, 8, 29, 1), 2

    async def sustained(rate: int) -> int:
        store, work, i = ClockedStore(redis_client, now_us=START_US), 0, 0
        while store.now_us <= START_US + minutes * MINUTE_US:
            cost = costs[i % len(costs)]
            answer = await store.admit(f"{rate}-{i}", [Charge(f"k:{rate}:t", cost, 20, rate)], 1, LEASE_MS)
            if isinstance(answer, Admitted):
                work, i = work + cost, i + 1
            else:
                store.now_us += answer.wait_us or 1
        return work

    for rate in (300, 600):
        assert rate * minutes - max(costs) <= await sustained(rate) <= rate * minutes + 20 + max(costs)


async def test_obligation_13_key_expiry_never_erases_debt(redis_client: Redis) -> None:
    """Whatever a call leaves in a bucket, its key outlives it; a pool's, which would start full, has no end."""
    store = ClockedStore(redis_client, now_us=START_US)
    slow = Charge("k:a:t", 1, 10, 1)
    charges = [slow, WINDOW.costing(1), WORK.costing(1)._replace(role=Role.COUNTED)]

    async def outlives() -> None:
        state = await store.state()
        assert state.lifetimes_ms["pool"] == -1
        for reading in await store.peek([slow, WINDOW]):
            assert state.lifetimes_ms[reading.bucket.rpartition(":")[0]] > reading.reset_us / 1_000

    await store.admit("r", charges, 1, LEASE_MS)
    await outlives()
    for used in (10_000, 3_000, 500_000):
        await store.extend("r", [charge.costing(used) for charge in charges], LEASE_MS)
        await outlives()
    store.now_us += LEASE_MS * 1_000
    await store.reap()
    await outlives()
    await store.settle("r", [charge.costing(900_000) for charge in charges])
    await outlives()
    await store.settle("unknown", [charge.costing(2_000_000) for charge in charges])
    await outlives()
    await store.configure([slow._replace(capacity=20)], 2)
    await outlives()


async def test_obligation_14_what_an_outage_admitted_is_charged_when_it_is_over(redis_client: Redis) -> None:
    """A settlement of what Redis never admitted counts once, in full, as debt, and nothing is in flight for it."""
    store = ClockedStore(redis_client, now_us=START_US)
    charges = [Charge("k:a:t", 30, 20, 600), IN_FLIGHT]
    assert [await store.settle("served alone", charges) for _ in range(2)] == [True, False]
    tokens, in_flight = await store.peek(charges)
    assert (tokens.used, in_flight.used) == (30, 0)


async def test_obligation_15_concurrent_histories_keep_the_books(redis_url: str, redis_client: Redis) -> None:
    """Three processes with many connections make, repeat and settle the same requests at once, at Redis's own clock.

    Each request is one admission with one answer, one settlement wins, no refused one is charged, what is left to its
    lease ends, and no more is taken than burst + rate × time + what was used beyond its hold.
    """
    began_us = await now_us(redis_client)
    told = [one for rival in await asyncio.gather(*(rival(redis_url) for _ in range(RIVALS))) for one in rival]
    store = Store(redis_client, CELL, timeout_s=30)

    async def nothing_in_flight() -> bool:
        await store.reap()
        return (await store.peek([IN_FLIGHT]))[0].used == 0

    await eventually_async(nothing_in_flight, 20, "the end of all leases")
    total = (await store.peek([TOTAL]))[0].used
    passed_us = await now_us(redis_client) - began_us

    answers: dict[str, set[Admitted]] = defaultdict(set)
    firsts: dict[str, int] = defaultdict(int)
    for one in told:
        answers[one.name] |= set(one.admitted)
        firsts[one.name] += sum(one.settled)
    admitted = [planned for planned in REQUESTS if answers[planned.name]]
    assert all(len(answers[planned.name]) == 1 for planned in admitted), "a repeated request got another answer"
    assert all(firsts[planned.name] == (not planned.left) for planned in admitted), "one settlement wins"
    taken = sum(planned.hold if planned.left else planned.uses for planned in admitted)
    assert taken - passed_us / MINUTE_US <= total <= taken
    overruns = sum(max(0, planned.uses - planned.hold) for planned in admitted)
    assert taken <= TIGHT.capacity + TIGHT.rate * passed_us / MINUTE_US + overruns


async def rival(redis_url: str) -> list[Told]:
    """What one more process was told."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.rivals", redis_url, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return msgspec.json.decode(output, type=list[Told])


async def now_us(client: Redis) -> int:
    """The clock that counts."""
    seconds, rest = await client.time()
    return int(seconds) * 1_000_000 + int(rest)
