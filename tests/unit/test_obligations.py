"""The fifteen proof obligations of the limiter, on the reference model.

The state machine of ``tests/support/histories.py`` holds 1 to 4, 6, 7, 10, 12 and 13 over any history; each has a test
of its own here too, which says what it is about. ``tests/integration/test_obligations.py`` proves them of Redis.
"""

from __future__ import annotations

from copy import deepcopy
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from ratelimit.cell import OPEN, TOMBSTONE_US, Cell
from ratelimit.meter import MINUTE_US, Admitted, Charge, Denied, Role, leaked
from ratelimit.outage import SAFE_SHARE, LocalLimits
from tests.support.histories import Histories
from tests.support.meters import POOL, START_US, admitted, denied, take, used
from tests.support.players import CellPlayer

LEASE_MS = 60_000
LEASE_US = LEASE_MS * 1_000
TOKENS = Charge("k:a:t", 0, 20, 600)
GAUGE = Charge("k:a:concurrency", 1, 5, 0)
COSTS = st.integers(0, 30)
STEPS_US = st.integers(0, 2_000_000)


class CellHistories(Histories):
    """Histories of the model."""

    def player(self) -> CellPlayer:
        return CellPlayer()


def test_obligations_over_any_history() -> None:
    """1 to 4, 6, 7, 10, 12 and 13 hold whatever callers, clocks, limits, crashes and losses do."""
    run_state_machine_as_test(CellHistories, settings=settings(max_examples=150, stateful_step_count=40))


@given(st.lists(st.tuples(STEPS_US, COSTS, st.integers(0, 60)), max_size=30), st.integers(1, 40))
def test_obligation_01_conservation(requests: list[tuple[int, int, int]], capacity: int) -> None:
    """All that was charged and is held ≤ capacity + rate × time + the overruns of streams + the largest excess."""
    cell, now_us, charge = Cell(), START_US, TOKENS._replace(capacity=capacity)
    taken: list[tuple[int, int]] = []
    for i, (step_us, cost, uses) in enumerate(requests):
        now_us += step_us
        if isinstance(take(cell, f"r{i}", charge.costing(cost), now_us=now_us), Admitted):
            taken.append((cost, uses))
            cell.extend(f"r{i}", [charge.costing(uses)], LEASE_MS, now_us)
        overruns = sum(max(0, uses - cost) for cost, uses in taken)
        excess = max((cost - capacity for cost, _ in taken), default=0)
        bound = Fraction(capacity + overruns + max(0, excess)) + Fraction(charge.rate * (now_us - START_US), MINUTE_US)
        assert sum(uses for _, uses in taken) <= bound


@given(st.lists(st.tuples(STEPS_US, st.lists(COSTS, min_size=4, max_size=4)), min_size=1, max_size=15))
def test_obligation_02_all_or_none(requests: list[tuple[int, list[int]]]) -> None:
    """A denial changes no level, and keeps time, epoch and promise; an admission charges every bucket its cost."""
    kinds = [TOKENS, Charge("o:x:t", 0, 30, 60, 1000), Charge("k:a:t.5h", 0, 50, 0, window_s=10), GAUGE]
    cell, now_us = Cell(), START_US
    for i, (step_us, costs) in enumerate(requests):
        now_us += step_us
        charges = [charge.costing(cost) for charge, cost in zip(kinds, costs, strict=True)]
        before = {n: leaked(bucket, now_us) for n, bucket in cell.buckets.items()}
        answer = take(cell, f"r{i}", *charges, now_us=now_us, epoch=i)
        for charge in charges:
            had, has = before.get(charge.bucket), cell.buckets[charge.bucket]
            charged = charge.cost * charge.units if isinstance(answer, Admitted) else 0
            assert has.level == (had.level if had else 0) + charged
            assert has.epoch == i
            assert had is None or has.tick == had.tick


@st.composite
def orders(draw: st.DrawFn) -> list[str]:
    """The calls of one request, each up to three times, in any order."""
    amounts = draw(st.lists(st.integers(0, 100), min_size=1, max_size=3))
    calls = ["admit", "settle", "reap", *(f"extend {amount}" for amount in amounts)]
    return draw(st.permutations(calls * draw(st.integers(1, 3))))


