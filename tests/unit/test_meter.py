"""The meter's arithmetic, and the rule of admission for one colour."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.cell import Cell
from ratelimit.meter import (
    EXACT,
    LONGEST_WAIT_US,
    LONGEST_WINDOW_S,
    MINUTE_US,
    NO_EPOCH,
    Admitted,
    Bucket,
    Charge,
    Denied,
    Reading,
    Role,
    leaked,
    shifted,
)
from tests.support.meters import START_US, admitted, denied, limits, take, used, wait_us

TICKS_US = st.sampled_from([1, 1000])


class TestCharge:
    """What a charge may be."""

    @pytest.mark.parametrize("field", ["cost", "capacity", "rate"])
    @pytest.mark.parametrize("value", [-1, 1.0, True, None, EXACT])
    def test_refuses_what_could_not_be_counted_exactly(self, field: str, value: Any) -> None:
        """Negative, fractional and too large amounts are named, with the range that would be right."""
        fields = {"bucket": "k:a:requests", "cost": 1, "capacity": 1, "rate": 1, field: value}
        with pytest.raises(ValueError, match=f"bucket k:a:requests: {field} must be an integer from 0 to"):
            Charge(**fields)

    def test_a_tick_of_a_millisecond_counts_a_thousand_times_further(self) -> None:
        """150 million tokens fit at 1 µs, one more is refused with the way out, and fits at 1 ms."""
        largest = (EXACT - 1) // MINUTE_US
        assert largest > 150_000_000
        Charge("o:a:t", largest, largest, 1)
        with pytest.raises(ValueError, match="a tick of 1000 µs counts further"):
            Charge("o:a:t", largest + 1, 1, 1)
        Charge("o:a:t", (largest + 1) * 1000 - 1000, largest + 1, 1, 1000)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"tick_us": 0}, "a tick is 1 or 1000 µs"),
            ({"tick_us": 10}, "a tick is 1 or 1000 µs"),
            ({"bucket": "tokens"}, "is named <scope>:<meter>"),
            ({"bucket": ":tokens"}, "is named <scope>:<meter>"),
            ({"rate": 0, "window_s": -1}, "a window has 1 to"),
            ({"rate": 0, "window_s": LONGEST_WINDOW_S + 1}, "a window has 1 to"),
            ({"rate": 1, "window_s": 60}, "a window has 1 to"),
            ({"role": Role.POOL}, "are for the scope 'pool'"),
            ({"role": Role.COUNTED}, "are for the scope 'pool'"),
            ({"bucket": "pool:work"}, "are for the scope 'pool'"),
            ({"rate": 0, "role": Role.ASSURED}, "ASSURED needs a bucket with a rate"),
            ({"rate": 0, "window_s": 60, "role": Role.CEILING}, "CEILING needs a bucket with a rate"),
            ({"borrow_up_to": 1001}, "borrow_up_to must be an integer from 0 to 1000"),
            ({"borrow_up_to": -1}, "borrow_up_to must be an integer from 0 to 1000"),
            ({"at_reap": 6}, "at_reap must be an integer from 0 to the cost"),
            ({"at_reap": -1}, "at_reap must be an integer from 0 to the cost"),
        ],
    )
    def test_refuses_what_has_no_meaning(self, fields: dict[str, Any], message: str) -> None:
        """Ticks, names, windows, roles and remainders that no rule covers are told apart by their message."""
        with pytest.raises(ValueError, match=message):
            Charge(**{"bucket": "k:a:t", "cost": 5, "capacity": 10, "rate": 1, **fields})

    def test_costing_changes_the_cost_alone(self) -> None:
        """Usage is told with the charges of admission at another cost, and what of it stays at the end of a lease."""
        charge = Charge("pool:work", 1, 2, 3, 1000, Role.POOL, 0, 1, 700)
        assert charge.costing(9) == Charge("pool:work", 9, 2, 3, 1000, Role.POOL, 0, 9, 700)
        assert charge.costing(9, 4) == Charge("pool:work", 9, 2, 3, 1000, Role.POOL, 0, 4, 700)
        with pytest.raises(ValueError, match="cost must be an integer"):
            charge.costing(-1)

    def test_the_kind_says_how_a_bucket_leaks(self) -> None:
        """A leaky bucket is its tick, a window minus its length, a gauge 0."""
        assert Charge("k:a:t", 1, 1, 1).kind == 1
        assert Charge("k:a:t", 1, 1, 1, 1000).kind == 1000
        assert Charge("k:a:t", 1, 1, 0, window_s=60).kind == -60
        assert Charge("k:a:t", 1, 1, 0).kind == 0


class TestLeak:
    """How a level falls with time."""

    @given(
        level=st.integers(0, EXACT - 1),
        rate=st.integers(1, 10**9),
        kind=TICKS_US,
        steps=st.lists(st.integers(-(10**7), 10**9), max_size=8),
    )
    def test_many_small_leaks_are_one_large_one(self, level: int, rate: int, kind: int, steps: list[int]) -> None:
        """Reading a bucket often neither starves nor feeds it, at whatever offset, and time never moves back."""
        start = Bucket(level, START_US // kind, rate, 0, 1, 0, 0, kind)
        often, now_us, latest_us = start, START_US, START_US
        for step in steps:
            now_us += step
            latest_us = max(latest_us, now_us)
            often = leaked(often, now_us)
        assert often == leaked(start, latest_us)

    def test_a_minute_leaks_exactly_the_rate(self) -> None:
        """The rate is tokens a minute, to the unit."""
        assert leaked(Bucket(10 * MINUTE_US, START_US, 7, 100, 1, 0, 0, 1), START_US + MINUTE_US).level == 3 * MINUTE_US

    @given(st.integers(0, EXACT - 1), st.integers(1 - EXACT, EXACT - 1))
    def test_a_level_stays_where_doubles_are_exact(self, level: int, amount: int) -> None:
        """Charges stop below 2⁵³ and refunds at 0."""
        assert 0 <= shifted(level, amount) < EXACT
        if 0 <= level + amount < EXACT:
            assert shifted(level, amount) == level + amount


class TestAdmission:
    """Who is let in, and what the others are told."""

    def test_a_request_larger_than_the_bucket_waits_for_it_to_be_empty(self) -> None:
        """It is admitted at level 0, charged in full, and its debt makes the next one wait."""
        cell, large = Cell(), Charge("k:a:t", 25, 10, 60)
        admitted(cell, "small", large.costing(1))
        assert take(cell, "large", large) == Denied("k:a:t", 1_000_000, (9,), (1_000_000,))
        assert take(cell, "large", large, now_us=START_US + 1_000_000) == Admitted((0,), (25_000_000,))
        assert wait_us(cell, "next", large.costing(1), now_us=START_US + 1_000_000) == 16_000_000

    def test_the_longest_wait_binds(self) -> None:
        """Of several short buckets the one to wait for longest is named, in whatever order they stand."""
        slow, fast, gauge = Charge("k:a:slow", 10, 10, 10), Charge("k:a:fast", 10, 10, 600), Charge("k:a:g", 1, 1, 0)
        for order in ((slow, fast, gauge), (gauge, fast, slow)):
            cell = Cell()
            admitted(cell, "first", slow, fast, gauge)
            answer = denied(cell, "second", *order)
            assert (answer.bucket, answer.wait_us) == ("k:a:slow", MINUTE_US)

    def test_a_gauge_is_named_only_where_nothing_else_is_short(self) -> None:
        """What is in flight has no exact time to wait for, so a refusal by a gauge tells none."""
        cell, gauge = Cell(), Charge("k:a:g", 1, 2, 0)
        for i in range(2):
            admitted(cell, f"r{i}", gauge)
        assert take(cell, "r2", gauge) == Denied("k:a:g", None, (0,), (0,))

    @pytest.mark.parametrize("fields", [(0, 60), (0, 0), (0, 0, 1, Role.PLAIN, 60)])
    def test_a_bucket_of_capacity_0_admits_nothing_and_says_so_first(self, fields: tuple[Any, ...]) -> None:
        """No wait helps where nothing is allowed, so it is named before a bucket that a wait would help."""
        cell, full, nothing = Cell(), Charge("k:a:full", 5, 5, 60), Charge("k:a:none", 1, *fields)
        admitted(cell, "first", full)
        assert take(cell, "second", full, nothing) == Denied("k:a:none", None, (0, 0), (5_000_000, 0))
        admitted(cell, "free", nothing.costing(0))

    def test_the_same_request_gets_the_same_answer_and_is_charged_once(self) -> None:
        """A repeated call, at whatever later time, is the first one's echo."""
        cell, charge = Cell(), Charge("k:a:t", 3, 10, 60)
        first = take(cell, "r", charge)
        assert take(cell, "r", charge, now_us=START_US + 500_000) == first
        assert cell.peek([charge], START_US) == (Reading("k:a:t", 3, 7, 3_000_000),)

    def test_a_bucket_may_be_named_once(self) -> None:
        """Two costs for one bucket have no one answer."""
        with pytest.raises(ValueError, match="each bucket may be named once"):
            take(Cell(), "r", Charge("k:a:t", 1, 1, 1), Charge("k:a:t", 2, 1, 1))

    @pytest.mark.parametrize(("epoch", "lease_ms"), [(-1, 1), (1.0, 1), (EXACT, 1), (1, 0), (1, 0.5), (1, 10**15)])
    def test_epochs_and_leases_are_exact_integers(self, epoch: Any, lease_ms: Any) -> None:
        """An epoch is never negative, a lease lasts at least a millisecond, and neither is a fraction."""
        with pytest.raises(ValueError, match=r"an epoch is an integer from 0|a lease is an integer from 1"):
            Cell().admit("r", [], epoch, lease_ms, START_US)

    def test_a_wait_of_centuries_is_told_as_thirty_years(self) -> None:
        """The longest wait is bounded, so that times stay exact; the debt behind it is not."""
        cell, charge = Cell(), Charge("k:a:t", 150_000_000, 1, 1)
        admitted(cell, "r", charge)
        assert take(cell, "s", charge) == Denied("k:a:t", LONGEST_WAIT_US, (0,), (LONGEST_WAIT_US,))


