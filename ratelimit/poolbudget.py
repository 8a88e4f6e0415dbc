"""A pool as it is published: its replicas, what they can serve, and the bucket that all its callers fill. Pure.

The pool's budget is the cost (``fleet_cost_s``, in replica-microseconds) of the usable requests: the number of
replicas × their utilization at the knee. Its bucket holds as much work as the fleet does within the part of the TTFT
bound that a request may wait, so that what is admitted late is still in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from math import ceil, floor

import msgspec

from ratelimit.explain import approximate, factor_value, number
from ratelimit.groupsupply import GroupSupply
from ratelimit.keylimits import BURST_PERCENTILE, nearest_rank
from ratelimit.meter import THOUSANDTHS
from ratelimit.policy import PoolPolicy
from ratelimit.poolsupply import Supply
from ratelimit.publication import MOST_BUDGET_BURST, MOST_PER_MINUTE, PublishedPool
from serving.capacity import ReplicaGroup, WorkloadMix
from serving.fleetcost import fleet_costs_s

#: The part of the TTFT bound that a request may wait behind work admitted before it. The rest is for computing its own
#: prompt, and for the bursts of assured callers, whom the pool's bucket does not stop.
TTFT_SLACK_SHARE = 0.5
#: Of the mix's output lengths: what an answer is expected to need where the operator does not say.
DEFAULT_OUTPUT_PERCENTILE = 90

_MICROSECONDS = 1_000_000


def published_pool(
    pool: PoolPolicy, supplies: Sequence[GroupSupply], supply: Supply, lowest_threshold: int
) -> PublishedPool:
    """The pool of these replicas; whoever may borrow the least of its bucket may fill ``lowest_threshold`` of it."""
    fleet = _merged(supplies)
    groups = tuple(fleet.values())
    counts = {kind: group.count for kind, group in fleet.items()}
    costs_s = fleet_costs_s(counts, pool.mix).tolist() if counts else [0.0]
    cost_s = factor_value(sum(costs_s) / len(costs_s))
    busy = supply.usable * cost_s
    burst, burst_text = _burst(busy, costs_s, groups, lowest_threshold)
    default_output = pool.default_max_output
    if default_output is None:
        default_output = _default_output(pool.mix)
    usable = float(supply.usable)
    return PublishedPool(
        model=pool.model,
        replicas=tuple(chain.from_iterable(s.replicas for s in supplies)),
        groups=groups,
        max_model_len=pool.max_model_len,
        tokens_per_byte=pool.tokens_per_byte,
        default_max_output=default_output,
        budget_per_minute=min(floor(busy * 60 * _MICROSECONDS), MOST_PER_MINUTE),
        budget_burst=burst,
        usable_requests_per_s=usable,
        usable_input_tokens_per_s=usable * pool.mix.mean_input_tokens,
        usable_output_tokens_per_s=usable * pool.mix.mean_output_tokens,
        explanation=f"{supply.text}\n{number(supply.usable)} requests/s × {number(cost_s)} replica-seconds of cost a "
        f"request = {approximate(Fraction(busy))} of {sum(group.count for group in groups):,} replicas busy; "
        f"{burst_text}",
        priority_scheduling=pool.priority_scheduling,
        runs=_runs(supplies, fleet),
    )


def _runs(supplies: Sequence[GroupSupply], fleet: Mapping[ReplicaGroup, ReplicaGroup]) -> tuple[tuple[int, int], ...]:
    """Of which group of the fleet the replicas of the supplies are, one after the other."""
    index = {kind: number for number, kind in enumerate(fleet)}
    return tuple((index[each.kind], len(each.replicas)) for each in supplies if each.replicas)


@lru_cache(maxsize=64)
def _default_output(mix: WorkloadMix) -> int:
    return nearest_rank((shape.output_tokens for shape in mix.shapes), DEFAULT_OUTPUT_PERCENTILE)


def _merged(supplies: Sequence[GroupSupply]) -> dict[ReplicaGroup, ReplicaGroup]:
    """The groups by their kind (one replica of them), those of one kind counted together."""
    fleet: dict[ReplicaGroup, ReplicaGroup] = {}
    for supply in supplies:
        group, known = supply.group, fleet.get(supply.kind)
        if group.count:
            fleet[supply.kind] = msgspec.structs.replace(group, count=group.count + known.count) if known else group
    return fleet


def _burst(
    busy: Decimal, costs_s: Sequence[float], groups: Sequence[ReplicaGroup], lowest_threshold: int
) -> tuple[int, str]:
    """The capacity of a pool's bucket, in replica-microseconds, and why; ``busy`` replicas drain it.

    Whoever may borrow the least of it, ``lowest_threshold`` thousandths, can still bring a big request.
    """
    slack_s = TTFT_SLACK_SHARE * min((group.slo.ttft_s for group in groups), default=0.0)
    big_us = ceil(nearest_rank(costs_s, BURST_PERCENTILE) * _MICROSECONDS)
    least_us = -(-big_us * THOUSANDTHS // lowest_threshold)
    full = max(floor(busy * Decimal(str(slack_s)) * _MICROSECONDS), least_us)
    burst = min(full, MOST_BUDGET_BURST)
    cut = ", cut to what can be counted exactly" if burst < full else ""
    return burst, (
        f"burst {approximate(Fraction(burst, _MICROSECONDS))} replica-seconds: {slack_s:g} s of it, the part of the "
        f"TTFT bound that a request may wait (× {TTFT_SLACK_SHARE:g}: the rest is for its own prompt), at least "
        f"{approximate(Fraction(least_us, _MICROSECONDS))} (the p{BURST_PERCENTILE} request within "
        f"{lowest_threshold / THOUSANDTHS:g} of it){cut}"
    )
