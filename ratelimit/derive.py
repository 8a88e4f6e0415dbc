"""Capacity × policy → limits. Pure: the same fleet, policy, keys and overrides give the same publication.

    usable     = Σ requests/s of the replicas that count − the ``spare_replicas`` largest, but at least the largest one
    assured    = usable × tier share ÷ active keys of the tier          requests/s of one key
    most       = usable × tier ceiling                                  requests/s, of one key and of the tier
    tokens     = assured × mean tokens of the mix × 60                  per minute, uncached input and output apart
    ceilings   = most × mean tokens of the mix × 60                     per minute, while others leave it idle
    requests   = most × REQUEST_HEADROOM × 60                           per minute
    in flight  = most × residence within the SLO × CONCURRENCY_HEADROOM                (Little's law)

A replica's requests/s are its simulated knee, which already leaves the room that percentiles need. Tokens carry the
promise: over all assured tiers they never add up to more than the usable capacity, down to the floor of 1 per limit.
Where share == ceiling nothing is borrowed and ``assured`` takes the place of ``most``. A tier with share 0 is best
effort: it has ceilings only, and the pool's budget is what stops it.

The pool's budget is the cost (``fleet_cost_s``, in replica-microseconds) of the usable requests: the number of
replicas × their utilization at the knee. Its bucket holds as much work as the fleet does within the part of the TTFT
bound that a request may wait, so that what is admitted late is still in time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from math import ceil, fsum

import msgspec

from ratelimit.explain import approximate, factor_value, factor_value_up, number, shown, timestamp
from ratelimit.keylimits import (
    BURST_PERCENTILE,
    Supply,
    amount_text,
    burst_of,
    countable,
    key_limits,
    lengths_of,
    nearest_rank,
    tier_limits,
)
from ratelimit.meter import THOUSANDTHS
from ratelimit.overrides import Override
from ratelimit.policy import Policy, PoolPolicy, TierPolicy, borrow_thresholds, promise_carriers
from ratelimit.publication import (
    MOST_BUDGET_BURST,
    MOST_PER_MINUTE,
    Limit,
    Publication,
    PublishedPool,
    PublishedReplica,
    TierLimits,
)
from serving.capacity import ReplicaGroup, fleet_cost_s, merged_groups
from serving.stepsim import Knee

#: The part of the TTFT bound that a request may wait behind work admitted before it. The rest is for computing its own
#: prompt, and for the bursts of assured callers, whom the pool's bucket does not stop.
TTFT_SLACK_SHARE = 0.5
#: Of the mix's output lengths: what an answer is expected to need where the operator does not say.
DEFAULT_OUTPUT_PERCENTILE = 90

_MICROSECONDS = 1_000_000


class ReplicaSupply(msgspec.Struct, frozen=True):
    """A replica that counts: as published, as capacity (a group of 1, slowed as it is), and how that is known."""

    replica: PublishedReplica
    group: ReplicaGroup
    knee: Knee
    provenance: str


def derive(
    epoch: int,
    published_at: str,
    reason: str,
    policy: Policy,
    supplies: Mapping[str, Sequence[ReplicaSupply]],
    active_keys: Mapping[str, int],
    overrides: Sequence[Override],
) -> Publication:
    """The publication of this moment. ``overrides`` are those in force; the later of two about one limit wins.

    A model with no replica that counts keeps its pool, without replicas or budget, and its tiers have no limits.
    """
    pools: list[PublishedPool] = []
    tiers: list[TierLimits] = []
    thresholds = borrow_thresholds(policy.tiers)
    lowest = min(filter(None, thresholds.values()), default=THOUSANDTHS)
    for pool in policy.pools:
        replicas = supplies.get(pool.model, ())
        supply = _supply(pool, replicas)
        pools.append(_published_pool(pool, replicas, supply, lowest))
        for tier in policy.tiers:
            keys = max(1, active_keys.get(tier.name, 0))
            limits = _tier_limits(tier, pool, keys, supply, overrides)
            tiers.append(_published_tier(tier, pool.model, keys, limits, thresholds[tier.name]))
    return Publication(
        epoch,
        published_at,
        reason,
        policy.enforce,
        tuple(pools),
        tuple(tiers),
        policy.orgs,
        policy.rules,
        policy.shadow_keys,
    )


def _supply(pool: PoolPolicy, supplies: Sequence[ReplicaSupply]) -> Supply:
    """What the replicas serve together, less the spare ones; the worth of the largest replica is always given out."""
    rates = sorted((factor_value(s.replica.requests_per_s) for s in supplies), reverse=True)
    total, largest = sum(rates, Decimal(0)), max(rates, default=Decimal(0))
    spare = min(sum(rates[: pool.spare_replicas], Decimal(0)), total - largest)
    text = " + ".join(_kinds(pool, supplies)) or "no replica is healthy"
    if spare:
        text += f" − {number(spare)} kept spare (spare_replicas: {pool.spare_replicas})"
    ttft_s = max((s.group.slo.ttft_s for s in supplies), default=pool.slo.ttft_s)
    tpot_s = max((s.group.slo.tpot_s for s in supplies), default=pool.slo.tpot_s)
    mean_output = pool.mix.mean_output_tokens
    return Supply(
        usable=total - spare,
        text=f"{text} = {number(total - spare)} usable requests/s",
        residence_s=factor_value_up(ttft_s + mean_output * tpot_s),
        residence_text=f"s residence ({ttft_s:g} s to the first of {mean_output:.4g} tokens, {tpot_s:g} s for each)",
    )


def _kinds(pool: PoolPolicy, supplies: Sequence[ReplicaSupply]) -> list[str]:
    counts = Counter((s.replica.gpu, s.replica.slowdown, s.replica.requests_per_s, s.provenance) for s in supplies)
    kinds = []
    for (gpu, slowdown, requests_per_s, provenance), count in sorted(counts.items()):
        speed = "" if slowdown == 1 else f" (1:{slowdown:g} speed)"
        slo = pool.slo.slowed(slowdown)
        kinds.append(
            f"{count} × {gpu}{speed} × {number(factor_value(requests_per_s))} requests/s [{provenance}; knee at "
            f"p{slo.percentile:g} TTFT ≤ {slo.ttft_s:g} s, TPOT ≤ {slo.tpot_s * 1000:g} ms]"
        )
    return kinds


def _tier_limits(
    tier: TierPolicy, pool: PoolPolicy, keys: int, supply: Supply, overrides: Sequence[Override]
) -> tuple[Limit, ...]:
    """The limits of each of the tier's keys, and those of all of them together."""
    if not supply.usable:
        return ()
    of_tier = [override for override in overrides if override.tier == tier.name]
    derived = key_limits(tier, keys, supply, lengths_of(pool.mix))
    keyed = [countable(_overridden(limit, pool.model, tier, of_tier)) for limit in derived]
    # A limit that an operator has set for each key bounds nothing else.
    unset = [limit for limit in keyed if all(each.sets(pool.model, limit.name) is None for each in of_tier)]
    return (*keyed, *map(countable, tier_limits(tier, keys, unset)))


