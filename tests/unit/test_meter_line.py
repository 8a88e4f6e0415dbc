"""The wait that refused callers are told: exact for one alone, one after the other for a crowd."""

from __future__ import annotations

import random
from copy import deepcopy
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.cell import Cell
from ratelimit.meter import SPREAD_US, Admitted, Charge, Role
from tests.support.meters import POOL, START_US, admitted, denied, take, wait_us

CALLERS = 200
#: A bucket of 2,000 tokens that refills for all callers in six seconds.
CAPACITY, REFILL_S = 2_000, 6
JITTER_US = 20_000


class Outcome(NamedTuple):
    """How often the luckless came back, and when the last one was in, in µs from the refusal."""

    most_retries: int
    last_us: int


def herd(charges: list[Charge], full: Charge, jitter_us: int, seed: int = 0) -> Outcome:
    """Refuse all at one instant in a full bucket; each returns when it was told, up to ``jitter_us`` late."""
    cell, rng = Cell(), random.Random(seed)
    take(cell, "full", full)
    arrivals = [(START_US, i, 0) for i in range(len(charges))]
    heapify(arrivals)
    most_retries = last_us = 0
    while arrivals:
        now_us, i, retries = heappop(arrivals)
        answer = take(cell, f"r{i}", charges[i], now_us=now_us)
        if isinstance(answer, Admitted):
            most_retries, last_us = max(most_retries, retries), now_us - START_US
        else:
            assert answer.wait_us is not None
            heappush(arrivals, (now_us + answer.wait_us + rng.randint(0, jitter_us), i, retries + 1))
    return Outcome(most_retries, last_us)


