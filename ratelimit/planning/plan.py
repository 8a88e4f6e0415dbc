"""A plan from its inputs: supply, the limits that ``derive`` gives, who is throttled, what running it takes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isinf

import msgspec

from ratelimit.derive import GroupSupply, derive
from ratelimit.planning.demand import Demand, DemandError
from ratelimit.planning.knees import Found, KneeKey
from ratelimit.planning.outcome import GpuSupply, Outcome, ProvenanceNote, Side, SweepPoint, TierOutcome, Usable
from ratelimit.planning.running import Power, Prices, Redis, cells, energy
from ratelimit.planning.sites import Fleets, Site, totals
from ratelimit.planning.tested import Planned, error_stated
from ratelimit.planning.throttled import Load, Share, load_of, sizes_of
from ratelimit.planning.throttling import serves
from ratelimit.policy import Policy, PoolPolicy, Promise, promise_of, promises_of
from ratelimit.publication import Publication, TierLimits
from ratelimit.supply import domain_replicas
from serving.capacity import ReplicaGroup, Slo
from serving.profile import Profile


class Inputs(msgspec.Struct, frozen=True):
    """Everything that a plan is made of. The policy has one pool; ``profiles`` are by GPU type.

    The demand is refused where its work is not within ``demand_within`` times what the fleet gives out.
    """

    name: str
    title: str
    policy: Policy
    fleets: Fleets
    profiles: Mapping[str, Profile]
    demand: Demand
    power: Power
    prices: Prices
    redis: Redis
    demand_within: tuple[float, float]
    stated: tuple[str, ...] = ()

    @property
    def pool(self) -> PoolPolicy:
        """The only pool."""
        return self.policy.pools[0]

    def knee_keys(self) -> list[KneeKey]:
        """The knees that the plan needs."""
        promises = promises_of(self.policy.tiers, self.pool)
        return [KneeKey(profile, promise) for profile in self.profiles.values() for promise in promises]


def outcome(inputs: Inputs, knees: Mapping[KneeKey, Found]) -> Outcome:
    """The whole plan. Raises ``DemandError`` for a demand in other units than it says."""
    _check_lengths(inputs)
    fleets = [sites for sites in (inputs.fleets.before, inputs.fleets.after) if sites is not None]
    derived = [_derived(inputs, sites, knees) for sites in fleets]
    _check_demand(inputs, [load for _, _, load in derived])
    sides = [_side(inputs, sites, *found) for sites, found in zip(fleets, derived, strict=True)]
    pool = inputs.pool
    return Outcome(
        name=inputs.name,
        title=inputs.title or inputs.name,
        model=pool.model,
        promise=f"p{pool.slo.percentile:g} TTFT ≤ {pool.slo.ttft_s:g} s, TPOT ≤ {pool.slo.tpot_s * 1000:g} ms, "
        f"mix {pool.mix.name} ({pool.mix.mean_input_tokens:,.4g} uncached input, {pool.mix.mean_output_tokens:,.4g} "
        "output tokens in the mean)",
        demand=inputs.demand.source,
        change=inputs.fleets.change,
        after=sides[-1],
        before=sides[0] if len(sides) > 1 else None,
        assumptions=(*inputs.stated, error_stated(_as_tested(sides, [load for _, _, load in derived]))),
    )


def _as_tested(sides: Sequence[Side], loads: Sequence[Load]) -> list[Planned]:
    words = ("before", "after") if len(sides) > 1 else ("this fleet",)
    return [
        Planned(word, side.usable.requests_per_s, load.heaviest(), len(load.demand.keys()))
        for word, side, load in zip(words, sides, loads, strict=True)
    ]


def provenance_of(profile: Profile) -> ProvenanceNote:
    """How a profile is known, in full and in short."""
    known = profile.provenance
    text = f"{profile.name}, {known.kind} {known.date}"
    engine = f"{known.engine} {known.engine_version}, {known.dtype}, {known.parallelism}"
    return ProvenanceNote(known.kind, profile.name, known.date, engine, known.source, known.anchors, text)


def _derived(
    inputs: Inputs, sites: Sequence[Site], knees: Mapping[KneeKey, Found]
) -> tuple[dict[str, GroupSupply], Publication, Load]:
    pool = inputs.pool
    promises = promises_of(inputs.policy.tiers, pool)
    groups = {
        gpu: _group(inputs.profiles[gpu], _replicas(sites, gpu, inputs.profiles[gpu]), promises, knees)
        for gpu, count in totals(sites).items()
        if count
    }
    keys = {(tier, pool.model): count for tier, count in inputs.demand.keys().items()}
    published = derive(0, "", f"plan {inputs.name}", inputs.policy, {pool.model: tuple(groups.values())}, keys, ())
    tiers = {tier.tier: tier for tier in published.tiers}
    return groups, published, load_of(inputs.demand, published.pools[0], tiers, _slos(inputs))


def _slos(inputs: Inputs) -> dict[str, Slo]:
    return {tier.name: promise_of(tier, inputs.pool).slo for tier in inputs.policy.tiers}


def _replicas(sites: Iterable[Site], gpu: str, profile: Profile) -> int:
    """Whole replicas; none spans two sites."""
    return sum(site.gpus.get(gpu, 0) // profile.gpus_per_replica for site in sites)


def _group(profile: Profile, count: int, promises: Sequence[Promise], knees: Mapping[KneeKey, Found]) -> GroupSupply:
    found = {promise: knees[KneeKey(profile, promise)] for promise in promises}
    point = found[promises[0]]
    step_time = profile.step_time if isinstance(point, str) else point.step_time
    note = "" if isinstance(point, str) else point.note
    return GroupSupply(
        group=ReplicaGroup(count, step_time, profile.limits, promises[0].slo),
        gpu=profile.gpu,
        gpus_per_replica=profile.gpus_per_replica,
        profile=profile.name,
        slowdown=1.0,
        knees={promise: each.knee for promise, each in found.items() if not isinstance(each, str)},
        provenance=", ".join(filter(None, (provenance_of(profile).text, note))),
        domain_replicas=domain_replicas(profile),
        infeasible={promise: each for promise, each in found.items() if isinstance(each, str)},
    )


def _side(
    inputs: Inputs,
    sites: Sequence[Site],
    groups: Mapping[str, GroupSupply],
    published: Publication,
    load: Load,
) -> Side:
    supply = {gpu: _gpu_supply(inputs, gpu, sites, group) for gpu, group in groups.items()}
    worst, mean = load.at_worst(), load.at_mean()
    usable = _usable(inputs, supply, published)
    absent = None if serves(published.pools[0]) else 0
    offered = sum(share.offered_per_s for share in worst.values())
    pool = inputs.pool
    residence_s = sizes_of(pool.mix, pool.slo)["concurrency"]
    gpus = sum(totals(sites).values())
    nobody, keys = Share(0.0, 0.0, 0.0), inputs.demand.keys()
    return Side(
        fleet=_fleet(inputs, sites),
        supply=supply,
        usable=usable,
        tiers=tuple(
            _tier(tier, keys.get(tier.tier, 0), worst.get(tier.tier, nobody), mean.get(tier.tier, nobody), absent)
            for tier in published.tiers
        ),
        cells=cells(offered, usable.requests_per_s, residence_s, gpus, inputs.redis),
        energy=energy(sites, supply, inputs.power, inputs.prices),
        sweep=tuple(
            SweepPoint(times, {tier: share.throttled for tier, share in shares.items()})
            for times, shares in load.sweep()
        ),
    )


def _fleet(inputs: Inputs, sites: Sequence[Site]) -> dict[str, object]:
    gpus = {gpu: count for gpu, count in totals(sites).items() if count}
    return {
        "name": inputs.name,
        "model": inputs.pool.model,
        "gpus": gpus,
        "total_gpus": sum(gpus.values()),
        "sites": [{"name": site.name, "gpus": dict(site.gpus), "power_limit_w": site.power_limit_w} for site in sites],
    }


def _gpu_supply(inputs: Inputs, gpu: str, sites: Sequence[Site], supplied: GroupSupply) -> GpuSupply:
    pool, profile = inputs.pool, inputs.profiles[gpu]
    own = Promise(pool.mix, pool.slo)
    knee = supplied.knees.get(own)
    count = totals(sites)[gpu]
    rate = supplied.group.count * float(supplied.rates.get(own, 0))
    used = supplied.group.count * profile.gpus_per_replica
    return GpuSupply(
        gpus=count,
        idle_gpus=count - used,
        gpus_per_replica=profile.gpus_per_replica,
        replicas=supplied.group.count,
        domain_gpus=supplied.domain_replicas * profile.gpus_per_replica,
        requests_per_s=rate,
        input_tokens_per_s=rate * pool.mix.mean_input_tokens,
        output_tokens_per_s=rate * pool.mix.mean_output_tokens,
        output_tokens_per_s_per_gpu=rate * pool.mix.mean_output_tokens / used if used else 0.0,
        knee_bound=knee.bound if knee else "",
        knee_ttft_s=knee.ttft_s if knee else 0.0,
        knee_tpot_s=knee.tpot_s if knee else 0.0,
        provenance=provenance_of(profile),
        problems=tuple(f"{promise.mix.name}: {why}" for promise, why in supplied.infeasible.items()),
    )


def _usable(inputs: Inputs, supply: Mapping[str, GpuSupply], published: Publication) -> Usable:
    pool = published.pools[0]
    return Usable(
        requests_per_s=pool.usable_requests_per_s,
        input_tokens_per_s=pool.usable_input_tokens_per_s,
        output_tokens_per_s=pool.usable_output_tokens_per_s,
        supply_requests_per_s=sum(gpu.requests_per_s for gpu in supply.values()),
        spare_domains=inputs.pool.spare_domains,
        explanation=pool.explanation,
        problems=published.warnings,
    )


def _tier(tier: TierLimits, keys: int, worst: Share, mean: Share, absent: int | None) -> TierOutcome:
    """``absent`` stands for a limit that the tier does not have."""
    own = {limit.name: limit for limit in tier.limits if limit.per == "key"}
    return TierOutcome(
        tier=tier.tier,
        rpm=own["requests"].per_minute if "requests" in own else absent,
        itpm=own["input_tokens"].per_minute if "input_tokens" in own else absent,
        otpm=own["output_tokens"].per_minute if "output_tokens" in own else absent,
        concurrency=own["concurrency"].burst if "concurrency" in own else absent,
        keys=keys,
        throttled_share=worst.throttled,
        throttled_share_at_mean=mean.throttled,
        green_share=worst.green,
        borrowed_share=worst.borrowed,
        assured=tier.assured,
        ceilings={name: limit.ceiling_per_minute for name, limit in own.items() if limit.ceiling_per_minute},
        offered_requests_per_s=worst.offered_per_s,
        mean_requests_per_s=mean.offered_per_s,
        explanations={name: limit.explanation for name, limit in own.items()},
    )


def _check_lengths(inputs: Inputs) -> None:
    for each in inputs.demand.callers:
        longest = max(shape.input_tokens + shape.output_tokens for shape in each.mix.shapes)
        if longest > inputs.pool.max_model_len:
            raise DemandError(
                f"a request of {each.tier} has {longest:,} tokens, the model's context {inputs.pool.max_model_len:,}: "
                "are its lengths in tokens? Lower mix.scale, or leave such requests out"
            )


def _check_demand(inputs: Inputs, loads: Sequence[Load]) -> None:
    least, most = inputs.demand_within
    shares = [share for share in (load.work_share() for load in loads) if not isinf(share)]
    if not shares or (max(shares) >= least and min(shares) <= most):
        return
    share, word = (max(shares), "only ") if max(shares) < least else (min(shares), "")
    raise DemandError(
        f"the demand of {inputs.demand.requests_per_s:,.4g} requests/s is {word}{share:,.3g} times what the fleet "
        f"gives out: is it in requests a second, of all keys of a tier together? If it is meant, widen demand_within: "
        f"[{least:g}, {most:g}]"
    )
