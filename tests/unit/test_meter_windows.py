"""Fixed windows: from the first use, all there again at once, with what was overrun carried over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ratelimit.cell import Cell
from ratelimit.meter import Admitted, Charge, Denied
from tests.support.meters import START_US, admitted, denied, take, used, wait_us

WINDOW_S = 18_000
WINDOW_US = WINDOW_S * 1_000_000
ROLL_US = START_US + WINDOW_US
SPENT = Charge("k:a:t.5h", 60, 100, 0, window_s=WINDOW_S)


def test_a_window_opens_at_its_first_use_and_ends_exactly_so_much_later() -> None:
    """The reset that is told is the moment at which all is there again, and 1 µs before it nothing is."""
    cell = Cell()
    assert take(cell, "r", SPENT) == Admitted((40,), (WINDOW_US,))
    later_us = START_US + 1_000_000
    assert take(cell, "s", SPENT, now_us=later_us) == Denied(
        "k:a:t.5h", ROLL_US - later_us, (40,), (ROLL_US - later_us,)
    )
    assert take(cell, "s", SPENT, now_us=ROLL_US - 1) == Denied("k:a:t.5h", 1, (40,), (1,))
    assert take(cell, "s", SPENT, now_us=ROLL_US) == Admitted((40,), (WINDOW_US,))


def test_nothing_comes_back_within_a_window() -> None:
    """It does not leak: the whole amount is all there is, whenever in the window it is asked for."""
    cell = Cell()
    for i in range(5):
        admitted(cell, f"r{i}", SPENT.costing(20), now_us=START_US + i * WINDOW_US // 5)
    denied(cell, "more", SPENT.costing(1), now_us=ROLL_US - 1)
    admitted(cell, "more", SPENT.costing(100), now_us=ROLL_US)


def test_the_next_window_opens_at_its_own_first_use() -> None:
    """After a pause the reset is told from the use that opened the window, not from an unused one before it."""
    cell = Cell()
    admitted(cell, "r", SPENT)
    pause_us = START_US + 3 * WINDOW_US + 777
    assert take(cell, "s", SPENT, now_us=pause_us) == Admitted((40,), (WINDOW_US,))
    assert wait_us(cell, "t", SPENT, now_us=pause_us + 5) == WINDOW_US - 5


def test_a_settlement_within_the_window_gives_back() -> None:
    """What was held and not used may be used again in the same window."""
    cell = Cell()
    admitted(cell, "r", SPENT)
    cell.settle("r", [SPENT.costing(10)], ROLL_US - 1)
    assert used(cell, SPENT, ROLL_US - 1) == 10


def test_a_settlement_after_the_roll_credits_nothing() -> None:
    """A hold of the last window has nothing to give back to this one, whether or not this one was used before."""
    for opened_us in (ROLL_US, ROLL_US + 5):
        cell = Cell()
        admitted(cell, "old", SPENT)
        admitted(cell, "new", SPENT.costing(30), now_us=opened_us)
        cell.settle("old", [SPENT.costing(0)], opened_us)
        assert used(cell, SPENT, opened_us) == 30


def test_a_settlement_after_the_roll_gives_back_what_the_new_window_took_over() -> None:
    """A hold beyond the last window's amount weighs on this one, until it is known that it was not used; once."""
    cell = Cell()
    for name in ("first", "second"):
        cell.admit(name, [SPENT.costing(0)], 1, 2 * WINDOW_S * 1_000, START_US)
        cell.extend(name, [SPENT.costing(80)], 2 * WINDOW_S * 1_000, START_US)
    admitted(cell, "new", SPENT.costing(30), now_us=ROLL_US)
    assert used(cell, SPENT, ROLL_US) == 60 + 30
    cell.settle("first", [SPENT.costing(0)], ROLL_US)
    assert used(cell, SPENT, ROLL_US) == 30
    cell.settle("second", [SPENT.costing(0)], ROLL_US)
    assert used(cell, SPENT, ROLL_US) == 30


def test_a_lease_that_ends_after_the_roll_credits_nothing() -> None:
    """Reaping refunds by the same rule as a settlement."""
    cell = Cell()
    cell.admit("old", [SPENT.costing(60, 0)], 1, WINDOW_S * 1_000 + 1, START_US)
    admitted(cell, "new", SPENT.costing(20), now_us=ROLL_US)
    assert cell.reap(ROLL_US + 1_000) == 1
    assert used(cell, SPENT, ROLL_US + 1_000) == 20


def test_an_overrun_across_the_roll_is_charged_to_the_new_window() -> None:
    """Tokens that were made after the roll count after it."""
    cell = Cell()
    admitted(cell, "r", SPENT)
    cell.extend("r", [SPENT.costing(75)], 1_000, ROLL_US)
    assert used(cell, SPENT, ROLL_US) == 15
    cell.settle("r", [SPENT.costing(90)], ROLL_US + 1)
    assert used(cell, SPENT, ROLL_US + 1) == 30


def test_debt_above_the_capacity_carries_over() -> None:
    """What was used beyond a window's amount is taken from the next one's, and the wait tells how many there are."""
    cell = Cell()
    admitted(cell, "r", SPENT)
    cell.settle("r", [SPENT.costing(260)], START_US)
    assert wait_us(cell, "s", SPENT.costing(40)) == 2 * WINDOW_US
    assert wait_us(cell, "s", SPENT.costing(41)) == 3 * WINDOW_US
    assert denied(cell, "s", SPENT, now_us=ROLL_US) == Denied("k:a:t.5h", 2 * WINDOW_US, (0,), (2 * WINDOW_US,))
    assert used(cell, SPENT, ROLL_US) == 160
    denied(cell, "s", SPENT.costing(40), now_us=ROLL_US + WINDOW_US - 1)
    admitted(cell, "s", SPENT.costing(40), now_us=ROLL_US + WINDOW_US)


def test_a_clock_that_steps_back_reopens_no_window() -> None:
    """The window that was open stays open, for as much longer as the clock takes to come back."""
    cell = Cell()
    admitted(cell, "r", SPENT)
    earlier_us = START_US - 1_000_000
    assert wait_us(cell, "s", SPENT, now_us=earlier_us) == WINDOW_US + 1_000_000
    admitted(cell, "s", SPENT, now_us=ROLL_US)


def test_a_crowd_is_told_the_end_of_the_window() -> None:
    """A window comes back for all at one moment, so all are told it; there is no line to stand in."""
    cell = Cell()
    admitted(cell, "r", SPENT.costing(100))
    assert {wait_us(cell, f"r{i}", SPENT) for i in range(10)} == {WINDOW_US}


@given(
    costs=st.lists(st.integers(1, 150), max_size=12),
    cost=st.integers(0, 150),
    offset_us=st.integers(0, 3 * WINDOW_US),
)
def test_the_wait_is_tight(costs: list[int], cost: int, offset_us: int) -> None:
    """Whatever the debt, a refused caller is refused 1 µs before the time it was told, and admitted at it."""
    cell, now_us = Cell(), START_US + offset_us
    for i, spent in enumerate(costs):
        cell.settle(f"r{i}", [SPENT.costing(spent)], START_US)
    answer = take(cell, "r", SPENT.costing(cost), now_us=now_us)
    if isinstance(answer, Denied):
        assert answer.wait_us is not None
        denied(cell, "r", SPENT.costing(cost), now_us=now_us + answer.wait_us - 1)
        admitted(cell, "r", SPENT.costing(cost), now_us=now_us + answer.wait_us)