def of_tokens(costs: list[int]) -> list[Charge]:
    """A charge for each cost, of a bucket that leaks them all in ``REFILL_S``."""
    return [Charge("o:x:t", cost, CAPACITY, sum(costs) * 60 // REFILL_S) for cost in costs]


class TestHerd:
    """200 callers that are refused at one instant."""

    @pytest.mark.parametrize("tick_us", [1, 1000])
    def test_equal_costs_are_all_admitted_in_one_pass(self, tick_us: int) -> None:
        """Each returns at its time and is admitted at once; the last is in when the bucket has refilled for all."""
        charge = Charge("o:x:t", 10, CAPACITY, CALLERS * 10 * 60 // REFILL_S, tick_us)
        outcome = herd([charge] * CALLERS, charge.costing(CAPACITY), jitter_us=0)
        assert outcome == Outcome(1, REFILL_S * 1_000_000)

    @given(st.lists(st.integers(1, 30), min_size=2, max_size=60), st.integers(4_000, 10**6))
    def test_unequal_costs_are_all_admitted_in_one_pass(self, costs: list[int], rate: int) -> None:
        """The room that a caller is promised is its own cost's, whatever those before and after it take."""
        charges = [Charge("o:x:t", cost, 30, rate) for cost in costs]
        assert herd(charges, charges[0].costing(30), jitter_us=0).most_retries == 1

    @pytest.mark.parametrize("seed", range(5))
    def test_unequal_costs_with_jitter_need_two_retries_at_most(self, seed: int) -> None:
        """Clients that come up to 20 ms late all succeed within the two retries that official clients make."""
        rng = random.Random(seed)
        charges = of_tokens([rng.randint(1, 30) for _ in range(CALLERS)])
        outcome = herd(charges, charges[0].costing(CAPACITY), JITTER_US, seed)
        assert outcome.most_retries <= 2
        assert outcome.last_us <= (REFILL_S + 1) * 1_000_000

    def test_one_that_is_larger_than_the_bucket_holds_up_those_after_it_by_its_debt(self) -> None:
        """Who stands behind an oversized request is told when its debt is paid, and admitted then."""
        charges = [Charge("o:x:t", cost, 10, 600) for cost in (10, 25, 5, 5)]
        assert herd(charges, charges[0], jitter_us=0) == Outcome(1, 4_500_000)

    @pytest.mark.parametrize("bucket", [POOL, "t:batch:t", "m:model:t"])
    def test_strangers_stand_in_no_line(self, bucket: str) -> None:
        """In a bucket of many tenants all are told the exact time, so that nobody's asking makes another wait."""
        role = Role.POOL if bucket == POOL else Role.PLAIN
        cell, charge = Cell(), Charge(bucket, 10, 10, 600, 1000, role)
        cell.settle("full", [charge], START_US - 1)
        told = {wait_us(cell, f"r{i}", charge) for i in range(10)}
        assert len(told) == 1
        assert admitted(cell, "r0", charge, now_us=START_US + told.pop())


class TestLine:
    """Where the line begins and ends."""

    def test_a_caller_alone_is_told_the_exact_time_again_and_again(self) -> None:
        """One that returns when it was told never stands behind itself."""
        cell, charge = Cell(), Charge("k:a:t", 10, 10, 600)
        admitted(cell, "first", charge)
        now_us = START_US
        for i in range(5):
            told_us = wait_us(cell, f"r{i}", charge, now_us=now_us)
            assert told_us == 1_000_000
            now_us += told_us
            admitted(cell, f"r{i}", charge, now_us=now_us)

    def test_the_line_starts_anew_when_all_in_it_were_admitted(self) -> None:
        """Whoever is refused after the last of the crowd is in is told the exact time."""
        cell, charge = Cell(), Charge("o:x:t", 10, 20, 600)
        admitted(cell, "full", charge.costing(20))
        times = [START_US + wait_us(cell, f"r{i}", charge) for i in range(4)]
        assert [at_us - START_US for at_us in times] == [1_000_000, 2_000_000, 3_000_000, 4_000_000]
        for i, at_us in enumerate(times):
            admitted(cell, f"r{i}", charge, now_us=at_us)
        assert cell.buckets["o:x:t"].due == 0
        assert wait_us(cell, "next", charge, now_us=times[-1]) == 1_000_000

    def test_the_line_starts_anew_when_all_in_it_were_admitted_early(self) -> None:
        """Room that was given back lets them in before their times, and the next one stands behind nobody."""
        cell, charge = Cell(), Charge("o:x:t", 10, 30, 600)
        admitted(cell, "full", charge.costing(30))
        for name in ("first", "second"):
            denied(cell, name, charge)
        cell.settle("full", [charge.costing(10)], START_US)
        for name in ("first", "second"):
            admitted(cell, name, charge)
        assert wait_us(cell, "next", charge) == 1_000_000

    def test_the_line_starts_anew_when_its_end_has_passed(self) -> None:
        """A caller that was told a time and never came holds nobody up once it is over."""
        cell, charge = Cell(), Charge("o:x:t", 10, 10, 600)
        admitted(cell, "full", charge)
        assert wait_us(cell, "gone", charge.costing(2)) == 200_000
        assert wait_us(deepcopy(cell), "behind", charge, now_us=START_US + 199_999) == 200_000 + 1_000_000 - 199_999
        assert wait_us(cell, "alone", charge, now_us=START_US + 200_000) == 1_000_000 - 200_000

    def test_the_line_starts_anew_when_it_is_longer_than_the_spread(self) -> None:
        """Nobody is told more than ``SPREAD_US`` beyond the exact time, so that abandoned promises cost little."""
        cell, charge = Cell(), Charge("o:x:t", 10, 10, 60)
        admitted(cell, "full", charge)
        told = [wait_us(cell, f"r{i}", charge) for i in range(9)]
        assert told == [10_000_000, 20_000_000, 30_000_000, 40_000_000] * 2 + [10_000_000]
        assert max(told) == 10_000_000 + SPREAD_US

    def test_a_small_request_that_fits_does_not_wait_for_the_line(self) -> None:
        """A promise is a time that is told, never room that is kept empty."""
        cell, charge = Cell(), Charge("o:x:t", 10, 10, 600)
        admitted(cell, "first", charge.costing(5))
        denied(cell, "large", charge)
        admitted(cell, "small", charge.costing(5))

    def test_only_the_bucket_that_binds_promises(self) -> None:
        """Being refused by one bucket lengthens no other's line."""
        cell, own, shared = Cell(), Charge("k:a:t", 10, 10, 600), Charge("o:x:t", 10, 10, 1200)
        admitted(cell, "first", own, shared)
        denied(cell, "second", own, shared)
        assert (cell.buckets["k:a:t"].waiting, cell.buckets["o:x:t"].waiting) == (1, 0)


class TestExact:
    """A caller alone, to the microsecond."""

    @given(
        cost=st.integers(0, 50),
        capacity=st.integers(1, 30),
        rate=st.integers(1, 10**6),
        earlier=st.lists(st.integers(1, 50), max_size=5),
        offset_us=st.integers(0, 10**6),
    )
    def test_the_wait_of_a_leaky_bucket_is_tight(
        self, cost: int, capacity: int, rate: int, earlier: list[int], offset_us: int
    ) -> None:
        """Alone, a refused caller is refused again 1 µs before the wait that it was told is over, and not after it."""
        charge = Charge("k:a:t", cost, capacity, rate)
        cell, now_us = Cell(), START_US + offset_us
        for i, taken in enumerate(earlier):
            cell.settle(f"before-{i}", [charge.costing(taken)], START_US)
        answer = take(cell, "r", charge, now_us=now_us)
        if isinstance(answer, Admitted):
            return
        assert answer.wait_us is not None
        assert answer.wait_us > 0
        denied(cell, "r", charge, now_us=now_us + answer.wait_us - 1)
        admitted(cell, "r", charge, now_us=now_us + answer.wait_us)

    def test_the_wait_at_a_coarse_tick_ends_with_it(self) -> None:
        """At ticks of 1 ms the wait is told to the microsecond at which the tick begins."""
        cell, charge, now_us = Cell(), Charge("o:x:t", 10, 10, 700, 1000), START_US + 333
        admitted(cell, "first", charge, now_us=now_us)
        told_us = wait_us(cell, "r", charge, now_us=now_us)
        assert (now_us + told_us) % 1000 == 0
        denied(cell, "r", charge, now_us=now_us + told_us - 1)
        admitted(cell, "r", charge, now_us=now_us + told_us)