def _published_tier(
    tier: TierPolicy, model: str, keys: int, limits: tuple[Limit, ...], borrow_up_to: int
) -> TierLimits:
    return TierLimits(
        tier=tier.name,
        model=model,
        active_keys=keys,
        limits=limits,
        priority=tier.priority,
        borrow_up_to=borrow_up_to,
        assured=tier.share > 0 and bool(promise_carriers(tier)),
        holds=tier.holds,
        shadow=tier.shadow,
    )


def _overridden(limit: Limit, model: str, tier: TierPolicy, overrides: Sequence[Override]) -> Limit:
    for override in reversed(overrides):
        frozen, value = override.freezes(model, limit.name), override.sets(model, limit.name)
        if frozen is not None:
            ceiling = (frozen.ceiling_per_minute, frozen.ceiling_burst)
            return _replaced(limit, (frozen.per_minute, frozen.burst), ceiling, "frozen at", override)
        if value is not None and limit.name == "concurrency":
            return _replaced(limit, (0, value), (0, 0), "set to", override)
        if value is not None:
            amount = (value, shown(burst_of(Fraction(value), tier.burst_s)))
            return _replaced(limit, amount, amount, "set to", override)
    return limit


def _replaced(limit: Limit, amount: tuple[int, int], ceiling: tuple[int, int], verb: str, override: Override) -> Limit:
    """The limit at an operator's numbers. One of two colours keeps them: its ceiling is at least its amount."""
    two_colours = limit.ceiling_per_minute > 0
    replaced = msgspec.structs.replace(
        limit,
        per_minute=amount[0],
        burst=amount[1],
        ceiling_per_minute=max(amount[0], ceiling[0]) if two_colours else 0,
        ceiling_burst=max(amount[1], ceiling[1]) if two_colours else 0,
    )
    said = f"{verb} {amount_text(replaced)} by operator until {timestamp(override.until)}: {override.reason}"
    return msgspec.structs.replace(replaced, explanation=f"{said}\nwithout it: {limit.explanation}")


