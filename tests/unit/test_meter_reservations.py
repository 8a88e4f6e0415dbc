"""The life of a reservation: held, extended, settled, reaped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ratelimit.meter import OPEN, REAPED, REAPED_PER_ADMIT, SETTLED, TOMBSTONE_US, Admitted, Cell, Charge

START_US = 1_700_000_000_000_000
LEASE_MS = 60_000
LEASE_END_US = START_US + LEASE_MS * 1000
TOKENS = Charge("tokens", 10, 100, 1)
GAUGE = Charge("gauge", 1, 8, 0)


def used(cell: Cell, charge: Charge, now_us: int = START_US) -> int:
    """Tokens that a bucket counts as used."""
    return cell.peek([charge], now_us)[0].used


def held_cell() -> Cell:
    """A cell with request ``r`` open: 10 tokens and a place in flight."""
    cell = Cell()
    assert isinstance(cell.admit("r", [TOKENS, GAUGE], 1, LEASE_MS, START_US), Admitted)
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
        assert cell.admit("r", [TOKENS, GAUGE], 1, LEASE_MS, START_US) == Admitted((90, 8), (600_000_000, 0))
        assert (used(cell, TOKENS), used(cell, GAUGE)) == (10, 0)

    def test_a_refund_never_makes_a_level_negative(self) -> None:
        """A hold that has leaked away leaves nothing to give back: no one saves up beyond the burst."""
        cell = Cell()
        fast = Charge("tokens", 10, 100, 60)
        cell.admit("r", [fast], 1, LEASE_MS, START_US)
        cell.settle("r", [fast.costing(0)], START_US + 30_000_000)
        assert cell.rated["tokens"].level == 0


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

    def test_a_bucket_that_was_not_held_is_charged(self) -> None:
        """A limit that arrived while the request ran counts from then on."""
        cell = held_cell()
        late = Charge("late", 7, 100, 1)
        cell.extend("r", [late], LEASE_MS, START_US)
        cell.settle("r", [late.costing(5)], START_US)
        assert used(cell, late) == 5


class TestReap:
    """What nobody settles ends with its lease."""

    def test_tokens_stay_charged_and_gauges_are_given_back(self) -> None:
        """A gateway that died leaves what it last reported, and nothing in flight."""
        cell = held_cell()
        assert cell.reap(LEASE_END_US - 1) == 0
        assert cell.reap(LEASE_END_US) == 1
        assert cell.reservations["r"].phase == REAPED
        assert cell.rated["tokens"].level == TOKENS.cost * TOKENS.units
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

    def test_nothing_is_remembered_for_ever(self) -> None:
        """Settled and reaped requests are forgotten after a bounded time, gauges as soon as they are at 0."""
        cell = held_cell()
        cell.admit("s", [TOKENS, GAUGE], 1, LEASE_MS, START_US)
        cell.settle("s", [], START_US)
        cell.reap(LEASE_END_US)
        cell.reap(LEASE_END_US + TOMBSTONE_US)
        assert (cell.reservations, cell.gauges, cell.leases.at, cell.tombstones.at) == ({}, {}, {}, {})


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["admit", "extend", "settle", "reap"]), st.integers(0, 30_000)),
        max_size=60,
    )
)
def test_a_gauge_counts_what_is_open(calls: list[tuple[int, str, int]]) -> None:
    """After any calls the gauge is the number of open reservations, and 0 once all leases are over."""
    cell, now_us = Cell(), START_US
    for request, call, step_ms in calls:
        now_us += step_ms * 1000
        if call == "admit":
            cell.admit(f"r{request}", [GAUGE], 1, LEASE_MS, now_us)
        elif call == "extend":
            cell.extend(f"r{request}", [], LEASE_MS, now_us)
        elif call == "settle":
            cell.settle(f"r{request}", [], now_us)
        else:
            cell.reap(now_us)
        assert used(cell, GAUGE, now_us) == sum(r.phase == OPEN for r in cell.reservations.values())
    cell.reap(now_us + LEASE_MS * 1000)
    assert used(cell, GAUGE, now_us) == 0
