"""Capacity × policy → limits. Pure: the same fleet, policy, keys and overrides give the same publication.

    usable     = Σ requests/s of the replicas that count − the ``spare_replicas`` largest, but at least the largest one
    per key    = usable × tier share ÷ active keys of the tier          requests/s, the key's *fair rate*
    tokens     = fair rate × mean tokens of the mix × 60                 per minute, uncached input and output apart
    requests   = fair rate × REQUEST_HEADROOM × 60                       per minute
    in flight  = fair rate × residence within the SLO × CONCURRENCY_HEADROOM            (Little's law)

A replica's requests/s are its simulated knee, which already leaves the room that percentiles need. Tokens carry the
promise: over all assured tiers they never add up to more than the usable capacity, down to the floor of 1 per limit.
A tier with share 0 is best effort: its ceiling takes the place of the share, and the pool's budget is what stops it.

The pool's budget is the cost (``fleet_cost_s``, in replica-microseconds) of the usable requests: the number of
replicas × their utilization at the knee.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from math import fsum

import msgspec

from ratelimit.explain import approximate, factor_value, factor_value_up, number, shown, timestamp
from ratelimit.keylimits import Lengths, Supply, burst_of, countable, key_limits, lengths_of
from ratelimit.overrides import Override
from ratelimit.policy import Policy, PoolPolicy, TierPolicy
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

#: The pool's bucket holds this many times what the bursts of all keys can bring, so that callers inside their own
#: limits do not meet it under the mix the pool is sized for.
POOL_BURST_FACTOR = 2

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
    for pool in policy.pools:
        replicas = supplies.get(pool.model, ())
        supply, lengths = _supply(pool, replicas), lengths_of(pool.mix)
        of_pool = [
            _tier_limits(tier, pool.model, max(1, active_keys.get(tier.name, 0)), supply, lengths, overrides)
            for tier in policy.tiers
        ]
        pools.append(_published_pool(pool, replicas, supply, lengths, of_pool))
        tiers += of_pool
    return Publication(epoch, published_at, reason, policy.enforce, tuple(pools), tuple(tiers), policy.orgs)


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
    tier: TierPolicy, model: str, keys: int, supply: Supply, lengths: Lengths, overrides: Sequence[Override]
) -> TierLimits:
    if not supply.usable:
        return TierLimits(tier.name, model, keys, ())
    of_tier = [override for override in overrides if override.tier == tier.name]
    derived = key_limits(tier, keys, supply, lengths)
    limits = (countable(_overridden(limit, model, tier, of_tier)) for limit in derived)
    return TierLimits(tier.name, model, keys, tuple(limits))


def _overridden(limit: Limit, model: str, tier: TierPolicy, overrides: Sequence[Override]) -> Limit:
    for override in reversed(overrides):
        frozen, value = override.freezes(model, limit.name), override.sets(model, limit.name)
        if frozen is not None:
            return _replaced(limit, frozen.per_minute, frozen.burst, "frozen at", override)
        if value is not None and limit.name == "concurrency":
            return _replaced(limit, 0, value, "set to", override)
        if value is not None:
            return _replaced(limit, value, shown(burst_of(Fraction(value), tier.burst_s)), "set to", override)
    return limit


def _replaced(limit: Limit, per_minute: int, burst: int, verb: str, override: Override) -> Limit:
    value = f"{per_minute:,}/min, burst {burst:,}" if per_minute else f"{burst:,} in flight"
    said = f"{verb} {value} by operator until {timestamp(override.until)}: {override.reason}"
    return Limit(limit.name, per_minute, burst, f"{said}\nwithout it: {limit.explanation}")


def _published_pool(
    pool: PoolPolicy,
    supplies: Sequence[ReplicaSupply],
    supply: Supply,
    lengths: Lengths,
    tiers: Sequence[TierLimits],
) -> PublishedPool:
    groups = merged_groups([s.group for s in supplies])
    cost_s = fsum(fleet_cost_s(groups, shape) for shape in pool.mix.shapes) / len(pool.mix.shapes) if groups else 0.0
    usable = float(supply.usable)
    rate = min(int(usable * cost_s * 60 * _MICROSECONDS), MOST_PER_MINUTE)
    burst_requests = fsum(tier.active_keys * _burst_requests(tier, lengths) for tier in tiers)
    full_burst = int(POOL_BURST_FACTOR * burst_requests * cost_s * _MICROSECONDS)
    burst = min(full_burst, MOST_BUDGET_BURST)
    cut = ", cut to what can be counted exactly" if burst < full_burst else ""
    return PublishedPool(
        model=pool.model,
        replicas=tuple(s.replica for s in supplies),
        groups=groups,
        max_model_len=pool.max_model_len,
        tokens_per_byte=pool.tokens_per_byte,
        default_max_output=pool.default_max_output,
        budget_per_minute=rate,
        budget_burst=burst,
        usable_requests_per_s=usable,
        usable_input_tokens_per_s=usable * pool.mix.mean_input_tokens,
        usable_output_tokens_per_s=usable * pool.mix.mean_output_tokens,
        explanation=f"{supply.text}\n× {cost_s:.4g} replica-seconds of cost a request = {usable * cost_s:.4g} of "
        f"{len(supplies)} replicas busy; burst {approximate(Fraction(burst, _MICROSECONDS))} replica-seconds: "
        f"{POOL_BURST_FACTOR} × the bursts of all keys{cut}",
    )


def _burst_requests(tier: TierLimits, lengths: Lengths) -> float:
    """Mean requests that the token bursts of one key can bring at once."""
    bursts = {limit.name: limit.burst for limit in tier.limits}
    if not bursts:
        return 0.0
    return max(bursts["input_tokens"] / float(lengths.mean_input), bursts["output_tokens"] / float(lengths.mean_output))
