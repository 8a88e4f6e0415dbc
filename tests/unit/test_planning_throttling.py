"""The fluid follows the limiter's rules: against the exact meter, and by what can be said of any load."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from itertools import product
from random import Random
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.cell import Cell
from ratelimit.gateway.charges import amounts, charges_for, used_charges
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.terms import Terms, terms_by_tier
from ratelimit.meter import Admitted
from ratelimit.planning.demand import Demand
from ratelimit.planning.tested import (
    ERROR_OVERALL,
    TESTED_LOADS,
    TESTED_POOLS_PER_S,
    TESTED_TIERS,
    Planned,
    error_by_tier,
    error_stated,
)
from ratelimit.planning.throttling import Callers, Fluid, Meter, PoolMeter, steady
from ratelimit.policy import LimitName, TierPolicy
from ratelimit.publication import Limit, Publication
from serving.capacity import RequestShape, Slo, fleet_cost_s
from tests.support.meters import LONG_LEASE_MS, START_US
from tests.support.planning import (
    ENTERPRISE,
    FREE,
    MIX,
    MODEL,
    PRO,
    SLO,
    demand_at,
    demand_of,
    group,
    load,
    published,
    unable,
)

pytestmark = pytest.mark.slow

#: A replica of ``group`` gives out so many requests/s, and a pool here has four of them for each of its scale.
_POOL_PER_S = 20.0
#: Scales of the pool, and of the demand of each: 1 is 1.5 times what the pool gives out.
_CASES = [(1, 0.5), (1, 1.0), (1, 2.0), (5, 0.5), (5, 1.0), (5, 2.0), (5, 9.0), (10, 1.0)]
#: Minutes of a replay, as shares of its mean: quiet ones, and one with three times the mean, 2.7 times the pool.
_BURST = (0.4, 0.2, 3.0, 0.2, 1.2)


class Run(NamedTuple):
    """Of a run of the exact meter: the work that each tier asked for, and what of it was refused."""

    asked: dict[str, int]
    refused: dict[str, int]

    def share(self, tier: str) -> float:
        return self.refused[tier] / self.asked[tier]

    def share_overall(self) -> float:
        return sum(self.refused.values()) / sum(self.asked.values())


def exact(publication: Publication, demand: Demand, run_s: float, warm_up_s: float) -> Run:
    """Poisson arrivals at the exact meter; each admitted request settles when the SLO would have it end."""
    terms = {tier: found for (tier, _), found in terms_by_tier(publication).items()}
    rng, cell = Random(1), Cell()
    ending: list[tuple[float, str, RequestShape, str, str]] = []
    run = Run(dict.fromkeys(demand.keys(), 0), dict.fromkeys(demand.keys(), 0))
    for number, (at_s, tier, key) in enumerate(_arrivals(demand, run_s, rng)):
        while ending and ending[0][0] <= at_s:
            _settle(cell, terms, *heappop(ending))
        shape = rng.choice(MIX.shapes)
        work = _cost_us(terms[tier], shape)
        charges = charges_for(key, terms[tier], Usage(shape.input_tokens, shape.output_tokens), work)
        answer = cell.admit(f"r{number}", charges, 1, LONG_LEASE_MS, START_US + round(at_s * 1e6))
        if at_s > warm_up_s:
            run.asked[tier] += work
            run.refused[tier] += 0 if isinstance(answer, Admitted) else work
        if isinstance(answer, Admitted):
            heappush(ending, (at_s + SLO.ttft_s + shape.output_tokens * SLO.tpot_s, f"r{number}", shape, tier, key))
    return run


def _arrivals(demand: Demand, run_s: float, rng: Random) -> list[tuple[float, str, str]]:
    bin_s = demand.bin_s or run_s
    coming = []
    for each in demand.callers:
        for key, (number, share) in product(range(each.keys), enumerate(each.course)):
            at_s, rate = number * bin_s, each.requests_per_s * share / each.keys
            while (at_s := at_s + rng.expovariate(rate)) < (number + 1) * bin_s:
                coming.append((at_s, each.tier, f"{each.tier}-{key}"))
    return sorted(coming)


def _settle(
    cell: Cell, terms: dict[str, Terms], at_s: float, request_id: str, shape: RequestShape, tier: str, key: str
) -> None:
    usage, cost_us = Usage(shape.input_tokens, shape.output_tokens), _cost_us(terms[tier], shape)
    held = charges_for(key, terms[tier], usage, cost_us)
    cell.settle(request_id, used_charges(held, amounts(usage, cost_us)), START_US + round(at_s * 1e6))


def _cost_us(terms: Terms, shape: RequestShape) -> int:
    return round(fleet_cost_s(terms.groups, shape) * 1e6)


@pytest.mark.parametrize(("scale", "times"), _CASES)
def test_the_fluid_agrees_with_the_exact_meter(scale: int, times: float) -> None:
    """The work refused to Poisson callers of three tiers is that of the exact meter, within the errors stated."""
    _agree(demand_of(scale, times), scale, run_s=240.0 / scale / max(1.0, times) + 30, warm_up_s=30.0)


@pytest.mark.parametrize("scale", [1, 5])
def test_the_fluid_agrees_with_the_exact_meter_in_a_burst(scale: int) -> None:
    """So it does over a replay from unused buckets, with a minute that asks for 2.7 times what the pool gives out."""
    demand = demand_of(scale, 0.6)
    course = [msgspec.structs.replace(each, course=_BURST, peak=max(_BURST)) for each in demand.callers]
    demand = msgspec.structs.replace(demand, bin_s=60.0, callers=tuple(course))
    _agree(demand, scale, run_s=60.0 * len(_BURST), warm_up_s=0.0)


def test_the_range_that_a_plan_states_is_that_of_these_tests() -> None:
    """Pools, loads and tiers are those of the cases above."""
    demands = {case: demand_of(*case) for case in _CASES}
    loads = [
        load(demand, published(group(4 * scale), keys=demand.keys())).heaviest()
        for (scale, _), demand in demands.items()
    ]
    assert (min(loads), max(loads)) == pytest.approx(TESTED_LOADS, rel=0.001)
    pools = [scale * _POOL_PER_S for scale, _ in _CASES]
    assert (min(pools), max(pools)) == TESTED_POOLS_PER_S
    assert {len(demand.keys()) for demand in demands.values()} == {TESTED_TIERS}


def test_a_plan_beyond_what_was_tested_says_so() -> None:
    """Larger pools, heavier loads and more tiers are named with the fleet; a fleet within the range is not."""
    within, beyond = Planned("before", 60.0, 1.5, 3), Planned("after", 150_600.0, 25.0, 4)
    assert "outside" not in error_stated([within])
    said = error_stated([within, beyond])
    assert "16% tier by tier" in said
    assert "20 to 200 requests/s that are asked for 0.75 to 13.5 times" in said
    outside = "after, a pool of 1.506e+05 requests/s, after, asked for 25 times that, after, 4 tier(s)"
    assert said.endswith(f"outside what was tested: {outside}")


def _agree(demand: Demand, scale: int, run_s: float, warm_up_s: float) -> None:
    publication = published(group(4 * scale), keys=demand.keys())
    foretold = load(demand, publication).at_worst()
    seen = exact(publication, demand, run_s=run_s, warm_up_s=warm_up_s)

    by_tier = {tier: share.throttled for tier, share in foretold.items()}
    work = sum(seen.asked.values())
    overall = sum(share * seen.asked[tier] / work for tier, share in by_tier.items())
    assert overall == pytest.approx(seen.share_overall(), abs=ERROR_OVERALL)
    assert by_tier == pytest.approx(
        {tier: seen.share(tier) for tier in by_tier}, abs=error_by_tier(scale * _POOL_PER_S)
    )


ALL_LIMITS: tuple[LimitName, ...] = ("requests", "input_tokens", "output_tokens", "concurrency")
HOPELESS = Slo(0.01, 0.001)
_WITHOUT_LIMITS = {
    "unlimited": msgspec.structs.replace(PRO, unlimited=ALL_LIMITS),
    "promised what nothing keeps": msgspec.structs.replace(PRO, slo=HOPELESS),
}


@pytest.mark.parametrize("pro", _WITHOUT_LIMITS.values(), ids=_WITHOUT_LIMITS.keys())
@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_a_tier_without_limits_borrows_as_the_exact_meter_lets_it(pro: TierPolicy, times: float) -> None:
    """Unlimited by policy, or promised what nothing keeps: the pool alone bounds it, in its rank, as in service."""
    demand = demand_of(5, times)
    publication = published(unable(group(20), HOPELESS), keys=demand.keys(), tiers=(ENTERPRISE, pro, FREE))
    foretold = load(demand, publication).at_worst()
    seen = exact(publication, demand, run_s=60.0, warm_up_s=30.0)

    assert publication.tiers[1].limits == ()
    assert foretold["pro"].throttled < 1
    assert {tier: share.throttled for tier, share in foretold.items()} == pytest.approx(
        {tier: seen.share(tier) for tier in foretold}, abs=error_by_tier(5 * _POOL_PER_S)
    )


rates = st.floats(0.01, 200.0)


@given(st.tuples(rates, rates, rates), st.integers(1, 40))
def test_served_and_throttled_make_up_what_was_offered(asked: tuple[float, float, float], replicas: int) -> None:
    """Green, borrowed and throttled add up to 1 in every tier, and none of them is negative."""
    demand = demand_at(asked)
    for share in load(demand, published(group(replicas), keys=demand.keys())).at_worst().values():
        assert min(share.green, share.borrowed, share.throttled) >= 0
        assert share.green + share.borrowed + share.throttled == pytest.approx(1, abs=1e-9)


@given(st.tuples(rates, rates, rates), st.integers(1, 40))
def test_nothing_is_throttled_within_what_is_assured(asked: tuple[float, float, float], replicas: int) -> None:
    """A tier whose keys ask for no more than their assured limits is refused nothing, whatever the others do."""
    demand = demand_at(asked)
    publication = published(group(replicas), keys=demand.keys())
    shares = load(demand, publication).at_worst()
    for tier, keys in demand.keys().items():
        limits: dict[str, Limit] = {
            limit.name: limit for limit in publication.limits(tier, MODEL) if limit.per == "key"
        }
        each = next(callers.requests_per_s for callers in demand.callers if callers.tier == tier) / keys
        sizes = {"input_tokens": MIX.mean_input_tokens, "output_tokens": MIX.mean_output_tokens}
        within = all(each * 60 * size <= limits[name].per_minute for name, size in sizes.items())
        if within and tier != FREE.name:
            assert shares[tier].throttled == 0
            assert shares[tier].green == pytest.approx(1)


@given(st.tuples(rates, rates, rates), st.floats(0.1, 50.0), st.floats(1.0, 5.0))
def test_throttling_falls_with_capacity(asked: tuple[float, float, float], capacity: float, more: float) -> None:
    """With every rate of every bucket a number of times larger, no tier is throttled more."""
    demand = demand_at(asked)
    small = load(demand, published(group(4), keys=demand.keys()))
    callers, offered = small.callers, [each.requests_per_s for each in demand.callers]
    served = []
    for by in (capacity, capacity * more):
        found = steady(scaled_pool(small.pool, by), [scaled(each, by) for each in callers], offered)
        served.append((found.green + found.borrowed).tolist())
    assert all(after >= before - 1e-9 * rate for before, after, rate in zip(*served, offered, strict=True))


@given(st.tuples(rates, rates, rates), st.integers(1, 40), st.integers(0, 40))
def test_hardware_never_makes_the_fleet_throttle_more(
    asked: tuple[float, float, float], replicas: int, more: int
) -> None:
    """Limits as derived, rounded for people: with more replicas no less work is served in all."""
    demand = demand_at(asked)
    served = []
    for count in (replicas, replicas + more):
        shares = load(demand, published(group(count), keys=demand.keys())).at_worst()
        served.append(sum((share.green + share.borrowed) * share.offered_per_s for share in shares.values()))
    assert served[1] >= served[0] * (1 - 1e-9)


def test_a_burst_passes_and_the_rate_follows() -> None:
    """From unused buckets a bin admits rate × time and the burst, the next bin the rate alone."""
    callers = Callers("pro", 1, {"requests": 1.0}, 0.0, plain={"requests": Meter(2.0, 30.0)})
    fluid = Fluid(PoolMeter(1.0, 1.0), [callers])
    served = [fluid.step(np.array([100.0]), 60.0).green[0] for _ in range(3)]
    assert served == [2 * 60 + 30, 2 * 60, 2 * 60]


def test_idle_time_gives_the_burst_back() -> None:
    """What leaks while nobody asks may come at once afterwards, up to the burst."""
    callers = Callers("pro", 1, {"requests": 1.0}, 0.0, plain={"requests": Meter(2.0, 30.0)})
    fluid = Fluid(PoolMeter(1.0, 1.0), [callers])
    served = [fluid.step(np.array([rate]), 60.0).green[0] for rate in (100.0, 0.0, 100.0)]
    assert served == [150, 0, 150]


def test_only_green_work_fills_the_assured_bucket() -> None:
    """What is borrowed leaves the assured bucket as it is: each bin's green is its rate, the first's its burst too."""
    callers = Callers(
        tier="pro",
        keys=2,
        sizes={"requests": 1.0},
        cost_s=0.01,
        plain={},
        assured={"requests": Meter(1.0, 20.0)},
        ceilings={"requests": Meter(3.0, 50.0)},
        borrow_up_to=0.9,
    )
    fluid = Fluid(PoolMeter(10.0, 1.0), [callers])
    served = [fluid.step(np.array([100.0]), 60.0) for _ in range(3)]
    assert [bin_.green[0] for bin_ in served] == [2 * 80, 2 * 60, 2 * 60]
    assert [bin_.borrowed[0] for bin_ in served] == [2 * (230 - 80), 2 * 120, 2 * 120]


def test_the_pool_fills_up_and_then_lends_its_rate() -> None:
    """A rank may fill its part of the pool's bucket once; from then on it borrows what leaks."""
    borrower = Callers("free", 1, {}, 1.0, plain={}, borrow_up_to=0.5, promised=False)
    fluid = Fluid(PoolMeter(1.0, 40.0), [borrower])
    served = [fluid.step(np.array([100.0]), 60.0).borrowed[0] for _ in range(3)]
    assert served == [60 + 20, 60, 60]