@given(orders(), st.integers(0, 100), st.lists(st.integers(-1_000_000, 9_000_000), min_size=18, max_size=18))
def test_obligation_03_retries_and_reordering_are_one_application(
    calls: list[str], final: int, steps_us: list[int]
) -> None:
    """However the calls of a settled request are repeated and reordered, leases ending between: its usage, once."""
    assert LEASE_US + TOMBSTONE_US > 18 * 9_000_000, "all of it happens while the request is remembered"
    plain, others = Charge("k:a:t", 0, 1_000_000, 1), 10_000
    cell, now_us, settled = Cell(), START_US, 0
    cell.settle("others", [plain.costing(others)], START_US)
    for call, step_us in zip(calls, steps_us, strict=False):
        now_us += step_us if not settled else 0
        name, _, amount = call.partition(" ")
        if name == "admit":
            cell.admit("r", [plain.costing(50, 20), GAUGE], 1, LEASE_MS, now_us)
        elif name == "extend":
            cell.extend("r", [plain.costing(int(amount))], LEASE_MS, now_us)
        elif name == "settle":
            assert cell.settle("r", [plain.costing(final)], now_us) is not bool(settled)
            settled += 1
        else:
            cell.reap(now_us, most=1)
    bucket = cell.buckets["k:a:t"]
    assert bucket.level == (others + final) * MINUTE_US - (bucket.tick - START_US)
    assert used(cell, GAUGE, now_us) == 0


@given(st.lists(st.tuples(STEPS_US, COSTS, st.lists(st.integers(0, 10), max_size=4)), max_size=30))
def test_obligation_04_debt_is_bounded_by_what_streams_may_still_use(
    requests: list[tuple[int, int, list[int]]],
) -> None:
    """A level is never negative, nor above capacity + the largest excess + what open streams have used beyond holds."""
    cell, now_us, most_beyond = Cell(), START_US, 0
    for i, (step_us, cost, grown) in enumerate(requests):
        now_us += step_us
        if isinstance(take(cell, f"r{i}", TOKENS.costing(cost), now_us=now_us), Admitted):
            most_beyond += sum(grown)
            for up_to in range(len(grown) + 1):
                cell.extend(f"r{i}", [TOKENS.costing(cost + sum(grown[:up_to]))], LEASE_MS, now_us)
        level = cell.buckets[TOKENS.bucket].level
        assert 0 <= level <= (TOKENS.capacity + 10 + most_beyond) * TOKENS.units
        cell.settle(f"r{i}", [], now_us)


@given(st.integers(1, 1_000), st.lists(st.tuples(st.integers(0, 2_000_000), st.integers(0, 3_000_000)), min_size=1))
def test_obligation_06_a_clock_that_steps_back_costs_its_step_and_gives_nothing(
    level: int, times: list[tuple[int, int]]
) -> None:
    """Time never reverses: at most rate × (real time), and at least rate × (real time − the skew) leaks away."""
    cell, true_us = Cell(), START_US
    cell.settle("before", [TOKENS.costing(level)], START_US)
    tick, told_us = START_US, START_US
    for step_us, behind_us in times:
        true_us += step_us
        told_us = true_us - behind_us
        take(cell, "never", TOKENS.costing(10**6), Charge("k:a:none", 1, 0, 1), now_us=told_us)
        assert cell.buckets[TOKENS.bucket].tick >= tick
        tick = cell.buckets[TOKENS.bucket].tick
    left, leaked_in = cell.buckets[TOKENS.bucket].level, TOKENS.rate * (true_us - START_US)
    assert left >= level * TOKENS.units - leaked_in
    assert left <= max(0, level * TOKENS.units - leaked_in + TOKENS.rate * (true_us - told_us))


MINE = (
    Charge("k:a:t", 0, 20, 617, role=Role.ASSURED),
    Charge("k:a:concurrency", 1, 4, 0),
    Charge("k:a:t.ceiling", 0, 30, 911, role=Role.CEILING),
    Charge(POOL, 0, 60, 1801, 1000, Role.POOL, borrow_up_to=900),
)
OTHERS = (Charge("k:b:t", 0, 1_000, 60_000), Charge(POOL, 0, 60, 1800, 1000, Role.POOL, borrow_up_to=800))


