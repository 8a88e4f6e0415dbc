"""The Lua scripts and ``cell.Cell`` agree to the bit: every answer, and everything stored, after every call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from ratelimit.cell import TOMBSTONE_US, Cell
from ratelimit.meter import EXACT, MINUTE_US, POOL_SCOPE, SPREAD_US, Admitted, Bucket, Charge, Denied, Role, reset_us
from tests.support.clocked_store import ClockedStore

T = TypeVar("T")

HALF_A_DAY_MS = 43_200_000
LARGEST = {1: (EXACT - 1) // MINUTE_US, 1000: (EXACT - 1) * 1000 // MINUTE_US}
RATES = st.one_of(st.integers(1, 20), st.integers(1, 10**9), st.integers(EXACT - 50, EXACT - 1))


def amounts(largest: int) -> st.SearchStrategy[int]:
    """Small numbers, where rules meet, and huge ones, where doubles would give way."""
    return st.one_of(st.integers(0, 20), st.integers(0, 100_000), st.integers(largest - 50, largest))


@st.composite
def rated_charges(draw: st.DrawFn, bucket: str, roles: tuple[Role, ...], tick_us: int = 1) -> Charge:
    """Charges of one rated bucket under any limits."""
    cost, capacity = draw(amounts(LARGEST[tick_us])), draw(amounts(LARGEST[tick_us]))
    theta = draw(st.sampled_from([0, 1, 500, 999, 1000]))
    at_reap = draw(st.integers(0, cost))
    return Charge(bucket, cost, capacity, draw(RATES), tick_us, draw(st.sampled_from(roles)), 0, at_reap, theta)


def gauge_charges(bucket: str) -> st.SearchStrategy[Charge]:
    """Charges of one gauge."""
    return st.builds(lambda cost, capacity: Charge(bucket, cost, capacity, 0), st.integers(0, 3), st.integers(0, 5))


@st.composite
def window_charges(draw: st.DrawFn, bucket: str, window_s: int) -> Charge:
    """Charges of one fixed window."""
    cost, capacity = draw(amounts(EXACT - 1)), draw(amounts(EXACT - 1))
    return Charge(bucket, cost, capacity, 0, window_s=window_s, at_reap=draw(st.integers(0, cost)))


OF_A_CALLER = (Role.PLAIN, Role.ASSURED, Role.CEILING)
CHARGES = st.lists(
    st.one_of(
        rated_charges("k:a:requests", (Role.PLAIN,)),
        rated_charges("k:a:output_tokens", OF_A_CALLER),
        rated_charges("k:a:output_tokens.ceiling", OF_A_CALLER),
        rated_charges("o:b:input_tokens", OF_A_CALLER, 1000),
        rated_charges("pool:work", (Role.POOL, Role.COUNTED), 1000),
        gauge_charges("k:a:concurrency"),
        gauge_charges("o:b:concurrency"),
        window_charges("k:a:output_tokens.5h", 18_000),
        window_charges("o:b:requests.week", 604_800),
    ),
    max_size=6,
    unique_by=lambda charge: charge.bucket,
)
REQUEST_IDS = st.sampled_from([f"r{i}" for i in range(8)])
EPOCHS = st.integers(0, 4)
LEASES_MS = st.sampled_from([1, 1_000, 60_000, 600_000])
STEPS_US = st.one_of(
    st.integers(-3_000_000, 3_000_000),
    st.sampled_from([-1, 1, 999, 1_000, SPREAD_US, MINUTE_US, TOMBSTONE_US, 18_000_000_000, 10**12, -(10**9)]),
)


class StoreModel(RuleBasedStateMachine):
    """Redis and the model beside each other: the same calls, and after each the same answer and the same state."""

    redis_url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = ClockedStore(Redis.from_url(self.redis_url))
        self.cell = Cell()
        self.latest_us = self.now_us
        self.written: dict[str, list[Bucket]] = {}
        self.wait(self.store.redis.flushall())

    def wait(self, call: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await call

        return self.runner.run(awaited())

    @property
    def now_us(self) -> int:
        return self.store.now_us

    def step(self, step_us: int) -> None:
        """The clock that both go by."""
        self.store.now_us += step_us
        self.latest_us = max(self.latest_us, self.now_us)

    def admitted(
        self, request_id: str, charges: list[Charge], epoch: int, lease_ms: int, memo: bytes = b""
    ) -> Admitted | Denied:
        """The answer of both."""
        answer = self.wait(self.store.admit(request_id, charges, epoch, lease_ms, memo))
        expected = self.cell.admit(request_id, charges, epoch, lease_ms, self.now_us, memo)
        assert answer == expected
        assert type(answer) is type(expected)
        return answer

    def extended(self, request_id: str, usage: list[Charge], lease_ms: int) -> None:
        """Of both."""
        answer = self.wait(self.store.extend(request_id, usage, lease_ms))
        assert answer is self.cell.extend(request_id, usage, lease_ms, self.now_us)

    def settled(self, request_id: str, usage: list[Charge], record: bytes = b"") -> None:
        """In both."""
        answer = self.wait(self.store.settle(request_id, usage, record))
        assert answer is self.cell.settle(request_id, usage, self.now_us, record)

    def reaped(self, most: int) -> None:
        """In both."""
        assert self.wait(self.store.reap(most)) == self.cell.reap(self.now_us, most)

    @invariant()
    def all_that_is_stored_is_equal(self) -> None:
        stored = self.wait(self.store.state())
        assert stored.buckets == self.cell.buckets
        assert stored.reservations == self.cell.reservations
        assert stored.leases == self.cell.leases.at
        assert stored.usage == self.cell.usage
        for scope, lifetime_ms in stored.lifetimes_ms.items():
            of_scope = [bucket for name, bucket in stored.buckets.items() if name.rpartition(":")[0] == scope]
            written, self.written[scope] = of_scope != self.written.get(scope), of_scope
            if scope == POOL_SCOPE:
                assert lifetime_ms == -1, "a pool may not expire"
            elif written:
                unused_us = max(reset_us(bucket, self.latest_us) for bucket in of_scope)
                assert lifetime_ms > unused_us / 1000, "a key may not expire before its buckets are unused"
                assert lifetime_ms > HALF_A_DAY_MS, "nor while a request may be in flight"

    def teardown(self) -> None:
        self.wait(self.store.redis.aclose())
        self.runner.close()


class AnyCalls(StoreModel):
    """Any calls under any limits in any order, at a clock that also steps back."""

    @rule(step_us=STEPS_US)
    def the_clock_steps(self, step_us: int) -> None:
        self.step(step_us)

    @rule(request_id=REQUEST_IDS, charges=CHARGES, epoch=EPOCHS, lease_ms=LEASES_MS, memo=st.sampled_from([b"", b"m"]))
    def admit(self, request_id: str, charges: list[Charge], epoch: int, lease_ms: int, memo: bytes) -> None:
        self.admitted(request_id, charges, epoch, lease_ms, memo)

    @rule(request_id=REQUEST_IDS, usage=CHARGES, lease_ms=LEASES_MS)
    def extend(self, request_id: str, usage: list[Charge], lease_ms: int) -> None:
        self.extended(request_id, usage, lease_ms)

    @rule(request_id=REQUEST_IDS, usage=CHARGES, record=st.sampled_from([b"", b"record"]))
    def settle(self, request_id: str, usage: list[Charge], record: bytes) -> None:
        self.settled(request_id, usage, record)

    @rule(most=st.integers(1, 10))
    def reap(self, most: int) -> None:
        self.reaped(most)

    @rule(charges=CHARGES, epoch=EPOCHS)
    def configure(self, charges: list[Charge], epoch: int) -> None:
        self.wait(self.store.configure(charges, epoch))
        self.cell.configure(charges, epoch, self.now_us)

    @rule(charges=CHARGES)
    def peek(self, charges: list[Charge]) -> None:
        assert self.wait(self.store.peek(charges)) == self.cell.peek(charges, self.now_us)

    @rule(scope=st.sampled_from(["k:a", "o:b", POOL_SCOPE]))
    def a_scope_is_lost(self, scope: str) -> None:
        """It expired, or Redis lost it; the reservations that hold of it are still there."""
        for name in [name for name in self.cell.buckets if name.startswith(scope + ":")]:
            del self.cell.buckets[name]
        self.wait(self.store.redis.delete(f"pn2:{{test}}:s:{scope}"))


#: Limits under which a crowd is refused for seconds, and for longer than the spread.
CROWDED = {
    name: (
        Charge(f"k:{name}:t", 0, 20, rate, role=Role.ASSURED),
        Charge(f"k:{name}:concurrency", 1, 6, 0),
        Charge(f"o:{name}:t", 0, 30, rate, 1000),
        Charge(f"k:{name}:t.ceiling", 0, 40, rate + 7, role=Role.CEILING),
        Charge("pool:work", 0, 60, 40 * rate, 1000, Role.POOL, borrow_up_to=900),
    )
    for name, rate in (("quick", 611), ("slow", 31))
}
CROWD_LEASE_MS = 60_000


class Caller(NamedTuple):
    """One of a crowd, and when it was told to come back; None where it was not."""

    request_id: str
    charges: list[Charge]
    back_us: int | None


class Crowd(StoreModel):
    """Callers under fixed limits, who come back when they were told, report, leave early, and come back late."""

    callers = Bundle("callers")

    def __init__(self) -> None:
        super().__init__()
        self.came = 0
        self.wait(self.store.settle("the pool is known", [CROWDED["slow"][-1].costing(1)]))
        self.cell.settle("the pool is known", [CROWDED["slow"][-1].costing(1)], self.now_us)
        self.step(MINUTE_US)

    def asks(self, request_id: str, charges: list[Charge]) -> Caller:
        """One admission."""
        answer = self.admitted(request_id, charges, 1, CROWD_LEASE_MS)
        if isinstance(answer, Admitted) or answer.wait_us is None:
            return Caller(request_id, charges, None)
        return Caller(request_id, charges, self.now_us + answer.wait_us)

    @rule(
        target=callers, name=st.sampled_from(list(CROWDED)), costs=st.lists(st.integers(0, 45), min_size=1, max_size=6)
    )
    def come(self, name: str, costs: list[int]) -> MultipleResults[Caller]:
        """All at one instant."""
        self.came += len(costs)
        all_charges = [[c.costing(cost if c.rate else 1, 0) for c in CROWDED[name]] for cost in costs]
        return multiple(*(self.asks(f"{self.came}-{i}", charges) for i, charges in enumerate(all_charges)))

    @rule(target=callers, caller=consumes(callers), late_us=st.sampled_from([-1, 0, 0, 0, 500_000]))
    def comes_back(self, caller: Caller, late_us: int) -> Caller:
        """At the time that it was told, or a moment off it."""
        if caller.back_us is not None:
            self.step(max(0, caller.back_us + late_us - self.now_us))
        return self.asks(caller.request_id, caller.charges)

    @rule(caller=callers, used=st.integers(0, 45))
    def ends(self, caller: Caller, used: int) -> None:
        self.settled(caller.request_id, [c.costing(used if c.rate else 1) for c in caller.charges])

    @rule(caller=callers, used=st.integers(0, 45), late=st.booleans())
    def reports(self, caller: Caller, used: int, late: bool) -> None:
        """In time, or after its lease."""
        if late:
            self.step(CROWD_LEASE_MS * 1_000)
            self.reaped(10)
        self.extended(caller.request_id, [c.costing(used) for c in caller.charges if c.rate], CROWD_LEASE_MS)

    @rule(step_us=st.integers(-100_000, 2_000_000))
    def time_passes(self, step_us: int) -> None:
        self.step(step_us)


@pytest.mark.parametrize(
    ("model", "examples"),
    [pytest.param(AnyCalls, 80, id="any-calls"), pytest.param(Crowd, 80, id="crowd", marks=pytest.mark.slow)],
)
def test_obligation_05_the_scripts_equal_the_model(redis_url: str, model: type[StoreModel], examples: int) -> None:
    """Calls, retries, epochs, clock steps, crowds and lease ends leave Redis and the model the same to the bit."""
    ended: list[int] = []

    def teardown(self: StoreModel) -> None:
        ended.append(self.now_us)
        model.teardown(self)

    run_state_machine_as_test(
        type("Here", (model,), {"redis_url": redis_url, "teardown": teardown}),
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert len(ended) >= examples


@pytest.mark.parametrize("capacity", [9_007_199_254_740_629, 9_007_199_254_740_973, EXACT - 1])
async def test_the_largest_capacities_are_counted_exactly(redis_client: Redis, capacity: int) -> None:
    """The last token of a window of 2⁵³ − 1 is there, and the one after it is not, in Redis as in the model."""
    store, cell = ClockedStore(redis_client), Cell()
    window = Charge("k:a:t.week", 0, capacity, 0, window_s=604_800)
    for name, cost in (("most", capacity - 1), ("last", 1), ("more", 1)):
        answer = await store.admit(name, [window.costing(cost)], 1, 60_000)
        assert answer == cell.admit(name, [window.costing(cost)], 1, 60_000, store.now_us)
        assert isinstance(answer, Admitted) is (name != "more")