class TestGaming:
    """What a caller tries in order to get more than its limits."""

    def test_cancelling_banks_nothing(self) -> None:
        """Holding much and giving it all back, over and over, leaves a bucket that is no emptier than unused."""
        cell, charge = Cell(), Charge("k:a:t", 10, 10, 60)
        for i in range(100):
            now_us = START_US + i * 1_000_000
            admitted(cell, f"cancelled-{i}", charge, now_us=now_us)
            cell.settle(f"cancelled-{i}", [charge.costing(0)], now_us)
        end_us = START_US + 100_000_000
        admitted(cell, "burst", charge, now_us=end_us)
        assert wait_us(cell, "more", charge.costing(1), now_us=end_us) == 1_000_000

    def test_a_refund_after_the_hold_leaked_away_is_worth_nothing(self) -> None:
        """Whoever holds, waits for the hold to leak and then cancels has not saved anything up."""
        cell, charge = Cell(), Charge("k:a:t", 10, 10, 60)
        admitted(cell, "held", charge)
        later_us = START_US + 10_000_000
        admitted(cell, "burst", charge, now_us=later_us)
        cell.settle("held", [charge.costing(0)], later_us)
        assert used(cell, charge, later_us) == 0
        admitted(cell, "again", charge, now_us=later_us)
        assert wait_us(cell, "third", charge, now_us=later_us) == 10_000_000

    @given(st.integers(1, 40), st.integers(1, 60))
    def test_many_keys_of_one_org_share_its_bucket(self, keys: int, seconds: int) -> None:
        """However many keys an org makes, together they pass its burst and its rate, and no more."""
        cell, capacity, rate = Cell(), 20, 120
        passed = 0
        for second in range(seconds):
            for key in range(keys):
                own = Charge(f"k:{key}:t", 1, 5, 60)
                org = Charge("o:x:t", 1, capacity, rate)
                answer = take(cell, f"{second}-{key}", own, org, now_us=START_US + second * 1_000_000)
                passed += isinstance(answer, Admitted)
        assert passed <= capacity + rate * (seconds - 1) // 60

    def test_huge_prompts_that_are_refused_cost_nobody_room(self) -> None:
        """Refused requests, however large and however many, leave a small caller's admission as it was."""
        cell, charge = Cell(), Charge("o:x:t", 5, 10, 60)
        admitted(cell, "first", charge)
        for i in range(100):
            denied(cell, f"huge-{i}", charge.costing(10**6))
        admitted(cell, "small", charge)


