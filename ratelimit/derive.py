"""Capacity × policy → limits. Pure: the same fleet, policy, keys and overrides give the same publication.

    usable     = Σ requests/s of the replicas that count − the ``spare_replicas`` largest of them
    per key    = usable × tier share ÷ active keys of the tier          requests/s, the key's *fair rate*
    tokens     = fair rate × mean tokens of the mix × 60                 per minute, uncached input and output apart
    requests   = fair rate × REQUEST_HEADROOM × 60                       per minute
    in flight  = fair rate × residence within the SLO × CONCURRENCY_HEADROOM            (Little's law)

A replica's requests/s are its simulated knee, which already leaves the room that percentiles need. Tokens carry the
promise: over all assured tiers they never add up to more than the usable capacity, down to the floor of 1 per limit.
A tier with share 0 is best effort; its ceiling takes the place of the share, and the pool's budget guards the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from math import ceil, fsum

import msgspec

from ratelimit.explain import (
    Factor,
    approximate,
    factor_value,
    factor_value_up,
    formula,
    number,
    product,
    shown,
    shown_up,
    timestamp,
)
from ratelimit.overrides import Override
from ratelimit.policy import Policy, PoolPolicy, TierPolicy
from ratelimit.publication import Limit, LimitName, Publication, PublishedPool, PublishedReplica, TierLimits
from serving.capacity import ReplicaGroup, WorkloadMix, fleet_cost_s
from serving.stepsim import Knee

#: A full token bucket lets small requests pass more easily than big ones, so a caller over its limits is admitted more
#: requests per token than the mix has. A request limit at the mean rate would then bind before the tokens that carry
#: the promise, and leave capacity idle.
REQUEST_HEADROOM = 2

#: Concurrency bounds what overruns can hold at once. Arrivals bunch, and over the limits small requests crowd in: four
#: times the mean number in flight keeps it from binding before the tokens do.
CONCURRENCY_HEADROOM = 4
LEAST_CONCURRENCY = 2

#: The pool's bucket holds this many times what the bursts of all keys can bring, so that callers inside their own
#: limits do not meet it under the mix the pool is sized for.
POOL_BURST_FACTOR = 2

#: Bursts admit at least one request of this size, as a percentile of the mix.
BURST_PERCENTILE = 99

_MICROSECONDS = 1_000_000


class ReplicaSupply(msgspec.Struct, frozen=True):
    """A replica that counts: as published, as capacity (a group of 1, slowed as it is), and how that is known."""

    replica: PublishedReplica
    group: ReplicaGroup
    knee: Knee
    provenance: str


class _Supply(msgspec.Struct, frozen=True):
    """What one pool can serve, in requests/s of its mix, with the printed derivation of that number."""

    usable: Decimal
    text: str
    residence: Decimal
    residence_text: str


class _Lengths(msgspec.Struct, frozen=True):
    """The mix in three numbers; ``p99_requests`` is a big request's size in mean ones."""

    mean_input: Decimal
    mean_output: Decimal
    p99_requests: Decimal


class _KeyRate(msgspec.Struct, frozen=True):
    """One key's fair rate and burst, still as factors."""

    usable: Decimal
    usable_text: str
    factors: tuple[Factor, ...]
    burst_s: Decimal
    lengths: _Lengths


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
        pool_supplies = supplies.get(pool.model, ())
        of_pool = _tier_limits(policy, pool, pool_supplies, active_keys, overrides)
        pools.append(_published_pool(pool, pool_supplies, of_pool))
        tiers += of_pool
    return Publication(epoch, published_at, reason, policy.enforce, tuple(pools), tuple(tiers))


