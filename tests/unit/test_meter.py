"""The meter's arithmetic and the rule of admission."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.meter import (
    EXACT,
    LONGEST_WAIT_US,
    MINUTE_US,
    NO_EPOCH,
    Admitted,
    Bucket,
    Cell,
    Charge,
    Denied,
    Reading,
    leaked,
    shifted,
)

START_US = 1_700_000_000_000_000
LEASE_MS = 600_000
TICKS_US = st.sampled_from([1, 1000])


def take(cell: Cell, request_id: str, *charges: Charge, now_us: int = START_US, epoch: int = 1) -> Admitted | Denied:
    """Admit under a lease that outlives the test."""
    return cell.admit(request_id, charges, epoch, LEASE_MS, now_us)


class TestCharge:
    """What a charge may be."""

    @pytest.mark.parametrize("field", ["cost", "capacity", "rate"])
    @pytest.mark.parametrize("value", [-1, 1.0, True, None, EXACT])
    def test_refuses_what_could_not_be_counted_exactly(self, field: str, value: Any) -> None:
        """Negative, fractional and too large amounts are named, with the range that would be right."""
        fields = {"bucket": "pool", "cost": 1, "capacity": 1, "rate": 1, field: value}
        with pytest.raises(ValueError, match=f"bucket pool: {field} must be an integer from 0 to"):
            Charge(**fields)

    def test_a_tick_of_a_millisecond_counts_a_thousand_times_further(self) -> None:
        """150 million tokens fit at 1 µs, one more is refused with the way out, and fits at 1 ms."""
        largest = (EXACT - 1) // MINUTE_US
        assert largest > 150_000_000
        Charge("pool", largest, largest, 1)
        with pytest.raises(ValueError, match="a tick of 1000 µs counts further"):
            Charge("pool", largest + 1, 1, 1)
        Charge("pool", (largest + 1) * 1000 - 1000, largest + 1, 1, 1000)

    @pytest.mark.parametrize("tick_us", [0, 10, -1])
    def test_refuses_other_ticks(self, tick_us: int) -> None:
        """A tick divides a minute and is one of the two that were checked."""
        with pytest.raises(ValueError, match="a tick is 1 or 1000 µs"):
            Charge("pool", 1, 1, 1, tick_us)

    def test_costing_changes_the_cost_alone(self) -> None:
        """Usage is told with the charges of admission at another cost."""
        assert Charge("pool", 1, 2, 3, 1000).costing(9) == Charge("pool", 9, 2, 3, 1000)


class TestLeak:
    """How a level falls with time."""

    @given(
        level=st.integers(0, EXACT - 1),
        rate=st.integers(1, 10**9),
        tick_us=TICKS_US,
        steps=st.lists(st.integers(-(10**7), 10**9), max_size=8),
    )
    def test_many_small_leaks_are_one_large_one(self, level: int, rate: int, tick_us: int, steps: list[int]) -> None:
        """Reading a bucket often neither starves nor feeds it, at whatever offset, and time never moves back."""
        charge = Charge("b", 0, 0, rate, tick_us)
        start = Bucket(level, START_US // tick_us, rate, 0, 1)
        often, now_us, latest_us = start, START_US, START_US
        for step in steps:
            now_us += step
            latest_us = max(latest_us, now_us)
            often = leaked(often, charge, now_us)
        assert often == leaked(start, charge, latest_us)

    def test_a_minute_leaks_exactly_the_rate(self) -> None:
        """The rate is tokens a minute, to the unit."""
        charge = Charge("b", 0, 100, 7)
        after = leaked(Bucket(10 * MINUTE_US, START_US, 7, 100, 1), charge, START_US + MINUTE_US)
        assert after.level == 3 * MINUTE_US

    @given(st.integers(0, EXACT - 1), st.integers(1 - EXACT, EXACT - 1))
    def test_a_level_stays_where_doubles_are_exact(self, level: int, amount: int) -> None:
        """Charges stop below 2⁵³ and refunds at 0."""
        assert 0 <= shifted(level, amount) < EXACT
        if 0 <= level + amount < EXACT:
            assert shifted(level, amount) == level + amount


CHARGES = st.builds(Charge, st.just("b"), st.integers(0, 50), st.integers(0, 30), st.integers(1, 10**6), TICKS_US)


class TestAdmission:
    """Who is let in, and what the others are told."""

    @given(CHARGES, st.lists(st.integers(1, 50), max_size=5), st.integers(0, 10**6))
    def test_the_wait_is_tight(self, charge: Charge, earlier: list[int], offset_us: int) -> None:
        """Alone, a refused caller is refused again 1 µs before the wait that it was told is over, and not after it."""
        cell, now_us = Cell(), START_US + offset_us
        for i, cost in enumerate(earlier):
            take(cell, f"before-{i}", charge.costing(cost), now_us=START_US)
        answer = take(cell, "r", charge, now_us=now_us)
        if isinstance(answer, Admitted) or answer.wait_us is None:
            return
        assert answer.wait_us > 0
        assert isinstance(take(cell, "r", charge, now_us=now_us + answer.wait_us - 1), Denied)
        assert isinstance(take(cell, "r", charge, now_us=now_us + answer.wait_us), Admitted)

    @given(st.lists(CHARGES, min_size=1, max_size=4), st.lists(st.integers(0, 10**7), max_size=10))
    def test_all_or_none(self, charges: list[Charge], steps: list[int]) -> None:
        """A refusal changes no level; an admission charges every bucket its full cost."""
        named = [Charge(f"b{i}", *charge[1:]) for i, charge in enumerate(charges)]
        cell, now_us = Cell(), START_US
        for i, step in enumerate([0, *steps]):
            now_us += step
            before = [leaked(cell.rated.get(c.bucket), c, now_us).level for c in named]
            answer = take(cell, f"r{i}", *named, now_us=now_us)
            charged = [c.cost * c.units for c in named] if isinstance(answer, Admitted) else [0] * len(named)
            after = [cell.rated[c.bucket].level for c in named]
            assert after == [level + amount for level, amount in zip(before, charged, strict=True)]

    @given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3 * 10**6)), max_size=40), st.integers(1, 1000))
    def test_never_more_than_burst_and_rate(self, requests: list[tuple[int, int]], rate: int) -> None:
        """What is admitted from a bucket's birth fits into capacity + rate × time, and one oversized excess."""
        capacity, cell, now_us, admitted = 20, Cell(), START_US, 0
        for i, (cost, step) in enumerate(requests):
            now_us += step
            if isinstance(take(cell, f"r{i}", Charge("b", cost, capacity, rate), now_us=now_us), Admitted):
                admitted += cost
            bound = (capacity + max(0, 40 - capacity)) * MINUTE_US + rate * (now_us - START_US)
            assert admitted * MINUTE_US <= bound

    def test_a_request_larger_than_the_bucket_waits_for_it_to_be_empty(self) -> None:
        """It is admitted at level 0, charged in full, and its debt makes the next one wait."""
        cell, large = Cell(), Charge("b", 25, 10, 60)
        take(cell, "small", large.costing(1))
        assert take(cell, "large", large) == Denied("b", 1_000_000, (9,), (1_000_000,))
        assert take(cell, "large", large, now_us=START_US + 1_000_000) == Admitted((0,), (25_000_000,))
        assert take(cell, "next", large.costing(1), now_us=START_US + 1_000_000) == Denied(
            "b", 16_000_000, (0,), (25_000_000,)
        )

    def test_the_longest_wait_binds(self) -> None:
        """Of several short buckets the one to wait for longest is named, in whatever order they stand."""
        cell = Cell()
        slow, fast, gauge = Charge("slow", 10, 10, 10), Charge("fast", 10, 10, 600), Charge("gauge", 1, 1, 0)
        take(cell, "first", slow, fast, gauge)
        for order in ((slow, fast, gauge), (gauge, fast, slow)):
            answer = take(cell, "second", *order)
            assert isinstance(answer, Denied)
            assert (answer.bucket, answer.wait_us) == ("slow", MINUTE_US)

    def test_a_gauge_is_named_only_where_nothing_else_is_short(self) -> None:
        """What is in flight has no exact time to wait for, so a refusal by a gauge tells none."""
        cell, gauge = Cell(), Charge("gauge", 1, 2, 0)
        for i in range(2):
            assert isinstance(take(cell, f"r{i}", gauge), Admitted)
        assert take(cell, "r2", gauge) == Denied("gauge", None, (0,), (0,))

    def test_a_bucket_of_capacity_0_admits_nothing_and_says_so_first(self) -> None:
        """No wait helps where nothing is allowed, so it is named before a bucket that a wait would help."""
        cell, full = Cell(), Charge("full", 5, 5, 60)
        take(cell, "first", full)
        for nothing in (Charge("none", 1, 0, 60), Charge("none", 1, 0, 0)):
            assert take(cell, "second", full, nothing) == Denied("none", None, (0, 0), (5_000_000, 0))
        assert isinstance(take(cell, "free", Charge("none", 0, 0, 60)), Admitted)

    def test_the_same_request_gets_the_same_answer_and_is_charged_once(self) -> None:
        """A repeated call, at whatever later time, is the first one's echo."""
        cell, charge = Cell(), Charge("b", 3, 10, 60)
        first = take(cell, "r", charge)
        assert take(cell, "r", charge, now_us=START_US + 500_000) == first
        assert cell.peek([charge], START_US) == (Reading("b", 3, 7, 3_000_000),)

    def test_a_bucket_may_be_named_once(self) -> None:
        """Two costs for one bucket have no one answer."""
        with pytest.raises(ValueError, match="each bucket may be named once"):
            take(Cell(), "r", Charge("b", 1, 1, 1), Charge("b", 2, 1, 1))

    @pytest.mark.parametrize(("epoch", "lease_ms"), [(-1, 1), (1.0, 1), (EXACT, 1), (1, 0), (1, 0.5), (1, 10**15)])
    def test_epochs_and_leases_are_exact_integers(self, epoch: Any, lease_ms: Any) -> None:
        """An epoch is never negative, a lease lasts at least a millisecond, and neither is a fraction."""
        with pytest.raises(ValueError, match=r"an epoch is an integer from 0|a lease is an integer from 1"):
            Cell().admit("r", [], epoch, lease_ms, START_US)

    def test_a_wait_of_centuries_is_told_as_thirty_years(self) -> None:
        """The longest wait is bounded, so that times stay exact; the debt behind it is not."""
        cell, charge = Cell(), Charge("b", 150_000_000, 1, 1)
        take(cell, "r", charge)
        assert take(cell, "s", charge) == Denied("b", LONGEST_WAIT_US, (0,), (LONGEST_WAIT_US,))