class TestEpochs:
    """Limits that change while a bucket is in use."""

    def test_the_old_rate_holds_until_the_new_one_is_adopted(self) -> None:
        """Time before a change is leaked at the rate of that time, and the debt stays what it was."""
        cell = Cell()
        admitted(cell, "r", Charge("k:a:t", 30, 10, 60))
        later_us = START_US + 10_000_000
        slower = Charge("k:a:t", 1, 5, 6)
        assert take(cell, "s", slower, now_us=later_us, epoch=2) == Denied("k:a:t", 160_000_000, (0,), (200_000_000,))
        assert limits(cell.buckets["k:a:t"]) == (20 * MINUTE_US, later_us, 6, 5, 2)

    def test_an_older_epoch_never_overwrites_a_newer(self) -> None:
        """A gateway that lags behind is judged by the limits that the bucket has already seen."""
        cell = Cell()
        take(cell, "r", Charge("k:a:t", 5, 5, 60), epoch=2)
        assert isinstance(take(cell, "s", Charge("k:a:t", 5, 1000, 6000), epoch=1), Denied)
        assert limits(cell.buckets["k:a:t"])[2:] == (60, 5, 2)

    def test_limits_of_no_publication_give_way_to_any(self) -> None:
        """A bucket that a late settlement made takes the first published limits, epoch 0 included."""
        cell = Cell()
        cell.settle("lost", [Charge("k:a:t", 3, 1, 1)], START_US)
        assert cell.buckets["k:a:t"].epoch == NO_EPOCH
        take(cell, "r", Charge("k:a:t", 1, 10, 60), epoch=0)
        assert limits(cell.buckets["k:a:t"]) == (4 * MINUTE_US, START_US, 60, 10, 0)

    def test_configure_puts_limits_in_force_at_once(self) -> None:
        """Before anybody is admitted under them, and never those of an older epoch."""
        cell, charge = Cell(), Charge("k:a:t", 5, 10, 60)
        take(cell, "r", charge, epoch=2)
        later_us = START_US + 1_000_000
        cell.configure([Charge("k:a:t", 0, 4, 6), Charge("pool:work", 0, 9, 6, 1000, Role.POOL)], 3, later_us)
        assert limits(cell.buckets["k:a:t"]) == (4 * MINUTE_US, later_us, 6, 4, 3)
        assert limits(cell.buckets["pool:work"]) == (9 * MINUTE_US // 1000, later_us // 1000, 6, 9, 3)
        cell.configure([Charge("k:a:t", 0, 99, 99)], 2, later_us)
        assert limits(cell.buckets["k:a:t"])[2:] == (6, 4, 3)

    def test_peek_changes_nothing(self) -> None:
        """Looking at a bucket neither makes it nor gives it the limits that one asks by."""
        cell, charge = Cell(), Charge("k:a:t", 5, 10, 60)
        take(cell, "r", charge)
        before = dict(cell.buckets)
        assert cell.peek([charge._replace(capacity=6), Charge("k:b:t", 0, 7, 60)], START_US + 1_000_000) == (
            Reading("k:a:t", 4, 2, 4_000_000),
            Reading("k:b:t", 0, 7, 0),
        )
        assert cell.buckets == before
