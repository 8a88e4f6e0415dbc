"""Demand counts what is asked for, once, in a unit that no change of the fleet changes."""

from __future__ import annotations

from collections import defaultdict
from itertools import starmap

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ratelimit.gateway.demand import Asked, Demand, Outcome, attempt_of, mix_requests
from ratelimit.gateway.hold import Usage, pool_cost_us
from ratelimit.gateway.terms import terms_by_tier
from ratelimit.inputs import Inputs
from ratelimit.policy import Promise, promises_of
from ratelimit.publication import PublishedPool
from ratelimit.replicasupply import GpuSupply, gpu_supplies
from serving.capacity import RequestShape
from serving.fleet import ReplicaSpec
from tests.support.gateway import publication
from tests.support.needed import pool_replicas_needed, replicas_needed
from tests.unit.test_derive import MIX, MODEL, One, policy, published

PROMISE = Promise(MIX, policy().pools[0].slo)
TERMS = terms_by_tier(publication(["http://127.0.0.1:1"]))["pro", "tiny"]
#: A request of the test pool's mix costs its budget ÷ its usable requests.
MIX_COST_US = 10**12 / 60 / 10
shapes = st.builds(RequestShape, st.integers(1, 20_000), st.integers(1, 2_000))


class Counted:
    """Demand as it is counted, by outcome."""

    def __init__(self) -> None:
        self.by_outcome: defaultdict[Outcome, float] = defaultdict(float)

    def offered(self, model: str, tier: str, outcome: Outcome, mix_requests: float) -> None:
        self.by_outcome[outcome] += mix_requests


def asked(held: float = 1.0, attempt: int | None = 0) -> Asked:
    """A request that holds so many requests of the mix."""
    return Asked(TERMS, "pro", round(held * MIX_COST_US), attempt)


def spent(requests: float) -> int:
    """What so many requests of the mix cost."""
    return round(requests * MIX_COST_US)


def rounded(counted: Counted) -> dict[Outcome, float]:
    """What was counted, to four digits after the point."""
    return {outcome: round(amount, 4) for outcome, amount in counted.by_outcome.items()}


def test_what_is_served_counts_by_its_cost() -> None:
    """A request that held three times what it needed asked for no more than it needed."""
    counted = Counted()
    Demand(counted).ended(asked(held=3), spent(1))
    assert rounded(counted) == {"admitted": 1}


def test_what_is_refused_counts_by_what_it_would_have_cost() -> None:
    """Holds are made for long answers: what is refused counts as requests of its tier cost of late."""
    counted = Counted()
    demand = Demand(counted)
    demand.refused(asked(held=2))
    assert rounded(counted) == {"throttled": 2}  # nothing is known yet
    for _ in range(20):
        demand.ended(asked(held=4), spent(1))
    demand.refused(asked(held=2))
    demand.refused(Asked(TERMS, "free", spent(2), 0))  # what pro costs says nothing of free
    assert rounded(counted) == {"admitted": 20, "throttled": 2 + 0.5 + 2}


def test_what_no_replica_took_and_what_an_operator_capped_are_told_apart() -> None:
    """One needs replicas, the other would not be served by any number of them."""
    counted = Counted()
    demand = Demand(counted)
    demand.ended(asked(), None)
    demand.refused(asked(), is_capped=True)
    demand.refused(asked())
    assert rounded(counted) == {"unserved": 1, "capped": 1, "throttled": 1}


@pytest.mark.parametrize(
    ("attempt", "is_repeated", "counts"),
    [(0, False, 1), (0, True, 0), (1, False, 0), (7, True, 0), (None, False, 1), (None, True, 0)],
)
def test_the_same_demand_counts_once(attempt: int | None, is_repeated: bool, counts: int) -> None:
    """A retry that says so is none; nor is what is refused from memory, whatever the client says."""
    counted = Counted()
    Demand(counted).refused(asked(attempt=attempt), is_repeated=is_repeated)
    assert sum(counted.by_outcome.values()) == pytest.approx(counts)


def test_a_retry_that_is_served_was_counted_when_it_was_refused() -> None:
    """Of a request that is refused twice and then served, what was first asked for is 1, and what was served is 1."""
    counted = Counted()
    demand = Demand(counted)
    for attempt in range(2):
        demand.refused(asked(attempt=attempt))
    demand.ended(asked(attempt=2), spent(1))
    assert rounded(counted) == {"throttled": 1, "retried": 1}


def test_what_is_served_is_seen_whatever_attempt_it_is_said_to_be() -> None:
    """A caller who calls everything a retry hides none of the load that it brings; of what no replica took, it may."""
    counted = Counted()
    demand = Demand(counted)
    for _ in range(10):
        demand.ended(asked(held=2, attempt=1), spent(1))
    demand.ended(asked(attempt=1), None)
    assert rounded(counted) == {"retried": 10}