class TestEpochs:
    """Limits that change while a bucket is in use."""

    def test_the_old_rate_holds_until_the_new_one_is_adopted(self) -> None:
        """Time before a change is leaked at the rate of that time, and the debt stays what it was."""
        cell = Cell()
        take(cell, "r", Charge("b", 30, 10, 60))
        later_us = START_US + 10_000_000
        slower = Charge("b", 1, 5, 6)
        assert take(cell, "s", slower, now_us=later_us, epoch=2) == Denied("b", 160_000_000, (0,), (200_000_000,))
        assert cell.rated["b"] == Bucket(20 * MINUTE_US, later_us, 6, 5, 2)

    def test_an_older_epoch_never_overwrites_a_newer(self) -> None:
        """A gateway that lags behind is judged by the limits that the bucket has already seen."""
        cell = Cell()
        take(cell, "r", Charge("b", 5, 5, 60), epoch=2)
        assert isinstance(take(cell, "s", Charge("b", 5, 1000, 6000), epoch=1), Denied)
        assert cell.rated["b"].epoch == 2

    def test_limits_of_no_publication_give_way_to_any(self) -> None:
        """A bucket that a late settlement made takes the first published limits, epoch 0 included."""
        cell = Cell()
        cell.settle("lost", [Charge("b", 3, 1, 1)], START_US)
        assert cell.rated["b"].epoch == NO_EPOCH
        take(cell, "r", Charge("b", 1, 10, 60), epoch=0)
        assert cell.rated["b"] == Bucket(4 * MINUTE_US, START_US, 60, 10, 0)
