"""Every assumption of a plan in words, so that whoever reads its figures can doubt them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ratelimit.config import MixConfig, SloConfig, TierConfig
from ratelimit.planning.demand import Demand
from ratelimit.planning.document import PlanConfig
from ratelimit.planning.plan import provenance_of
from ratelimit.planning.running import Power
from ratelimit.planning.sites import Site
from serving.profile import Profile

#: Fields of a tier that are always told; the others where they are not the default.
_ALWAYS_TOLD = ("share", "ceiling", "priority", "burst_s")


def stated(
    plan: PlanConfig, profiles: Mapping[str, Profile], sites: Sequence[Site], power: Power, demand: Iterable[str]
) -> Iterator[str]:
    """Every assumption, the plan's own first. ``demand``: what is said of it, by ``declared`` or ``recorded``."""
    yield from plan.assumptions
    yield from _tiers(plan)
    yield from demand
    least, most = plan.demand_within
    yield f"a demand of less than {least:g} or more than {most:g} times what the fleet gives out is refused"
    for site in sites:
        gpus = ", ".join(f"{count:,} {gpu}" for gpu, count in site.gpus.items() if count)
        limit = "" if site.power_limit_w is None else f", on at most {site.power_limit_w / 1e6:g} MW"
        yield f"GPU mix: {site.name} has {gpus or 'none'}{limit} (input of the plan)"
    for gpu, profile in profiles.items():
        note = provenance_of(profile)
        yield f"supply of {gpu}: {note.text} ({note.engine}): {note.source}"
    yield "supply of a GPU type: the simulated knee of one replica × replicas; routing loses nothing between them"
    draws = ", ".join(f"{gpu} {watts:g} W" for gpu, watts in power.gpu_w.items())
    yield (
        f"power: {draws} each at most (data sheets, or the plan), × {power.server_factor:g} for the rest of the "
        f"server, × {power.pue:g} for cooling and losses; every GPU at its most"
    )
    priced = {gpu: price for gpu, price in plan.prices_per_gpu_hour.items() if gpu in profiles}
    if priced:
        prices = ", ".join(f"{gpu} {price:g}" for gpu, price in priced.items())
        yield f"prices in {plan.currency} per GPU and hour: {prices} (input of the plan)"
    yield (
        f"Redis: {plan.redis.admits_per_s:,.0f} admits/s on one primary (docs/bench.md, measured), loaded to "
        f"{plan.redis.utilization:.0%}; a settle or an extend counted as an admit; requests as long as the SLO allows"
    )
    yield (
        "throttled: share of the work asked for, by a fluid model of the limiter (no chance "
        "within a minute, mean sizes, whoever is refused does not ask again)"
    )


def declared(plan: PlanConfig, times: float) -> Iterator[str]:
    """What the plan says its callers ask for."""
    for callers in plan.demand:
        mix = callers.mix or plan.tier(callers.tier).mix or plan.mix
        yield (
            f"demand of {callers.tier}: {callers.keys:,} keys ask for {callers.requests_per_s:,g} requests/s of "
            f"{_mix(mix)} together in the mean, {callers.peak_factor:g} times that at the worst, × {times:g} "
            "(input of the plan)"
        )


def traced(plan: PlanConfig, trace: str, times: float) -> Iterator[str]:
    """What of the declared demand a trace leaves as it is."""
    for callers in plan.demand:
        yield (
            f"demand of {callers.tier}: {callers.keys:,} keys ask for {callers.requests_per_s:,g} requests/s together "
            f"in the mean, × {times:g} (input of the plan); course over time and lengths are those of {trace}"
        )


def recorded(demand: Demand, times: float) -> Iterator[str]:
    """What was recorded in place of the declared demand."""
    for tier, keys in demand.keys().items():
        rate = sum(callers.requests_per_s for callers in demand.callers if callers.tier == tier)
        yield f"demand of {tier}: {keys:,} keys ask for {rate:,.4g} requests/s in the mean, {demand.source} × {times:g}"


def _tiers(plan: PlanConfig) -> Iterator[str]:
    spare = f"{plan.spare_domains:,} failure domain(s) kept spare"
    yield f"promise: {_slo(plan.slo)} for {_mix(plan.mix)}; {spare} (input of the plan)"
    if plan.extrapolate:
        yield "contexts that a profile was not measured at are planned all the same (input of the plan)"
    for tier in plan.tiers:
        yield f"tier {tier.name}: {', '.join(_told(tier))} (input of the plan)"


def _told(tier: TierConfig) -> Iterator[str]:
    for name in _ALWAYS_TOLD:
        yield f"{name} {getattr(tier, name):g}"
    others = tier.model_dump(exclude={"name", "mix", "slo", *_ALWAYS_TOLD}, exclude_defaults=True, exclude_none=True)
    for name, value in others.items():
        yield f"{name} {_plain(value)}"
    if tier.mix:
        yield _mix(tier.mix)
    if tier.slo:
        yield _slo(tier.slo)


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return " and ".join(f"{name} {amount:,}" for name, amount in value.items())
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _mix(mix: MixConfig) -> str:
    scale = "" if mix.scale == 1 else f" × {mix.scale:g}"
    return f"mix {mix.name}{scale}{f', {mix.cached_share:.0%} of each prompt cached' if mix.cached_share else ''}"


def _slo(slo: SloConfig) -> str:
    return f"p{slo.percentile:g} TTFT ≤ {slo.ttft_ms:g} ms and TPOT ≤ {slo.tpot_ms:g} ms"
