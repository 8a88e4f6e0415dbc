"""What each replica supplies to its pool: the knee of its profile, computed once per profile, mix and SLO."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

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
    """Profiles by name, and knees by profile, mix and SLO.

    A knee takes seconds to find, so nobody waits for one: ``run`` finds those asked for, one at a time, and says so by
    ``on_found``. A knee belongs to the numbers of its profile, so it stays right when a profile changes. The book grows
    by one entry per combination in use.
    """

    def __init__(self, on_found: Callable[[], None]) -> None:
        self._on_found = on_found
        self._profiles: dict[str, Profile] = {}
        self._knees: dict[_KneeKey, Knee | None] = {}
        self._wanted: dict[_KneeKey, ReplicaSpec] = {}
        self._asked = asyncio.Event()

    def read(self, names: Iterable[str]) -> None:
        """Have exactly these profiles, as their files are now. Raises ``ProfileError``, and then nothing changes."""
        self._profiles = {name: load_profile(name) for name in names}

    def knows(self, spec: ReplicaSpec, pool: PoolPolicy) -> bool:
        """Whether the replica's knee is known, or that it has none; if not, it is asked for."""
        key = _key(self._profiles[spec.profile], pool)
        if key in self._knees:
            return True
        self._wanted.setdefault(key, spec)
        self._asked.set()
        return False

    def supplies(self, specs: Iterable[ReplicaSpec], pool: PoolPolicy) -> list[ReplicaSupply]:
        """The supply of each of these replicas, all of them known, for the pool's mix under its SLO.

        A replica whose profile cannot meet the SLO under any load supplies nothing and is left out: a limit of 0 would
        hide that the SLO is wrong.
        """
        found = [self._supply(spec, pool) for spec in specs]
        return [supply for supply in found if supply is not None]

    def _supply(self, spec: ReplicaSpec, pool: PoolPolicy) -> ReplicaSupply | None:
        profile = self._profiles[spec.profile]
        found = self._knees[_key(profile, pool)]
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

    async def run(self) -> None:
        """Find the knees asked for, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._wanted:
                key, spec = next(iter(self._wanted.items()))
                self._knees[key] = await _find_knee(key, spec)
                del self._wanted[key]
                self._on_found()


def _key(profile: Profile, pool: PoolPolicy) -> _KneeKey:
    return profile.step_time, profile.limits, pool.mix, pool.slo


async def _find_knee(key: _KneeKey, spec: ReplicaSpec) -> Knee | None:
    try:
        return await asyncio.to_thread(knee, *key)
    except InfeasibleSloError as error:
        log.error("replica %s (%s) supplies nothing: %s", spec.url, spec.profile, error)
        return None


def _short(profile: Profile) -> str:
    known = profile.provenance
    return f"{profile.name}, {known.kind} {known.date}"
