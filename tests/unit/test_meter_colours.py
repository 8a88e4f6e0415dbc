"""Two colours: what is assured, what is borrowed, and who may borrow."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.cell import Cell
from ratelimit.meter import Admitted, Charge, Denied, Role
from tests.support.meters import POOL, START_US, admitted, denied, take, used, wait_us

ASSURED = Charge("k:a:t", 10, 20, 600, role=Role.ASSURED)
CEILING = Charge("k:a:t.ceiling", 10, 60, 1200, role=Role.CEILING)
WORK = Charge(POOL, 10, 100, 1200, 1000, Role.POOL, borrow_up_to=800)
OTHERS = Charge(POOL, 0, 100, 1200, 1000, Role.COUNTED)
CALLER = (ASSURED, CEILING, WORK)


def idle_pool() -> Cell:
    """A cell whose pool's bucket is stored and empty."""
    cell = Cell()
    cell.settle("known", [OTHERS.costing(1)], START_US - 60_000_000)
    assert used(cell, OTHERS) == 0
    return cell


def busy_pool(level: int) -> Cell:
    """A cell in which others use so much of the pool."""
    cell = idle_pool()
    cell.settle("others", [OTHERS.costing(level)], START_US)
    return cell


class TestGreen:
    """What is assured."""

    def test_a_request_within_its_assured_bucket_is_green(self) -> None:
        """It is charged to its own buckets and to the pool."""
        cell = idle_pool()
        assert admitted(cell, "r", *CALLER).green
        assert [used(cell, charge) for charge in CALLER] == [10, 10, 10]

    @pytest.mark.parametrize("level", [100, 1_000, 10**6])
    def test_the_pool_never_refuses_it(self, level: int) -> None:
        """However far others have overrun the pool, who stays within what is assured is served."""
        cell = busy_pool(level)
        for i in range(2):
            assert admitted(cell, f"r{i}", *CALLER).green
        assert used(cell, WORK) == level + 20

    def test_a_full_ceiling_does_not_refuse_it(self) -> None:
        """What was borrowed before is charged to the ceiling, and what is assured is there all the same."""
        cell = idle_pool()
        cell.settle("borrowed", [CEILING.costing(500)], START_US)
        assert admitted(cell, "r", *CALLER).green
        assert used(cell, CEILING) == 510

    def test_its_plain_limits_refuse_it(self) -> None:
        """Requests a minute and places in flight hold for green requests too."""
        cell, in_flight = idle_pool(), Charge("k:a:concurrency", 1, 1, 0)
        admitted(cell, "r", *CALLER, in_flight)
        assert denied(cell, "s", *CALLER, in_flight).bucket == "k:a:concurrency"

    def test_all_its_assured_buckets_must_have_room(self) -> None:
        """Room in one of two does not make a request green."""
        cell, second = idle_pool(), Charge("o:x:t", 10, 10, 600, role=Role.ASSURED)
        assert admitted(cell, "r", ASSURED, second, CEILING, WORK).green
        assert not admitted(cell, "s", ASSURED, second, CEILING, WORK).green
        assert (used(cell, ASSURED), used(cell, second)) == (10, 10)

    def test_who_may_not_borrow_is_green_and_counted(self) -> None:
        """With plain limits and a pool that is only counted, the pool refuses nothing and is charged everything."""
        cell, plain = busy_pool(10**6), Charge("k:c:t", 10, 10, 600)
        assert admitted(cell, "r", plain, OTHERS.costing(10)).green
        assert used(cell, OTHERS) == 10**6 + 10
        assert denied(cell, "s", plain, OTHERS.costing(10)).bucket == "k:c:t"


class TestBorrowing:
    """What is idle."""

    def test_a_borrowed_request_does_not_use_up_what_is_assured(self) -> None:
        """It is charged to the ceiling and the pool; its settlement and extensions leave the assured bucket alone."""
        cell = idle_pool()
        for i in range(2):
            admitted(cell, f"green-{i}", *CALLER)
        assert not admitted(cell, "borrowed", *CALLER).green
        assert [used(cell, charge) for charge in CALLER] == [20, 30, 30]
        cell.extend("borrowed", [charge.costing(15) for charge in CALLER], 1_000, START_US)
        assert [used(cell, charge) for charge in CALLER] == [20, 35, 35]
        cell.settle("borrowed", [charge.costing(4) for charge in CALLER], START_US)
        assert [used(cell, charge) for charge in CALLER] == [20, 24, 24]

    def test_the_end_of_a_borrowed_lease_leaves_the_assured_bucket_alone(self) -> None:
        """What stays charged, and what is told to be held, are the ceiling's and the pool's."""
        cell = idle_pool()
        cell.settle("before", [ASSURED.costing(20)], START_US)
        charges = [charge.costing(10, 4) for charge in CALLER]
        assert isinstance(cell.admit("r", charges, 1, 1, START_US), Admitted)
        cell.reap(START_US + 1_000)
        assert [used(cell, charge, START_US + 1_000) for charge in CALLER] == [20, 4, 4]

    def test_a_pool_that_is_only_counted_refuses_no_borrower(self) -> None:
        """Beyond what is assured the ceiling decides alone, however full the pool is."""
        cell = busy_pool(10**6)
        cell.settle("green", [ASSURED.costing(20)], START_US)
        assert not admitted(cell, "r", ASSURED, CEILING, OTHERS.costing(10)).green

    @pytest.mark.parametrize(("theta", "fits"), [(500, 50), (800, 80), (1000, 100)])
    def test_a_borrower_is_refused_at_its_threshold(self, theta: int, fits: int) -> None:
        """Exactly θ of the pool may be filled with borrowed work."""
        borrower = Charge(POOL, 10, 100, 1200, 1000, Role.POOL, borrow_up_to=theta)
        at_threshold, above = busy_pool(fits - 10), busy_pool(fits - 9)
        assert isinstance(take(at_threshold, "r", borrower), Admitted)
        assert denied(above, "r", borrower).bucket == POOL

    def test_a_threshold_of_0_borrows_nothing(self) -> None:
        """No wait helps, so none is told."""
        assert denied(idle_pool(), "r", WORK._replace(borrow_up_to=0)) == Denied(POOL, None, (100,), (0,))

    def test_the_ceiling_bounds_what_is_borrowed(self) -> None:
        """With an idle pool a caller gets its ceiling and no more."""
        cell, ceiling = idle_pool(), CEILING._replace(capacity=30)
        for i in range(3):
            admitted(cell, f"r{i}", ASSURED, ceiling, WORK)
        assert denied(cell, "r3", ASSURED, ceiling, WORK).bucket == "k:a:t"

    @given(level=st.integers(0, 150), low=st.integers(0, 1000), high=st.integers(0, 1000), cost=st.integers(0, 60))
    def test_a_higher_priority_is_admitted_wherever_a_lower_one_is(
        self, level: int, low: int, high: int, cost: int
    ) -> None:
        """In one state, whoever may fill more of the pool gets in if one who may fill less does."""
        low, high = min(low, high), max(low, high)
        cell = busy_pool(level)
        lower = take(deepcopy(cell), "r", WORK._replace(cost=cost, at_reap=cost, borrow_up_to=low))
        higher = take(cell, "r", WORK._replace(cost=cost, at_reap=cost, borrow_up_to=high))
        assert isinstance(lower, Denied) or isinstance(higher, Admitted)


