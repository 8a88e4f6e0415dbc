"""From the file of a plan to its inputs: profiles, policy, demand from records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from ratelimit.config import ConfigError
from ratelimit.planning.demand import CallerDemand, Demand, DemandError, replayed, shaped
from ratelimit.planning.document import PlanConfig, gpu_power_w, profile_for
from ratelimit.planning.plan import Inputs
from ratelimit.planning.records import is_trace, read_records, read_trace
from ratelimit.planning.running import Power, Prices, Redis, power_problem
from ratelimit.planning.sites import Change, Site, fleets, totals
from ratelimit.planning.stated import declared, recorded, stated, traced
from ratelimit.policy import Policy, PoolPolicy
from serving.capacity import WorkloadMix
from serving.operating import extrapolation_note
from serving.profile import Profile

#: Lengths of a trace that its mix is made of, taken at equal distances in time.
_TRACE_SHAPES = 1000


def inputs_of(plan: PlanConfig, changes: Sequence[Change], replay: Path | None, times: float) -> Inputs:
    """The inputs of a checked plan: with these changes of its fleet, and its demand (or what was recorded) ``times``.

    Raises ``ConfigError``, ``FleetError`` and ``DemandError``.
    """
    planned = fleets([site.site() for site in plan.sites], changes)
    gpus = [gpu for gpu, count in totals([*(planned.before or ()), *planned.after]).items() if count]
    if not gpus:
        raise ConfigError(["the fleet has no GPUs; give at least one site some"])
    profiles = {gpu: profile_for(plan, gpu) for gpu in gpus}
    _check_contexts(plan, profiles.values())
    gpu_w = {gpu: gpu_power_w(plan, gpu) for gpu in totals([*(planned.before or ()), *planned.after])}
    power = Power(gpu_w, plan.power.server_factor, plan.power.pue)
    _check_power([*(planned.before or ()), *planned.after], power)
    policy = _policy(plan, profiles.values())
    replay = replay or plan.replay
    demand = _demand(plan, replay).times(times)
    return Inputs(
        name=plan.name,
        title=plan.title,
        policy=policy,
        fleets=planned,
        profiles=profiles,
        demand=demand,
        power=power,
        prices=Prices(plan.prices_per_gpu_hour, plan.currency),
        redis=Redis(plan.redis.admits_per_s, plan.redis.utilization),
        demand_within=plan.demand_within,
        stated=tuple(stated(plan, profiles, planned.after, power, _demand_stated(plan, replay, demand, times))),
    )


def _check_contexts(plan: PlanConfig, profiles: Iterable[Profile]) -> None:
    mixes = [plan.mix, *(tier.mix for tier in plan.tiers if tier.mix)]
    notes = [f"{p.name}: {note}" for p in profiles for mix in mixes if (note := extrapolation_note(p, mix.shapes()))]
    if notes and not plan.extrapolate:
        raise ConfigError([f"{note}; to plan with it all the same, marked, write extrapolate: true" for note in notes])


def _check_power(sites: Iterable[Site], power: Power) -> None:
    problems = [problem for site in sites if (problem := power_problem(site, power))]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _policy(plan: PlanConfig, profiles: Iterable[Profile]) -> Policy:
    profiles = list(profiles)
    pool = PoolPolicy(
        model=plan.model,
        slo=plan.slo.slo(),
        mix=plan.mix.shapes(),
        default_max_output=None,
        spare_domains=plan.spare_domains,
        max_model_len=min(profile.limits.max_model_len for profile in profiles),
        tokens_per_byte=max(profile.tokens_per_byte for profile in profiles),
    )
    return Policy(tuple(tier.policy() for tier in plan.tiers), (pool,), enforce=True)


def _demand(plan: PlanConfig, replay: Path | None) -> Demand:
    if replay is None:
        return Demand(tuple(_declared(plan)), "declared in the plan, at everybody's peak at once, for good")
    if is_trace(replay):
        return _traced(plan, replay)
    demand = replayed(read_records(replay, plan.model), f"replayed from {replay.name}")
    tiers = [tier.name for tier in plan.tiers]
    unknown = sorted(set(demand.keys()) - set(tiers))
    if unknown:
        raise DemandError(
            f"{replay} has requests of {', '.join(unknown)}, the plan's tiers are {', '.join(tiers)}; "
            "name the plan's tiers as the records do"
        )
    return demand


def _demand_stated(plan: PlanConfig, replay: Path | None, demand: Demand, times: float) -> Iterator[str]:
    if replay is None:
        return declared(plan, times)
    return traced(plan, replay.name, times) if is_trace(replay) else recorded(demand, times)


def _declared(plan: PlanConfig) -> Iterator[CallerDemand]:
    for callers in plan.demand:
        mix = callers.mix or plan.tier(callers.tier).mix or plan.mix
        yield CallerDemand(callers.tier, callers.keys, callers.requests_per_s, mix.shapes(), callers.peak_factor)


def _traced(plan: PlanConfig, path: Path) -> Demand:
    """The callers declared, at their mean rates, with the course over time and the lengths of a trace."""
    trace = read_trace(path)
    shapes = trace.shapes[:: max(1, len(trace.shapes) // _TRACE_SHAPES)]
    mix = WorkloadMix(path.name, shapes)
    callers = [msgspec.structs.replace(each, mix=mix) for each in _declared(plan)]
    return shaped(callers, trace.times_s, f"declared mean rates, course over time and lengths of {path.name}")