@pytest.mark.parametrize(
    ("odd", "counts"),
    [((2, 0), 1.0), ((200, 0.5), 0.6), ((200, 0), 1.0), ((0, 1), 1.0), ((2, 20), 1.2)],
    ids=["refused by the engine", "held hugely", "held hugely, refused", "held nothing", "overran"],
)
def test_one_caller_does_not_make_what_others_are_refused_count_for_nothing(
    odd: tuple[float, float], counts: float
) -> None:
    """After 1000 requests that cost half of what they held, 60 odd ones change the share within bounds."""
    counted = Counted()
    demand = Demand(counted)
    for _ in range(1000):
        demand.ended(asked(held=2), spent(1))
    held, cost = odd
    for _ in range(60):
        demand.ended(asked(held=held), spent(cost))
    demand.refused(asked(held=2))
    assert counted.by_outcome["throttled"] == pytest.approx(counts, abs=0.15)


def test_what_is_refused_counts_for_something() -> None:
    """However little requests of a tier cost of what they hold."""
    counted = Counted()
    demand = Demand(counted)
    for _ in range(1000):
        demand.ended(asked(held=100), spent(0.1))
    demand.refused(asked(held=100))
    assert counted.by_outcome["throttled"] == pytest.approx(5)


@pytest.mark.parametrize(
    ("header", "attempt"),
    [(None, None), (b"0", 0), (b"2", 2), (b"", None), (b"-1", None), (b"many", None), (b"9" * 5000, None)],
)
def test_the_attempt_is_what_the_client_says(header: bytes | None, attempt: int | None) -> None:
    """Whatever else it sends there, it has said nothing."""
    assert attempt_of(header) == attempt


def test_a_pool_that_serves_nothing_prices_nothing() -> None:
    """Its requests count as requests of the mix, so that a fleet that was lost, or never was, is asked for."""
    pool = published().pools[0]
    assert pool.budget_per_minute == 0
    assert mix_requests(pool, 0) == 1


# The unit


def pool_of(*fleet: One) -> PublishedPool:
    """The pool that is derived for a fleet."""
    return published(*fleet).pools[0]


def in_mix_requests(pool: PublishedPool, shape: RequestShape) -> float:
    """What a gateway counts a request as."""
    cost_us = pool_cost_us(pool.groups, Usage(shape.input_tokens, shape.output_tokens), 1, 1)
    return mix_requests(pool, cost_us)


def h100s(count: int) -> list[One]:
    return [One(14.2, gpu="H100")] * count


def supplies(model_fleet: list[One]) -> list[GpuSupply]:
    """What the controller tells of a fleet."""
    rules = policy()
    groups = tuple(one.group(promises_of(rules.tiers, rules.pools[0])) for one in model_fleet)
    return gpu_supplies(inputs(groups=groups), lambda _spec, _promise: None)


def inputs(groups: tuple[object, ...] = (), specs: tuple[ReplicaSpec, ...] = (), **changes: object) -> Inputs:
    """What limits are derived from, as far as it matters here."""
    made = {
        "policy": policy(),
        "supplies": {MODEL: groups},
        "counted": frozenset[str](),
        "specs": specs,
        "configured": specs,
        "active_keys": {},
        "overrides": (),
        "trims": {},
    }
    known = set(Inputs.__struct_fields__)
    return Inputs(**{name: value for name, value in {**made, **changes}.items() if name in known})  # type: ignore[arg-type]