def test_lower_ranks_borrow_what_better_ones_leave() -> None:
    """Of a pool of 10 requests/s, the best rank takes its 8 and the next the 2 that are left; equal ranks share."""

    def borrower(tier: str, up_to: float) -> Callers:
        return Callers(tier, 1, {}, 1.0, plain={}, borrow_up_to=up_to, promised=False)

    ranked = steady(PoolMeter(10.0, 0.0), [borrower("last", 0.7), borrower("best", 0.9)], [8.0, 8.0])
    equal = steady(PoolMeter(10.0, 0.0), [borrower("one", 0.8), borrower("other", 0.8)], [15.0, 5.0])
    assert ranked.borrowed.tolist() == pytest.approx([2.0, 8.0])
    assert equal.borrowed.tolist() == pytest.approx([7.5, 2.5])


def test_green_work_is_never_refused_for_a_full_pool() -> None:
    """What is promised is charged to the pool unconditionally, and borrowers get what is left, here nothing."""
    promised = Callers("pro", 1, {"requests": 1.0}, 1.0, plain={"requests": Meter(12.0, 0.0)})
    borrower = Callers("free", 1, {}, 1.0, plain={}, borrow_up_to=0.9, promised=False)
    served = steady(PoolMeter(10.0, 0.0), [promised, borrower], [20.0, 5.0])
    assert served.green.tolist() == [12.0, 0.0]
    assert served.borrowed.tolist() == [0.0, 0.0]