def _published_pool(
    pool: PoolPolicy, supplies: Sequence[ReplicaSupply], supply: Supply, lowest_threshold: int
) -> PublishedPool:
    groups = merged_groups([s.group for s in supplies])
    costs_s = [fleet_cost_s(groups, shape) for shape in pool.mix.shapes] if groups else [0.0]
    cost_s = fsum(costs_s) / len(costs_s)
    usable = float(supply.usable)
    rate = min(int(usable * cost_s * 60 * _MICROSECONDS), MOST_PER_MINUTE)
    burst, burst_text = _pool_burst(usable * cost_s, costs_s, groups, lowest_threshold)
    default_output = pool.default_max_output
    if default_output is None:
        default_output = nearest_rank((shape.output_tokens for shape in pool.mix.shapes), DEFAULT_OUTPUT_PERCENTILE)
    return PublishedPool(
        model=pool.model,
        replicas=tuple(s.replica for s in supplies),
        groups=groups,
        max_model_len=pool.max_model_len,
        tokens_per_byte=pool.tokens_per_byte,
        default_max_output=default_output,
        budget_per_minute=rate,
        budget_burst=burst,
        usable_requests_per_s=usable,
        usable_input_tokens_per_s=usable * pool.mix.mean_input_tokens,
        usable_output_tokens_per_s=usable * pool.mix.mean_output_tokens,
        explanation=f"{supply.text}\n× {cost_s:.4g} replica-seconds of cost a request = {usable * cost_s:.4g} of "
        f"{len(supplies)} replicas busy; {burst_text}",
        priority_scheduling=pool.priority_scheduling,
    )


def _pool_burst(
    busy: float, costs_s: Sequence[float], groups: Sequence[ReplicaGroup], lowest_threshold: int
) -> tuple[int, str]:
    """The capacity of a pool's bucket, in replica-microseconds, and why; ``busy`` replicas drain it.

    Whoever may borrow the least of it, ``lowest_threshold`` thousandths, can still bring a big request.
    """
    slack_s = TTFT_SLACK_SHARE * min((group.slo.ttft_s for group in groups), default=0.0)
    big_us = ceil(nearest_rank(costs_s, BURST_PERCENTILE) * _MICROSECONDS)
    least_us = -(-big_us * THOUSANDTHS // lowest_threshold)
    full = max(int(busy * slack_s * _MICROSECONDS), least_us)
    burst = min(full, MOST_BUDGET_BURST)
    cut = ", cut to what can be counted exactly" if burst < full else ""
    return burst, (
        f"burst {approximate(Fraction(burst, _MICROSECONDS))} replica-seconds: {slack_s:g} s of it, the part of the "
        f"TTFT bound that a request may wait (× {TTFT_SLACK_SHARE:g}: the rest is for its own prompt), at least "
        f"{approximate(Fraction(least_us, _MICROSECONDS))} (the p{BURST_PERCENTILE} request within "
        f"{lowest_threshold / THOUSANDTHS:g} of it){cut}"
    )