class TestTold:
    """What a refused borrower is told."""

    def refused(self, pool_level: int) -> Cell:
        """A cell in which the caller's assured bucket is full, and others use so much of the pool."""
        cell = busy_pool(pool_level)
        cell.settle("green", [ASSURED.costing(20)], START_US)
        return cell

    @pytest.mark.parametrize(("pool_level", "told_us", "green"), [(81, 550_000, False), (1_000, 1_000_000, True)])
    def test_the_wait_is_until_it_is_green_or_may_borrow_whichever_is_first(
        self, pool_level: int, told_us: int, green: bool
    ) -> None:
        """The denial names its assured bucket; the wait is exact for both ways in."""
        cell = self.refused(pool_level)
        answer = denied(cell, "r", *CALLER)
        assert (answer.bucket, answer.wait_us) == ("k:a:t", told_us)
        denied(cell, "r", *CALLER, now_us=START_US + told_us - 1)
        assert admitted(cell, "r", *CALLER, now_us=START_US + told_us).green is green

    def test_a_plain_limit_that_takes_longer_is_named(self) -> None:
        """The request could be green before its requests a minute allow it."""
        cell, slow = self.refused(1_000), Charge("k:a:requests", 1, 1, 6)
        cell.settle("before", [slow], START_US)
        answer = denied(cell, "r", slow, *CALLER)
        assert (answer.bucket, answer.wait_us) == ("k:a:requests", 10_000_000)
        denied(cell, "r", slow, *CALLER, now_us=START_US + 9_999_999)
        admitted(cell, "r", slow, *CALLER, now_us=START_US + 10_000_000)

    def test_who_is_assured_nothing_is_told_of_the_pool(self) -> None:
        """A best-effort caller within its own limits is refused by the pool alone, with the pool's wait."""
        cell, plain = busy_pool(90), Charge("k:b:t", 10, 100, 600)
        answer = denied(cell, "r", plain, WORK)
        assert (answer.bucket, answer.wait_us) == (POOL, 1_000_000)
        denied(cell, "r", plain, WORK, now_us=START_US + 999_999)
        admitted(cell, "r", plain, WORK, now_us=START_US + 1_000_000)

    def test_an_assured_bucket_of_capacity_0_leaves_borrowing(self) -> None:
        """Where nothing is assured any more, the wait is the pool's, and exact."""
        cell, nothing = busy_pool(90), ASSURED._replace(capacity=0)
        assert wait_us(cell, "r", nothing, CEILING, WORK) == 1_000_000
        assert not admitted(cell, "r", nothing, CEILING, WORK, now_us=START_US + 1_000_000).green


class TestLostPool:
    """A pool's bucket that Redis has lost."""

    def test_a_pool_that_is_not_stored_starts_full(self) -> None:
        """Nobody knows what is in flight, so borrowers wait until it must have drained, and green ones do not."""
        cell = Cell()
        assert denied(cell, "r", WORK) == Denied(POOL, 1_500_000, (0,), (5_000_000,))
        assert admitted(cell, "green", *CALLER).green
        assert used(cell, WORK) == 110

    def test_a_callers_own_buckets_start_empty(self) -> None:
        """Only the pool stands for what others do."""
        cell = Cell()
        assert [used(cell, charge) for charge in CALLER] == [0, 0, 100]

    def test_what_is_given_back_to_a_lost_pool_is_not_credited(self) -> None:
        """A hold of before the loss has nothing to return to."""
        cell = idle_pool()
        admitted(cell, "r", *CALLER)
        del cell.buckets[POOL]
        cell.settle("r", [charge.costing(0) for charge in CALLER], START_US)
        assert POOL not in cell.buckets
        assert used(cell, WORK) == 100
