"""Capacity × policy → limits. Pure: the same fleet, policy, keys and overrides give the same publication.

    usable     = (Σ requests/s of the replicas that count − the largest failure domains kept spare) × trim
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

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import get_args

import msgspec

from ratelimit.explain import number, shown, timestamp
from ratelimit.gputypes import by_gpu
from ratelimit.groupsupply import GroupSupply, SupplyError, Trim
from ratelimit.keylimits import Grant, amount_text, burst_of, countable, key_limits, lengths_of, tier_limits
from ratelimit.meter import THOUSANDTHS
from ratelimit.overrides import Override
from ratelimit.policy import (
    LEAST_BORROW,
    LimitName,
    Policy,
    PoolPolicy,
    Promise,
    TierPolicy,
    borrow_thresholds,
    promise_carriers,
    promise_of,
    promises_of,
)
from ratelimit.poolbudget import TTFT_SLACK_SHARE, published_pool
from ratelimit.poolsupply import Supply, supply_of
from ratelimit.publication import Limit, Publication, PublishedPool, TierLimits
from ratelimit.shares import grants_of

__all__ = ["TTFT_SLACK_SHARE", "GroupSupply", "Promise", "SupplyError", "Trim", "derive"]


def derive(
    epoch: int,
    published_at: str,
    reason: str,
    policy: Policy,
    supplies: Mapping[str, Sequence[GroupSupply]],
    active_keys: Mapping[tuple[str, str], int],
    overrides: Sequence[Override],
    trims: Mapping[str, Trim] = {},
) -> Publication:
    """The publication of this moment. ``overrides`` are those in force; the later of two about one limit wins.

    ``supplies`` and ``trims`` are by model, ``active_keys`` by tier and model. A model with no replica that counts
    keeps its pool, without replicas or budget, and its tiers have no limits. Raises ``SupplyError`` for counts that
    mean nothing.
    """
    _check_counts(active_keys)
    pools: list[PublishedPool] = []
    tiers: list[TierLimits] = []
    warnings: list[str] = []
    thresholds = borrow_thresholds(policy.tiers)
    lowest = min(filter(None, thresholds.values()), default=THOUSANDTHS)
    for pool in policy.pools:
        groups, trim = supplies.get(pool.model, ()), trims.get(pool.model)
        own, *_ = promises = promises_of(policy.tiers, pool)
        able = [group for group in groups if own in group.rates]
        fleet = by_gpu(groups)
        serving = fleet if len(able) == len(groups) else by_gpu(able)
        found = {own: supply_of(own, fleet, pool.spare_domains, trim)}
        found |= {promise: supply_of(promise, serving, pool.spare_domains, trim) for promise in promises[1:]}
        pools.append(published_pool(pool, able, found[own], lowest))
        keys = {tier.name: max(1, active_keys.get((tier.name, pool.model), 0)) for tier in policy.tiers}
        theirs = [found[promise_of(tier, pool)] for tier in policy.tiers]
        grants = grants_of(pool, policy.tiers, keys, theirs)
        for tier, supply, grant in zip(policy.tiers, theirs, grants, strict=True):
            limits = _tier_limits(tier, pool, keys[tier.name], supply, grant, overrides)
            published = _published_tier(tier, pool.model, keys[tier.name], limits, thresholds[tier.name])
            if not limits and not (_is_unlimited(tier) and found[own].usable):
                published = msgspec.structs.replace(published, note=f"no limits: {supply.text}")
            tiers.append(published if limits or not found[own].usable else _without_promise(published))
        warnings += _warnings(pool, policy.tiers, grants, found)
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
        tuple(dict.fromkeys(warnings)),
    )


def _check_counts(active_keys: Mapping[tuple[str, str], int]) -> None:
    for (tier, model), count in active_keys.items():
        if count < 0:
            raise SupplyError(f"tier {tier} on {model} has {count} active keys; count none or more")


def _warnings(
    pool: PoolPolicy, tiers: Sequence[TierPolicy], grants: Sequence[Grant], supplies: Mapping[Promise, Supply]
) -> list[str]:
    """What the operator must hear of a pool; of promises that tiers make for themselves, by the tier."""
    own = Promise(pool.mix, pool.slo)
    said = [f"{pool.model}: {problem}" for problem in supplies[own].problems]
    said += [
        f"{pool.model}, tier {tier.name}: {problem}"
        for tier in tiers
        if promise_of(tier, pool) != own
        for problem in supplies[promise_of(tier, pool)].problems
    ]
    cut = [tier.name for tier, grant in zip(tiers, grants, strict=True) if grant.kept < 1 and tier.share]
    if cut:
        said.append(
            f"{pool.model}: the minima of the tiers exceed what the pool can serve, so {number(grants[0].kept)} of "
            f"each is kept, and a tier without one is assured next to nothing ({', '.join(cut)}); add capacity, or "
            "lower the minima"
        )
    return said


def _tier_limits(
    tier: TierPolicy, pool: PoolPolicy, keys: int, supply: Supply, grant: Grant, overrides: Sequence[Override]
) -> tuple[Limit, ...]:
    """The limits of each of the tier's keys, and those of all of them together."""
    if not supply.usable:
        return ()
    of_tier = [override for override in overrides if override.tier == tier.name]
    lengths = lengths_of(promise_of(tier, pool).mix)
    derived = key_limits(tier, keys, supply, lengths, grant)
    keyed = [countable(_overridden(limit, pool.model, tier, of_tier)) for limit in derived]
    # A limit that an operator has set for each key bounds nothing else.
    unset = [limit for limit in keyed if all(each.sets(pool.model, limit.name) is None for each in of_tier)]
    return (*keyed, *map(countable, tier_limits(tier, keys, supply, lengths, unset)))


def _is_unlimited(tier: TierPolicy) -> bool:
    """Whether the operator gives the tier no derived limit: what it lacks then is none that could have been kept."""
    return set(get_args(LimitName)) <= set(tier.unlimited)


def _without_promise(tier: TierLimits) -> TierLimits:
    """A tier whose promise no replica can keep, in a pool that serves others: it borrows what is idle, as the last."""
    return msgspec.structs.replace(tier, assured=False, borrow_up_to=tier.borrow_up_to or LEAST_BORROW)


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
            return _replaced(limit, amount, amount, f"set, with a burst of {number(tier.burst_s)} s, to", override)
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