def at(charges: tuple[Charge, ...], cost: int) -> list[Charge]:
    """The charges at a cost; a gauge stays at 1."""
    return [charge.costing(cost if charge.rate else 1) for charge in charges]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("mine"), STEPS_US, st.integers(0, 20)),
            st.tuples(st.sampled_from(["others ask", "others use", "the pool is lost"]), STEPS_US, st.integers(0, 500)),
        ),
        max_size=40,
    )
)
def test_obligation_07_green_is_isolated(happenings: list[tuple[str, int, int]]) -> None:
    """Who is green alone in the world is green among others, whatever they ask for and use."""
    shared, alone, now_us = Cell(), Cell(), START_US
    for i, (what, step_us, amount) in enumerate(happenings):
        now_us += step_us
        if what == "mine":
            mine = at(MINE, amount)
            expected = take(alone, f"r{i}", *mine[:2], now_us=now_us)
            answer = take(shared, f"r{i}", *mine, now_us=now_us)
            if isinstance(expected, Admitted) and expected.green:
                assert isinstance(answer, Admitted)
                assert answer.green
            else:  # were it borrowed, it would be in flight in one of them only
                for cell in (shared, alone):
                    cell.settle(f"r{i}", at(MINE, 0), now_us)
        elif what == "others ask":
            take(shared, f"r{i}", *at(OTHERS, amount), now_us=now_us)
        elif what == "others use":
            shared.settle(f"r{i}", at(OTHERS, amount), now_us)
        else:
            shared.buckets.pop(POOL, None)


@given(
    earlier=st.lists(st.tuples(STEPS_US, st.integers(0, 30), st.integers(0, 1000)), max_size=10),
    thetas=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    cost=st.integers(0, 60),
)
def test_obligation_08_priority_is_monotone(
    earlier: list[tuple[int, int, int]], thetas: tuple[int, int], cost: int
) -> None:
    """In one state, where a lower priority is admitted a higher one is."""
    cell, now_us = Cell(), START_US
    work = OTHERS[1]
    for i, (step_us, taken, theta) in enumerate(earlier):
        now_us += step_us
        take(cell, f"r{i}", work.costing(taken)._replace(borrow_up_to=theta), now_us=now_us)
    low, high = sorted(thetas)
    lower = take(deepcopy(cell), "r", work.costing(cost)._replace(borrow_up_to=low), now_us=now_us)
    higher = take(cell, "r", work.costing(cost)._replace(borrow_up_to=high), now_us=now_us)
    assert isinstance(lower, Denied) or isinstance(higher, Admitted)


LEVELS = st.integers(0, 80)
KINDS = (*MINE, Charge("k:a:requests", 0, 7, 101, 1000), Charge("o:x:t.5h", 0, 40, 0, window_s=10))


@given(levels=st.lists(LEVELS, min_size=6, max_size=6), costs=st.lists(COSTS, min_size=6, max_size=6), late_us=STEPS_US)
def test_obligation_09_the_wait_is_tight(levels: list[int], costs: list[int], late_us: int) -> None:
    """Alone, whatever the buckets hold: refused 1 µs before the time that was told, admitted at it, in any colour."""
    cell, now_us = Cell(), START_US + late_us
    counted = [c if c.role is not Role.POOL else c._replace(role=Role.COUNTED) for c in KINDS]
    cell.settle("before", [c.costing(level) for c, level in zip(counted, levels, strict=True) if c.kind], START_US)
    charges = [c.costing(cost if c.kind else 1) for c, cost in zip(KINDS, costs, strict=True)]
    answer = take(cell, "r", *charges, now_us=now_us)
    if isinstance(answer, Denied):
        assert answer.wait_us is not None
        denied(cell, "r", *charges, now_us=now_us + answer.wait_us - 1)
        admitted(cell, "r", *charges, now_us=now_us + answer.wait_us)


@given(st.lists(st.tuples(STEPS_US, st.lists(COSTS, min_size=6, max_size=6)), min_size=1, max_size=12))
def test_obligation_10_no_false_denial(requests: list[tuple[int, list[int]]]) -> None:
    """The bucket that a denial names lacks room at that moment, and where it is assured a shared one does too."""
    cell, now_us = Cell(), START_US
    for i, (step_us, costs) in enumerate(requests):
        now_us += step_us
        charges = {c.bucket: c.costing(cost if c.kind else 1) for c, cost in zip(KINDS, costs, strict=True)}
        answer = take(cell, f"r{i}", *charges.values(), now_us=now_us)
        if isinstance(answer, Denied):
            short = {
                name: charge.role
                for name, charge in charges.items()
                if cell.buckets[name].level > (fill(charge) - min(charge.cost, fill(charge))) * charge.units
            }
            assert answer.bucket in short
            if short[answer.bucket] is not Role.PLAIN:
                assert {Role.CEILING, Role.POOL} & {*short.values()}


