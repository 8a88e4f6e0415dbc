"""The Lua scripts and ``meter.Cell`` agree to the bit: every answer, and everything stored, after every call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

from ratelimit.meter import EXACT, MINUTE_US, TOMBSTONE_US, Cell, Charge, reset_us
from tests.support.clocked_store import ClockedStore

T = TypeVar("T")

RATED_TICKS_US = {"k:a:requests": 1, "k:a:input_tokens": 1, "pool": 1000}
GAUGES = ("k:a:concurrency", "k:b:concurrency")
LARGEST = {1: (EXACT - 1) // MINUTE_US, 1000: (EXACT - 1) * 1000 // MINUTE_US}


def amounts(largest: int) -> st.SearchStrategy[int]:
    """Small numbers, where rules meet, and huge ones, where doubles would give way."""
    return st.one_of(st.integers(0, 20), st.integers(0, 100_000), st.integers(largest - 50, largest))


def rated_charges(bucket: str) -> st.SearchStrategy[Charge]:
    """Charges of one rated bucket under any limits."""
    tick_us = RATED_TICKS_US[bucket]
    rates = st.one_of(st.integers(1, 20), st.integers(1, 10**9), st.integers(EXACT - 50, EXACT - 1))
    return st.builds(
        Charge, st.just(bucket), amounts(LARGEST[tick_us]), amounts(LARGEST[tick_us]), rates, st.just(tick_us)
    )


def gauge_charges(bucket: str) -> st.SearchStrategy[Charge]:
    """Charges of one gauge."""
    return st.builds(Charge, st.just(bucket), st.integers(0, 3), st.integers(0, 5), st.just(0), st.just(1))


CHARGES = st.lists(
    st.one_of(*map(rated_charges, RATED_TICKS_US), *map(gauge_charges, GAUGES)),
    max_size=5,
    unique_by=lambda charge: charge.bucket,
)
REQUEST_IDS = st.sampled_from([f"r{i}" for i in range(8)])
EPOCHS = st.integers(0, 4)
LEASES_MS = st.sampled_from([1, 1_000, 60_000, 600_000])
STEPS_US = st.one_of(
    st.integers(-3_000_000, 3_000_000),
    st.sampled_from([-1, 1, 999, 1_000, MINUTE_US, TOMBSTONE_US, 10**9, 10**12, -(10**9)]),
)


class StoreModel(RuleBasedStateMachine):
    """Any calls in any order, at a clock that also steps back."""

    redis_url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = ClockedStore(Redis.from_url(self.redis_url))
        self.cell = Cell()
        self.wait(self.store.redis.flushall())

    def wait(self, call: Awaitable[T]) -> T:
        async def awaited() -> T:
            return await call

        return self.runner.run(awaited())

    @property
    def now_us(self) -> int:
        return self.store.now_us

    @rule(step_us=STEPS_US)
    def the_clock_steps(self, step_us: int) -> None:
        self.store.now_us += step_us

    @rule(request_id=REQUEST_IDS, charges=CHARGES, epoch=EPOCHS, lease_ms=LEASES_MS)
    def admit(self, request_id: str, charges: list[Charge], epoch: int, lease_ms: int) -> None:
        answer = self.wait(self.store.admit(request_id, charges, epoch, lease_ms))
        assert answer == self.cell.admit(request_id, charges, epoch, lease_ms, self.now_us)
        assert type(answer) is type(self.cell.admit(request_id, charges, epoch, lease_ms, self.now_us))
        assert answer == self.wait(self.store.admit(request_id, charges, epoch, lease_ms))

    @rule(request_id=REQUEST_IDS, usage=CHARGES, lease_ms=LEASES_MS)
    def extend(self, request_id: str, usage: list[Charge], lease_ms: int) -> None:
        answer = self.wait(self.store.extend(request_id, usage, lease_ms))
        assert answer is self.cell.extend(request_id, usage, lease_ms, self.now_us)

    @rule(request_id=REQUEST_IDS, usage=CHARGES)
    def settle(self, request_id: str, usage: list[Charge]) -> None:
        answer = self.wait(self.store.settle(request_id, usage))
        assert answer is self.cell.settle(request_id, usage, self.now_us)

    @rule(most=st.integers(1, 10))
    def reap(self, most: int) -> None:
        assert self.wait(self.store.reap(most)) == self.cell.reap(self.now_us, most)

    @rule(charges=CHARGES)
    def peek(self, charges: list[Charge]) -> None:
        assert self.wait(self.store.peek(charges)) == self.cell.peek(charges, self.now_us)

    @rule(bucket=st.sampled_from(list(RATED_TICKS_US)))
    def a_bucket_is_lost(self, bucket: str) -> None:
        """It expired, or Redis lost it; the reservations that hold of it are still there."""
        self.cell.rated.pop(bucket, None)
        self.wait(self.store.redis.delete(f"pn1:{{test}}:b:{bucket}"))

    @invariant()
    def all_that_is_stored_is_equal(self) -> None:
        stored = self.wait(self.store.state())
        assert stored.rated == self.cell.rated
        assert stored.gauges == self.cell.gauges
        assert stored.reservations == self.cell.reservations
        assert stored.leases == self.cell.leases.at
        assert stored.tombstones == self.cell.tombstones.at
        for name, bucket in stored.rated.items():
            charge = Charge(name, 0, 0, 1, RATED_TICKS_US[name])
            full_us = reset_us(bucket, charge, bucket.tick * charge.tick_us)
            assert stored.lifetimes_ms[name] > full_us / 1000, "a key may not expire before its bucket is empty"

    def teardown(self) -> None:
        self.wait(self.store.redis.aclose())
        self.runner.close()


def test_the_scripts_equal_the_model(redis_url: str) -> None:
    """Random calls, retries, epochs, clock steps and lease ends leave Redis and the model the same to the bit."""
    machine = type("StoreModelHere", (StoreModel,), {"redis_url": redis_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
