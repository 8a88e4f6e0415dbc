"""Whether the SLOs of a config can be met at all. Seconds of simulation, so not done at each reload."""

from __future__ import annotations

from ratelimit.config import Config, policy_of
from serving.capacity import InfeasibleSloError
from serving.profile import load_profile
from serving.stepsim import knee


def feasibility_problems(config: Config) -> list[str]:
    """Each profile that serves its pool's mix within the SLO at no load: where, why, and what would help.

    ``config`` is one that ``load_config`` has checked. Takes about a second for each profile.
    """
    problems = []
    for i, (pool, rules) in enumerate(zip(config.pools, policy_of(config).pools, strict=True)):
        for name in pool.profiles():
            profile = load_profile(name)
            try:
                knee(profile.step_time, profile.limits, rules.mix, rules.slo)
            except InfeasibleSloError as error:
                problems.append(
                    f"pools[{i}].slo: {pool.model} on {profile.name} can never meet it: {error}; "
                    f"raise the bound, lower mix.scale, or use a faster profile"
                )
    return problems