def _tier_limits(
    policy: Policy,
    pool: PoolPolicy,
    supplies: Sequence[ReplicaSupply],
    active_keys: Mapping[str, int],
    overrides: Sequence[Override],
) -> list[TierLimits]:
    counts = {tier.name: max(1, active_keys.get(tier.name, 0)) for tier in policy.tiers}
    supply = _supply(pool, supplies)
    if not supply.usable:
        return [TierLimits(tier.name, pool.model, counts[tier.name], ()) for tier in policy.tiers]
    lengths = _lengths(pool.mix)
    limits = []
    for tier in policy.tiers:
        derived = _key_limits(_key_rate(tier, counts[tier.name], supply, lengths), supply)
        of_tier = [override for override in overrides if override.tier == tier.name]
        final = tuple(_overridden(limit, pool.model, tier, of_tier) for limit in derived)
        limits.append(TierLimits(tier.name, pool.model, counts[tier.name], final))
    return limits


def _supply(pool: PoolPolicy, supplies: Sequence[ReplicaSupply]) -> _Supply:
    rates = sorted((factor_value(s.replica.requests_per_s) for s in supplies), reverse=True)
    spare = rates[: pool.spare_replicas]
    usable = sum(rates, Decimal(0)) - sum(spare, Decimal(0))
    text = " + ".join(_kinds(pool, supplies)) or "no replica is healthy"
    if spare:
        text += f" − the {len(spare)} largest kept spare ({number(sum(spare, Decimal(0)))})"
    text += f" = {number(usable)} usable requests/s"
    ttft_s = max((s.group.slo.ttft_s for s in supplies), default=pool.slo.ttft_s)
    tpot_s = max((s.group.slo.tpot_s for s in supplies), default=pool.slo.tpot_s)
    residence = factor_value_up(ttft_s + pool.mix.mean_output_tokens * tpot_s)
    return _Supply(
        usable,
        text,
        residence,
        f"s residence ({ttft_s:g} s to the first of {pool.mix.mean_output_tokens:.4g} tokens, {tpot_s:g} s for each)",
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


def _lengths(mix: WorkloadMix) -> _Lengths:
    p99_input = _percentile([shape.input_tokens - shape.cached_tokens for shape in mix.shapes])
    p99_output = _percentile([shape.output_tokens for shape in mix.shapes])
    # A mix whose input is all cached still needs a bucket for the prompt that is not.
    mean_input, mean_output = max(mix.mean_input_tokens, 1.0), mix.mean_output_tokens
    return _Lengths(
        factor_value(mean_input),
        factor_value(mean_output),
        factor_value_up(max(p99_input / mean_input, p99_output / mean_output)),
    )


def _percentile(values: list[int]) -> int:
    """The nearest-rank percentile ``BURST_PERCENTILE``."""
    return sorted(values)[ceil(len(values) * BURST_PERCENTILE / 100) - 1]


def _key_rate(tier: TierPolicy, keys: int, supply: _Supply, lengths: _Lengths) -> _KeyRate:
    share, what = (tier.share, "tier share") if tier.share else (tier.ceiling, "best-effort ceiling")
    return _KeyRate(
        supply.usable,
        supply.text,
        (Factor("×", Decimal(str(share)), what), Factor("÷", Decimal(keys), "active keys")),
        Decimal(str(tier.burst_s)),
        lengths,
    )


def _key_limits(rate: _KeyRate, supply: _Supply) -> tuple[Limit, ...]:
    lengths = rate.lengths
    requests = _rated("requests", rate, Factor("×", Decimal(REQUEST_HEADROOM), "headroom over the mean"))
    return (
        requests,
        _rated("input_tokens", rate, Factor("×", lengths.mean_input, "uncached input tokens")),
        _rated("output_tokens", rate, Factor("×", lengths.mean_output, "output tokens")),
        _concurrency(rate, supply, requests.burst),
    )


def _rated(name: LimitName, rate: _KeyRate, size: Factor) -> Limit:
    """A limit per minute: fair rate × ``size``; a burst of ``burst_s`` of it, or one p99 request if more."""
    factors = (*rate.factors, size, Factor("×", Decimal(60), "s"))
    exact = product(rate.usable, factors)
    per_minute = shown(exact)
    big = shown_up(Fraction(rate.lengths.p99_requests) * Fraction(size.value))
    burst = max(shown(exact * Fraction(rate.burst_s) / 60), big)
    text = formula(f"{number(rate.usable)} requests/s", factors, exact)
    return Limit(
        name,
        per_minute,
        burst,
        f"{rate.usable_text}\n{text} → {per_minute:,}/min; burst {burst:,}: {number(rate.burst_s)} s of it, "
        f"at least {big:,} ({number(rate.lengths.p99_requests)} mean requests, the p{BURST_PERCENTILE})",
    )


def _concurrency(rate: _KeyRate, supply: _Supply, request_burst: int) -> Limit:
    factors = (
        *rate.factors,
        Factor("×", supply.residence, supply.residence_text),
        Factor("×", Decimal(CONCURRENCY_HEADROOM), "headroom over the mean"),
    )
    exact = product(rate.usable, factors)
    in_flight = max(shown(exact), request_burst, LEAST_CONCURRENCY)
    text = formula(f"{number(rate.usable)} requests/s", factors, exact)
    return Limit(
        "concurrency",
        0,
        in_flight,
        f"{rate.usable_text}\n{text} → {in_flight:,} in flight, at least {LEAST_CONCURRENCY} "
        f"and a burst of requests ({request_burst:,})",
    )


def _overridden(limit: Limit, model: str, tier: TierPolicy, overrides: Sequence[Override]) -> Limit:
    for override in reversed(overrides):
        frozen, value = override.freezes(model, limit.name), override.sets(model, limit.name)
        if frozen is not None:
            return _replaced(limit, frozen.per_minute, frozen.burst, "frozen", override)
        if value is not None and limit.name == "concurrency":
            return _replaced(limit, 0, value, "set", override)
        if value is not None:
            return _replaced(limit, value, shown(Fraction(value) * Fraction(str(tier.burst_s)) / 60), "set", override)
    return limit


def _replaced(limit: Limit, per_minute: int, burst: int, verb: str, override: Override) -> Limit:
    value = f"{per_minute:,}/min, burst {burst:,}" if per_minute else f"{burst:,} in flight"
    said = f"{verb} to {value} by operator until {timestamp(override.until)}: {override.reason}"
    return Limit(limit.name, per_minute, burst, f"{said}\nwithout it: {limit.explanation}")


def _published_pool(pool: PoolPolicy, supplies: Sequence[ReplicaSupply], tiers: Sequence[TierLimits]) -> PublishedPool:
    supply = _supply(pool, supplies)
    groups = _merged([s.group for s in supplies])
    cost_s = fsum(fleet_cost_s(groups, shape) for shape in pool.mix.shapes) / len(pool.mix.shapes) if groups else 0.0
    usable = float(supply.usable)
    rate = int(usable * cost_s * 60 * _MICROSECONDS)
    burst_requests = fsum(tier.active_keys * _burst_requests(tier, _lengths(pool.mix)) for tier in tiers)
    burst = int(POOL_BURST_FACTOR * burst_requests * cost_s * _MICROSECONDS)
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
        f"{POOL_BURST_FACTOR} × the bursts of all keys",
    )


def _merged(groups: Sequence[ReplicaGroup]) -> tuple[ReplicaGroup, ...]:
    counts: Counter[ReplicaGroup] = Counter()
    for group in groups:
        counts[msgspec.structs.replace(group, count=1)] += group.count
    return tuple(msgspec.structs.replace(group, count=count) for group, count in counts.items())


def _burst_requests(tier: TierLimits, lengths: _Lengths) -> float:
    """Mean requests that the token bursts of one key can bring at once."""
    bursts = {limit.name: limit.burst for limit in tier.limits}
    if not bursts:
        return 0.0
    return max(bursts["input_tokens"] / float(lengths.mean_input), bursts["output_tokens"] / float(lengths.mean_output))