def fill(charge: Charge) -> int:
    """How much of its bucket a charge may fill."""
    return charge.capacity * charge.borrow_up_to // 1000


@given(
    costs=st.lists(st.integers(1, 30), min_size=1, max_size=10),
    capacity=st.integers(1, 60),
    rate=st.integers(60, 6_000),
    more=st.tuples(st.integers(0, 60), st.integers(0, 6_000)),
)
def test_obligation_11_more_capacity_is_more_sustained_work(
    costs: list[int], capacity: int, rate: int, more: tuple[int, int]
) -> None:
    """Callers who return when they are told get the whole rate: more of it sustains more work, to one request's cost.

    Nothing is claimed of single requests: with more capacity an early large one may take the place of later ones.
    """
    minutes = 2
    largest = max(costs)
    less_work = sustained(costs, Charge("k:a:t", 0, capacity, rate), minutes)
    more_work = sustained(costs, Charge("k:a:t", 0, capacity + more[0], rate + more[1]), minutes)
    assert rate * minutes - largest <= less_work <= rate * minutes + capacity + largest
    assert more_work >= less_work + more[1] * minutes - capacity - 2 * largest


def sustained(costs: list[int], charge: Charge, minutes: int) -> int:
    """What one caller is admitted within so many minutes who offers these costs in turn, each as soon as it may."""
    cell, now_us, work, i = Cell(), START_US, 0, 0
    while now_us <= START_US + minutes * MINUTE_US:
        cost = costs[i % len(costs)]
        answer = take(cell, f"r{i}", charge.costing(cost), now_us=now_us)
        if isinstance(answer, Admitted):
            work, i = work + cost, i + 1
        else:
            assert answer.wait_us is not None
            now_us += answer.wait_us
    return work


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(["admit", "extend", "settle", "reap"]), st.integers(0, 30_000)),
        max_size=60,
    )
)
def test_obligation_12_gauges_are_what_is_open_and_all_ends(calls: list[tuple[int, str, int]]) -> None:
    """After any calls the gauge is the number of open reservations; when all leases are over none is."""
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
    cell.reap(now_us + LEASE_US)
    assert used(cell, GAUGE, now_us) == 0


@given(st.lists(st.tuples(st.integers(0, 20_000_000), COSTS), max_size=25), st.sampled_from([TOKENS, KINDS[5]]))
def test_obligation_13_a_bucket_may_be_forgotten_once_it_is_unused(
    requests: list[tuple[int, int]], charge: Charge
) -> None:
    """Dropping a bucket when the reset that was told is over changes no later decision: its debt is paid by then.

    Only who stands in line is forgotten with it.
    """
    kept, dropped, now_us, reset_at_us = Cell(), Cell(), START_US, START_US
    for i, (step_us, cost) in enumerate(requests):
        now_us += step_us
        if now_us >= reset_at_us:
            dropped.buckets.clear()
        answers = [take(cell, f"r{i}", charge.costing(cost), now_us=now_us) for cell in (kept, dropped)]
        assert len({(type(answer), answer.remaining, answer.reset_us) for answer in answers}) == 1
        reset_at_us = now_us + answers[0].reset_us[0]


@given(
    gateways=st.integers(1, 4),
    requests=st.lists(st.tuples(STEPS_US, st.integers(0, 3), COSTS, st.integers(0, 30)), max_size=40),
)
def test_obligation_14_an_outage_admits_a_bounded_amount(
    gateways: int, requests: list[tuple[int, int, int, int]]
) -> None:
    """However many gateways decide alone: what they hold and have used ≤ their safe shares + one request each."""
    charge = Charge("k:a:t", 0, 40, 600)
    local = [LocalLimits() for _ in range(gateways)]
    total, excess, now_us = 0, [0] * gateways, START_US
    for i, (step_us, number, cost, uses) in enumerate(requests):
        gateway, now_us = number % gateways, now_us + step_us
        if isinstance(local[gateway].admit(f"r{i}", [charge.costing(cost)], gateways, 3_600_000, now_us), Admitted):
            own = int(charge.capacity * SAFE_SHARE) // gateways
            excess[gateway] = max(excess[gateway], cost - own)
            actual = min(uses, cost)
            local[gateway].settle(f"r{i}", [charge.costing(actual)], now_us)
            total += actual
        passed = Fraction(now_us - START_US, MINUTE_US)
        assert total <= SAFE_SHARE * (charge.capacity + charge.rate * passed) + sum(excess)