def test_the_ceiling_of_a_tier_bounds_its_keys_together() -> None:
    """Two kinds of keys below their own ceilings are cut alike where their tier's is lower."""
    shared: dict[LimitName, Meter] = {"requests": Meter(6.0, 0.0)}

    def kind(keys: int) -> Callers:
        return Callers(
            "free",
            keys,
            {"requests": 1.0},
            0.1,
            plain={},
            shared=shared,
            borrow_up_to=0.9,
            promised=False,
        )

    served = steady(PoolMeter(10.0, 0.0), [kind(1), kind(3)], [4.0, 8.0])
    assert served.borrowed.tolist() == pytest.approx([2.0, 4.0])


def test_without_a_pool_everything_is_refused() -> None:
    """Where no replica serves the model, all is throttled, and nothing divides by zero."""
    demand = demand_of()
    shares = load(demand, published(keys=demand.keys())).at_worst()
    assert [share.throttled for share in shares.values()] == [1.0, 1.0, 1.0]


def test_shadow_tiers_are_refused_nothing() -> None:
    """A tier in shadow is counted only."""
    tiers = (ENTERPRISE, PRO, msgspec.structs.replace(FREE, shadow=True))
    demand = demand_of(times=10.0)
    shares = load(demand, published(group(1), keys=demand.keys(), tiers=tiers)).at_worst()
    assert shares["free"].throttled == 0


def scaled(callers: Callers, by: float) -> Callers:
    """The same callers, every rate of their limits so many times as large."""

    def times(meters: Mapping[LimitName, Meter]) -> dict[LimitName, Meter]:
        return {name: Meter(meter.per_s * by, meter.burst * by) for name, meter in meters.items()}

    return msgspec.structs.replace(
        callers,
        plain=times(callers.plain),
        assured=times(callers.assured),
        ceilings=times(callers.ceilings),
        shared=times(callers.shared),
    )


def scaled_pool(pool: PoolMeter, by: float) -> PoolMeter:
    """The same for a pool."""
    return PoolMeter(pool.per_s * by, pool.burst * by)
