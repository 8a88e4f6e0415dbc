"""The life of a reservation: held, extended, settled, reaped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.cell import (
    OPEN,
    REAPED,
    REAPED_KEPT_US,
    REAPED_PER_ADMIT,
    SETTLED,
    TOMBSTONE_US,
    Cell,
    UsageEntry,
)
from ratelimit.meter import Admitted, Charge
from tests.support.meters import START_US, used

LEASE_MS = 60_000
LEASE_END_US = START_US + LEASE_MS * 1000
TOKENS = Charge("k:a:tokens", 10, 100, 1)
GAUGE = Charge("k:a:concurrency", 1, 8, 0)


def held_cell() -> Cell:
    """A cell with request ``r`` open: 10 tokens and a place in flight."""
    cell = Cell()
    assert isinstance(cell.admit("r", [TOKENS, GAUGE], 1, LEASE_MS, START_US, b"memo"), Admitted)
    return cell


class TestSettle:
    """What was used replaces what was held."""

    @given(hold=st.integers(0, 100), actual=st.integers(0, 500), others=st.integers(0, 100))
    def test_the_level_becomes_what_was_used(self, hold: int, actual: int, others: int) -> None:
        """However hold and usage compare, admitted or not, the level is as if the usage had been charged at once."""
        cell = Cell()
        cell.admit("other", [TOKENS.costing(others)], 1, LEASE_MS, START_US)
        cell.admit("r", [TOKENS.costing(hold)], 1, LEASE_MS, START_US)
        cell.settle("r", [TOKENS.costing(actual)], START_US)
        assert used(cell, TOKENS) == others + actual

    def test_the_first_settlement_wins(self) -> None:
        """A repeated settlement, whatever it says, changes nothing and is told so."""
        cell = held_cell()
        assert cell.settle("r", [TOKENS.costing(4)], START_US)
        assert not cell.settle("r", [TOKENS.costing(90)], START_US)
        assert used(cell, TOKENS) == 4

    def test_what_is_not_named_stays_as_held_and_gauges_are_given_back(self) -> None:
        """Unknown usage refunds no tokens, and the request is no longer in flight."""
        cell = held_cell()
        cell.settle("r", [], START_US)
        assert (used(cell, TOKENS), used(cell, GAUGE)) == (10, 0)

    def test_a_named_gauge_is_given_back_too(self) -> None:
        """A settled request is not in flight, whatever its settlement says."""
        cell = held_cell()
        cell.settle("r", [GAUGE], START_US)
        assert used(cell, GAUGE) == 0

    def test_an_unknown_request_is_charged_in_its_rated_buckets(self) -> None:
        """Where Redis lost the reservation, usage still counts once, and nothing is in flight for it."""
        cell = Cell()
        assert cell.settle("lost", [TOKENS, GAUGE], START_US)
        assert not cell.settle("lost", [TOKENS, GAUGE], START_US)
        assert (used(cell, TOKENS), used(cell, GAUGE)) == (10, 0)

    def test_an_admission_after_its_own_settlement_charges_nothing(self) -> None:
        """Calls that overtake each other count once: the request has already paid."""
        cell = Cell()
        cell.settle("r", [TOKENS], START_US)
        answer = cell.admit("r", [TOKENS, GAUGE], 1, LEASE_MS, START_US)
        assert answer == Admitted((90, 8), (600_000_000, 0), green=False)
        assert not cell.leases.at
        assert (used(cell, TOKENS), used(cell, GAUGE)) == (10, 0)

    def test_a_refund_never_makes_a_level_negative(self) -> None:
        """A hold that has leaked away leaves nothing to give back: no one saves up beyond the burst."""
        cell = Cell()
        fast = Charge("k:a:tokens", 10, 100, 60)
        cell.admit("r", [fast], 1, LEASE_MS, START_US)
        cell.settle("r", [fast.costing(0)], START_US + 30_000_000)
        assert cell.buckets["k:a:tokens"].level == 0


class TestExtend:
    """What is held may change while the request runs."""

    @given(st.lists(st.integers(0, 300), min_size=1, max_size=6))
    def test_the_last_amount_counts(self, amounts: list[int]) -> None:
        """Up is charged without asking, debt included, down is given back."""
        cell = held_cell()
        for amount in amounts:
            assert cell.extend("r", [TOKENS.costing(amount)], LEASE_MS, START_US)
        assert (used(cell, TOKENS), used(cell, GAUGE)) == (amounts[-1], 1)

    def test_the_lease_is_renewed(self) -> None:
        """A request that still reports is not reaped at the end of its first lease."""
        cell = held_cell()
        cell.extend("r", [], LEASE_MS, LEASE_END_US - 1)
        assert cell.reap(LEASE_END_US) == 0
        assert cell.reap(LEASE_END_US - 1 + LEASE_MS * 1000) == 1

    def test_what_is_unknown_or_settled_is_not_opened(self) -> None:
        """Nothing is charged for a request that nobody admitted, or that has paid."""
        cell = held_cell()
        cell.settle("r", [], START_US)
        assert not cell.extend("r", [TOKENS.costing(90)], LEASE_MS, START_US)
        assert not cell.extend("unknown", [TOKENS.costing(90)], LEASE_MS, START_US)
        assert used(cell, TOKENS) == 10

    def test_a_bucket_that_was_not_held_is_left_alone(self) -> None:
        """A limit that arrived while the request ran counts for the next one."""
        cell = held_cell()
        late = Charge("k:a:late", 7, 100, 1)
        cell.extend("r", [late], LEASE_MS, START_US)
        cell.settle("r", [late.costing(5)], START_US)
        assert "k:a:late" not in cell.buckets

    def test_a_hold_is_what_was_last_reported(self) -> None:
        """A settlement corrects from there, and the end of a lease leaves what that report said."""
        cell = held_cell()
        cell.extend("r", [TOKENS.costing(40, 30)], LEASE_MS, START_US)
        cell.reap(LEASE_END_US)
        assert cell.buckets["k:a:tokens"].level == 30 * TOKENS.units - LEASE_MS * 1000
        cell.settle("r", [TOKENS.costing(35)], LEASE_END_US)
        assert cell.buckets["k:a:tokens"].level == 35 * TOKENS.units - LEASE_MS * 1000


class TestReap:
    """What nobody settles ends with its lease."""

    def test_tokens_stay_charged_and_gauges_are_given_back(self) -> None:
        """A gateway that died leaves what it last reported, and nothing in flight."""
        cell = held_cell()
        assert cell.reap(LEASE_END_US - 1) == 0
        assert cell.reap(LEASE_END_US) == 1
        assert cell.reservations["r"].phase == REAPED
        assert cell.buckets["k:a:tokens"].level == TOKENS.cost * TOKENS.units
        assert used(cell, GAUGE, LEASE_END_US) == 0

    def test_a_late_settlement_corrects_it(self) -> None:
        """What was taken for dead settles to its true usage, its place in flight given back once."""
        cell = held_cell()
        cell.admit("other", [GAUGE], 1, 10 * LEASE_MS, START_US)
        cell.reap(LEASE_END_US)
        assert cell.settle("r", [TOKENS.costing(4)], LEASE_END_US)
        assert (used(cell, TOKENS, LEASE_END_US), used(cell, GAUGE, LEASE_END_US)) == (3, 1)
        assert cell.reservations["r"].phase == SETTLED

    def test_a_late_extension_opens_it_again(self) -> None:
        """A gateway that was only slow has its request in flight again, under a new lease."""
        cell = held_cell()
        cell.reap(LEASE_END_US)
        assert cell.extend("r", [TOKENS.costing(20)], LEASE_MS, LEASE_END_US)
        assert cell.reservations["r"].phase == OPEN
        assert (used(cell, TOKENS, LEASE_END_US), used(cell, GAUGE, LEASE_END_US)) == (19, 1)
        assert cell.reap(LEASE_END_US + LEASE_MS * 1000) == 1

    def test_admissions_reap_a_few_each(self) -> None:
        """Traffic clears away what is dead, a bounded number at a time, so that no one admission pays for all."""
        cell = Cell()
        for i in range(3 * REAPED_PER_ADMIT):
            cell.admit(f"dead-{i}", [GAUGE.costing(0), TOKENS.costing(0)], 1, LEASE_MS, START_US)
        cell.admit("next", [TOKENS], 1, LEASE_MS, LEASE_END_US)
        assert sum(r.phase == REAPED for r in cell.reservations.values()) == REAPED_PER_ADMIT

    def test_part_of_a_hold_may_end_with_the_lease(self) -> None:
        """What a dead gateway cannot have used any more is given back, the rest stays charged."""
        cell = Cell()
        cell.admit("r", [TOKENS.costing(50, 20)], 1, LEASE_MS, START_US)
        cell.reap(LEASE_END_US)
        assert cell.buckets["k:a:tokens"].level == 20 * TOKENS.units - LEASE_MS * 1000

    def test_a_lost_gauge_has_nothing_to_give_back(self) -> None:
        """A scope that Redis lost is not made again by what ends, and is by what goes on."""
        cell = held_cell()
        cell.buckets.clear()
        cell.reap(LEASE_END_US)
        assert not cell.buckets
        cell.extend("r", [], LEASE_MS, LEASE_END_US)
        assert used(cell, GAUGE, LEASE_END_US) == 1

    def test_nothing_is_remembered_for_ever(self) -> None:
        """Settled and reaped requests are forgotten after a bounded time; a settled one is unknown then."""
        cell = held_cell()
        cell.admit("s", [TOKENS, GAUGE], 1, LEASE_MS, START_US)
        cell.settle("s", [], START_US)
        assert not cell.settle("s", [], START_US + TOMBSTONE_US - 1)
        assert cell.settle("s", [], START_US + TOMBSTONE_US)
        cell.reap(LEASE_END_US)
        assert cell.reap(LEASE_END_US + REAPED_KEPT_US) == 1
        assert "r" not in cell.reservations
        assert not cell.leases.at


class TestUsage:
    """What the usage stream gets."""

    def test_the_first_settlement_writes_its_record(self) -> None:
        """Once, and nothing where none was given."""
        cell = held_cell()
        cell.settle("r", [TOKENS], START_US, b"first")
        cell.settle("r", [TOKENS], START_US, b"second")
        cell.settle("unknown", [TOKENS], START_US, b"lost")
        cell.settle("other", [TOKENS], START_US)
        assert cell.usage == [UsageEntry(b"first"), UsageEntry(b"lost")]

    def test_what_nobody_settles_is_told_with_its_memo(self) -> None:
        """Only when it is forgotten, so that a late settlement is the only record; gauges are no usage."""
        cell = held_cell()
        cell.extend("r", [TOKENS.costing(30, 25)], LEASE_MS, START_US)
        cell.reap(LEASE_END_US)
        cell.reap(LEASE_END_US + REAPED_KEPT_US - 1)
        assert cell.usage == []
        cell.reap(LEASE_END_US + REAPED_KEPT_US)
        assert cell.usage == [UsageEntry(expired=b"memo", held=(("k:a:tokens", 25),))]

    def test_a_late_settlement_is_the_only_record(self) -> None:
        """A reservation that was reaped and then settled is not told as expired."""
        cell = held_cell()
        cell.reap(LEASE_END_US)
        cell.settle("r", [TOKENS], LEASE_END_US, b"late")
        cell.reap(LEASE_END_US + 2 * REAPED_KEPT_US)
        assert cell.usage == [UsageEntry(b"late")]


def test_a_bucket_may_be_named_once() -> None:
    """Two amounts for one bucket have no one meaning, and change nothing."""
    cell = held_cell()
    with pytest.raises(ValueError, match="each bucket may be named once"):
        cell.extend("r", [TOKENS, TOKENS], LEASE_MS, START_US)
    with pytest.raises(ValueError, match="each bucket may be named once"):
        cell.settle("r", [TOKENS, TOKENS], START_US)
    assert used(cell, TOKENS) == 10
