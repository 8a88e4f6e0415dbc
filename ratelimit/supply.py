"""What each replica supplies to its pool: the knee of its profile, computed once per profile, mix and SLO."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from ratelimit.derive import ReplicaSupply
from ratelimit.policy import PoolPolicy
from ratelimit.publication import PublishedReplica
from serving.capacity import EngineLimits, InfeasibleSloError, ReplicaGroup, Slo, StepTimeModel, WorkloadMix
from serving.fleet import ReplicaSpec
from serving.profile import Profile, load_profile
from serving.stepsim import Knee, knee

log = logging.getLogger(__name__)

_KneeKey = tuple[StepTimeModel, EngineLimits, WorkloadMix, Slo]


class SupplyBook:
    """Knees by profile, mix and SLO. A knee takes seconds to find; it grows by one entry per combination in use."""

    def __init__(self) -> None:
        self._profiles: dict[str, Profile] = {}
        self._knees: dict[_KneeKey, Knee | None] = {}

    async def supplies(self, specs: Iterable[ReplicaSpec], pool: PoolPolicy) -> list[ReplicaSupply]:
        """The supply of each of these replicas for the pool's mix under its SLO.

        A replica whose profile cannot meet the SLO under any load supplies nothing, and is left out with an error in
        the log: a limit of 0 would hide that the SLO is wrong.
        """
        found = [(spec, await self._supply(spec, pool)) for spec in specs]
        return [supply for _, supply in found if supply is not None]

    async def _supply(self, spec: ReplicaSpec, pool: PoolPolicy) -> ReplicaSupply | None:
        profile = self._profiles.setdefault(spec.profile, load_profile(spec.profile))
        key = (profile.step_time, profile.limits, pool.mix, pool.slo)
        if key not in self._knees:
            self._knees[key] = await self._find_knee(key, spec)
        found = self._knees[key]
        if found is None:
            return None
        return ReplicaSupply(
            replica=PublishedReplica(
                url=spec.url,
                gpu=spec.gpu,
                profile=profile.name,
                slowdown=spec.slowdown,
                requests_per_s=found.requests_per_s / spec.slowdown,
            ),
            group=ReplicaGroup(
                1, profile.step_time.slowed(spec.slowdown), profile.limits, pool.slo.slowed(spec.slowdown)
            ),
            knee=found,
            provenance=_short(profile),
        )

    async def _find_knee(self, key: _KneeKey, spec: ReplicaSpec) -> Knee | None:
        try:
            return await asyncio.to_thread(knee, *key)
        except InfeasibleSloError as error:
            log.error("replica %s (%s) supplies nothing: %s", spec.url, spec.profile, error)
            return None


def _short(profile: Profile) -> str:
    known = profile.provenance
    return f"{profile.name}, {known.kind} {known.date}"