@given(shape=shapes, before=st.integers(1, 30), after=st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_the_unit_outlasts_a_change_of_the_fleet(shape: RequestShape, before: int, after: int) -> None:
    """Any request counts the same before and after: one of the mix as 1, and all others in proportion."""
    found = [in_mix_requests(pool_of(*h100s(count)), shape) for count in (before, after)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@given(counts=st.tuples(st.integers(0, 9), st.integers(0, 9)))
@settings(deadline=None, max_examples=40)
def test_a_request_of_the_mix_counts_as_one_on_every_fleet(counts: tuple[int, int]) -> None:
    """On unlike GPUs too, in any proportion: so is the demand that a pool is made for."""
    assume(sum(counts))
    groups = [(One(14.2, gpu="H100"), counts[0]), (One(30.0, slowdown=2.0, gpu="B200"), counts[1])]
    pool = pool_of(*[one for one, count in groups for _ in range(count)])
    mean = sum(in_mix_requests(pool, shape) for shape in MIX.shapes) / len(MIX.shapes)
    assert mean == pytest.approx(1, rel=1e-3)  # its mean cost is kept in four digits


@given(shape=shapes, per_s=st.floats(1, 500), before=st.integers(1, 40), after=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_the_same_demand_needs_the_same_replicas_before_and_after(
    shape: RequestShape, per_s: float, before: int, after: int
) -> None:
    """What autoscaling is told does not move because the fleet did: derived, counted and worked out for both."""
    found = []
    for count in (before, after):
        fleet = h100s(count)
        pool = pool_of(*fleet)
        [supply] = supplies(fleet)
        demand = per_s * in_mix_requests(pool, shape)
        found.append(replicas_needed(supply.replicas, demand, pool.usable_requests_per_s, supply.adds_requests_per_s))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-3)


@given(shape=shapes, per_s=st.floats(1, 500), count=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_more_is_needed_exactly_where_the_budget_is_exceeded(shape: RequestShape, per_s: float, count: int) -> None:
    """What the limiter cannot admit for ever, and nothing else, asks for replicas."""
    fleet = h100s(count)
    pool = pool_of(*fleet)
    cost_us = pool_cost_us(pool.groups, Usage(shape.input_tokens, shape.output_tokens), 1, 1)
    [supply] = supplies(fleet)
    needed = replicas_needed(
        count, per_s * mix_requests(pool, cost_us), pool.usable_requests_per_s, supply.adds_requests_per_s
    )
    excess = per_s * cost_us * 60 / pool.budget_per_minute
    assume(abs(excess - 1) > 1e-6)
    assert (needed > count) == (excess > 1)


# The arithmetic

amounts = st.floats(0, 1e5)
rates = st.floats(0.01, 1e3)


@given(count=st.integers(0, 1000), demand=amounts, more=amounts, usable=amounts, adds=rates)
def test_needed_is_never_too_few_and_grows_with_demand(
    count: int, demand: float, more: float, usable: float, adds: float
) -> None:
    """Never below 0; above what is there exactly where more is asked for than can be served; never less for more."""
    needed = replicas_needed(count, demand, usable, adds)
    assert needed >= 0
    assert needed >= count or demand < usable
    assert needed <= count or demand > usable
    assert replicas_needed(count, demand + more, usable, adds) >= needed
    assert replicas_needed(count, demand, usable + more, adds) <= needed


@given(count=st.integers(0, 1000), demand=amounts, usable=amounts, adds=rates)
def test_so_many_replicas_serve_the_demand(count: int, demand: float, usable: float, adds: float) -> None:
    """With the replicas needed, and what each of them adds, what can be served is what is asked for, or more."""
    needed = replicas_needed(count, demand, usable, adds)
    assert usable + (needed - count) * adds >= demand - 1e-6 * max(1.0, demand, usable, count * adds)


@given(
    counts=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    demand=amounts,
    usable=amounts,
    adds=st.tuples(rates, rates),
)
def test_a_pool_needs_between_what_its_types_need_alone(
    counts: tuple[int, int], demand: float, usable: float, adds: tuple[float, float]
) -> None:
    """In their proportions, more replicas than of the best type alone, and fewer than of the worst."""
    pool = pool_replicas_needed(dict(enumerate(counts)), demand, usable, dict(enumerate(adds)))
    alone = [max(0.0, sum(counts) + (demand - usable) / each) for each in adds]
    assert min(alone) * (1 - 1e-9) - 1e-6 <= pool <= max(alone) * (1 + 1e-9) + 1e-6


# What the controller tells


def test_a_replica_adds_its_knee_times_the_trim() -> None:
    """By GPU type, the mean of those that are not alike."""
    groups = tuple(starmap(_group, [(10.0, "H100"), (20.0, "H100"), (30.0, "H200")]))
    found = gpu_supplies(inputs(groups=groups), lambda _spec, _promise: None)
    assert found == [GpuSupply(MODEL, "H100", 2, 15.0), GpuSupply(MODEL, "H200", 1, 30.0)]


def test_a_type_of_which_none_counts_is_told_of_too() -> None:
    """Or nothing would ask for its first replica: what one would add, as far as that is known."""
    specs = (ReplicaSpec("http://a", MODEL, "H200", "h200"), ReplicaSpec("http://b", MODEL, "L4", "l4"))
    rates = {"h200": 30.0}
    found = gpu_supplies(inputs(specs=specs), lambda spec, _promise: rates.get(spec.profile))
    assert found == [GpuSupply(MODEL, "H200", 0, 30.0)]


def _group(rate: float, gpu: str) -> object:
    return One(rate, gpu=gpu).group([PROMISE])


def test_refusals_are_told_by_what_bounds_them() -> None:
    """A limit that the fleet gives grows with it; one that a rule has cut, or set, does not."""
    limit = TERMS.limits[0]
    assert limit in TERMS.derived
    assert msgspec.structs.replace(limit, burst=limit.burst - 1) not in TERMS.derived
