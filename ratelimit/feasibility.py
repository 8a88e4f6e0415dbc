"""Whether the SLOs of a config can be met at all. Seconds of simulation, so not done at each reload."""

from __future__ import annotations

from ratelimit.config import Config, policy_of
from ratelimit.policy import Promise, promise_of
from serving.capacity import InfeasibleSloError
from serving.operating import operating_point
from serving.profile import load_profile


def feasibility_problems(config: Config) -> list[str]:
    """Each profile that serves its pool's or a tier's mix within the SLO at no load: where, why, and what would help.

    ``config`` is one that ``load_config`` has checked. Takes about a second for each profile and promise.
    """
    problems = []
    policy = policy_of(config)
    for i, (pool, rules) in enumerate(zip(config.pools, policy.pools, strict=True)):
        promises = {f"pools[{i}].slo": Promise(rules.mix, rules.slo)}
        for j, tier in enumerate(policy.tiers):
            promises |= {f"tiers[{j}].slo": promise_of(tier, rules)} if tier.mix or tier.slo else {}
        for where, promise in promises.items():
            problems += [
                f"{where}: {pool.model} on {why}; raise the bound, lower mix.scale, or use a faster profile"
                for name in pool.profiles()
                if (why := _infeasible(name, promise))
            ]
    return problems


def _infeasible(profile_name: str, promise: Promise) -> str | None:
    profile = load_profile(profile_name)
    try:
        operating_point(profile, promise.mix, promise.slo)
    except InfeasibleSloError as error:
        return f"{profile.name} can never meet it: {error}"
    return None
