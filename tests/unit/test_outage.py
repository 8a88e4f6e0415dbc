"""What gateways admit by themselves while Redis is away: never more together than the bound."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from ratelimit.meter import MINUTE_US, Admitted, Charge, Denied, Role
from ratelimit.outage import FORGET_AFTER_US, SAFE_SHARE, LocalLimits, safe_charges

LEASE_MS = 600_000
START_US = 1_000_000


def tokens(cost: int, capacity: int = 1_000, rate: int = 6_000) -> Charge:
    """A charge of a key's output tokens."""
    return Charge("k:k1:output_tokens", cost, capacity, rate)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[int, int, int]]]:
    """Gateways, a limit's burst and rate, and (pause in µs, gateway, cost) of each request."""
    gateways = draw(st.integers(1, 5))
    capacity, rate = draw(st.integers(1, 5_000)), draw(st.integers(1, 50_000))
    request = st.tuples(st.integers(0, 20_000_000), st.integers(0, gateways - 1), st.integers(0, 1_500))
    return gateways, capacity, rate, draw(st.lists(request, max_size=60))


@given(histories())
def test_together_they_stay_within_the_bound(history: tuple[int, int, int, list[tuple[int, int, int]]]) -> None:
    """However requests are spread, all gateways admit at most the safe share of burst + rate × time, and one request
    each that is larger than its share by itself.
    """
    gateways, capacity, rate, requests = history
    local = [LocalLimits() for _ in range(gateways)]
    admitted, excess, now_us = 0, [0] * gateways, START_US
    for number, (pause_us, gateway, cost) in enumerate(requests):
        now_us += pause_us
        answer = local[gateway].admit(str(number), (tokens(cost, capacity, rate),), gateways, LEASE_MS, now_us)
        if isinstance(answer, Admitted):
            admitted += cost
            own = int(capacity * SAFE_SHARE) // gateways
            excess[gateway] = max(excess[gateway], cost - own)
        passed = Fraction(now_us - START_US, MINUTE_US)
        # A rate below one token a minute for a gateway is rounded up to one.
        bound = SAFE_SHARE * capacity + max(SAFE_SHARE * rate, Fraction(gateways)) * passed
        assert admitted <= bound + sum(excess)


def test_only_a_callers_own_limits_are_asked() -> None:
    """What may be borrowed, and the pool, are no part of what is assured."""
    charges = (
        Charge("k:k1:requests", 1, 100, 100),
        Charge("k:k1:output_tokens", 5, 1_000, 1_000, role=Role.ASSURED),
        Charge("k:k1:concurrency", 1, 10, 0),
        Charge("o:acme:requests.week", 1, 700, 0, window_s=604_800),
        Charge("k:k1:output_tokens.ceiling", 5, 9_000, 9_000, role=Role.CEILING),
        Charge("pool:work", 5, 9_000, 9_000, 1_000, Role.POOL),
    )
    assert [(c.bucket, c.capacity, c.rate, c.window_s, c.role) for c in safe_charges(charges, 4)] == [
        ("k:k1:requests", 20, 20, 0, Role.PLAIN),
        ("k:k1:output_tokens", 200, 200, 0, Role.PLAIN),
        ("k:k1:concurrency", 2, 0, 0, Role.PLAIN),
        ("o:acme:requests.week", 140, 0, 604_800, Role.PLAIN),
    ]


def test_a_flapping_redis_gives_no_new_bursts() -> None:
    """What was admitted in one outage is remembered in the next, until Redis must long have charged it."""
    local = LocalLimits()
    charge = (tokens(800, rate=1),)
    assert isinstance(local.admit("1", charge, 1, LEASE_MS, START_US), Admitted)
    local.settle("1", charge, START_US)
    assert isinstance(local.admit("2", charge, 1, LEASE_MS, START_US + 1_000_000), Denied)
    later_us = START_US + 1_000_000 + FORGET_AFTER_US + 1
    assert isinstance(local.admit("3", charge, 1, LEASE_MS, later_us), Admitted)


def test_places_in_flight_are_given_back() -> None:
    """A settled request makes room for the next, and what it did not use is given back."""
    local = LocalLimits()
    held = (Charge("k:k1:concurrency", 1, 2, 0), tokens(700, rate=1))
    assert isinstance(local.admit("1", held, 1, LEASE_MS, START_US), Admitted)
    refused = local.admit("2", held, 1, LEASE_MS, START_US)
    assert isinstance(refused, Denied)
    local.settle("1", (tokens(100, rate=1),), START_US)
    answer = local.admit("3", held, 1, LEASE_MS, START_US)
    assert isinstance(answer, Admitted)
    assert answer.remaining == (0, 0)


def test_more_gateways_leave_each_less() -> None:
    """A gateway that joins, or is counted late, makes everybody's part smaller at once."""
    local = LocalLimits()
    charge = (tokens(300, rate=1),)
    assert isinstance(local.admit("1", charge, 1, LEASE_MS, START_US), Admitted)
    assert isinstance(local.admit("2", charge, 2, LEASE_MS, START_US), Denied)
    assert isinstance(local.admit("3", charge, 1, LEASE_MS, START_US), Admitted)


def test_nothing_grows_with_the_number_of_requests() -> None:
    """What is settled is forgotten: only levels stay."""
    local = LocalLimits()
    for number in range(1_000):
        local.admit(str(number), (tokens(0),), 1, LEASE_MS, START_US)
        local.settle(str(number), (tokens(0),), START_US)
    assert not local._cell.reservations
    assert not local._cell.usage
    assert len(local._cell.buckets) == 1
