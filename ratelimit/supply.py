"""What each replica supplies to its pool: the knee of its profile, computed once per profile, mix and SLO."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import NamedTuple

import msgspec

from ratelimit.groupsupply import GroupSupply
from ratelimit.policy import Promise
from ratelimit.publication import PublishedReplica
from serving.capacity import EngineLimits, InfeasibleSloError, ReplicaGroup, Slo, StepTimeModel, WorkloadMix
from serving.fleet import ReplicaSpec
from serving.gpus import GPUS
from serving.operating import OperatingPoint, operating_point
from serving.profile import ContextRange, Profile, load_profile
from serving.stepsim import Knee
from serving.surface import Surface

log = logging.getLogger(__name__)


class _Infeasible(msgspec.Struct, frozen=True):
    """That no load meets a promise, and why."""

    why: str


class _Grouped(NamedTuple):
    """A group, and what it was found from."""

    specs: list[ReplicaSpec]
    promises: Sequence[Promise]
    profile: Profile
    supply: GroupSupply


#: Groups that are no longer in use are forgotten when there are this many more than twice those that are.
MOST_GROUPS_KEPT = 1000
#: Knees that no group uses are kept up to this many, those found last: a config may be taken back.
MOST_KNEES_KEPT = 1000

_Kind = tuple[str, str, str, float]
_KneeKey = tuple[StepTimeModel, EngineLimits, Surface | None, ContextRange | None, WorkloadMix, Slo]


class Knees(dict[_KneeKey, "OperatingPoint | _Infeasible"]):
    """Knees by the numbers that they were found from, so that none is ever out of date: books may share them."""


class SupplyBook:
    """Profiles by name, and knees by profile, mix and SLO.

    A knee takes seconds to find, so nobody waits for one: ``run`` finds those asked for, one at a time, and says so by
    ``on_found``. A knee belongs to the numbers of its profile, so it stays right when a profile changes. The book grows
    by one entry per combination in use; of those out of use it forgets all but some when it reads profiles anew.
    """

    def __init__(self, on_found: Callable[[], None], knees: Knees | None = None) -> None:
        self._on_found = on_found
        self._profiles: dict[str, Profile] = {}
        self._knees = Knees() if knees is None else knees
        self._wanted: dict[_KneeKey, tuple[ReplicaSpec, Profile, Promise]] = {}
        self._asked = asyncio.Event()
        self._groups: dict[_Kind, _Grouped] = {}
        self._alike: dict[str, tuple[list[ReplicaSpec], dict[_Kind, list[ReplicaSpec]]]] = {}

    def read(self, names: Iterable[str]) -> None:
        """Have exactly these profiles, as their files are now. Raises ``ProfileError``, and then nothing changes."""
        self._profiles = {name: load_profile(name) for name in names}
        used = {_key(each.profile, promise) for each in self._groups.values() for promise in each.promises}
        unused = [key for key in self._knees if key not in used]
        for key in unused[: max(0, len(unused) - MOST_KNEES_KEPT)]:
            del self._knees[key]

    def having(self, profiles: Mapping[str, Profile]) -> SupplyBook:
        """A book with these profiles, which shares its knees with this one."""
        other = copy(self)
        other._profiles = dict(profiles)  # noqa: SLF001 - it is one of these too
        return other

    def knows(self, spec: ReplicaSpec, promises: Iterable[Promise]) -> bool:
        """Whether the replica's knees are known, or that it has none; those that are not are asked for."""
        profile = self._profiles[spec.profile]
        missing = {key: each for each in promises if (key := _key(profile, each)) not in self._knees}
        for key, promise in missing.items():
            self._wanted.setdefault(key, (spec, profile, promise))
        if missing:
            self._asked.set()
        return not missing

    def rate_of(self, spec: ReplicaSpec, promise: Promise) -> float | None:
        """Requests/s of one such replica; ``None`` where it cannot meet the promise, or its knee is to be found."""
        if spec.profile not in self._profiles or not self.knows(spec, [promise]):
            return None
        found = self._knees[_key(self._profiles[spec.profile], promise)]
        return found.knee.requests_per_s / spec.slowdown if isinstance(found, OperatingPoint) else None

    def unknown(self, specs: Iterable[ReplicaSpec], promises: Mapping[str, Sequence[Promise]]) -> set[tuple[str, str]]:
        """The profiles and models of these replicas whose knees are not all known, by the promises of their models."""
        kinds = {(spec.profile, spec.model): spec for spec in specs}
        return {kind for kind, spec in kinds.items() if not self.knows(spec, promises[spec.model])}

    def supplies(self, specs: Iterable[ReplicaSpec], promises: Sequence[Promise]) -> list[GroupSupply]:
        """The supply of these replicas, the knees of all of them known; the first promise is their pool's own.

        A replica whose profile cannot meet the pool's promise under any load takes no requests: it is told in its group
        that the SLO is wrong, where a limit of 0 would hide it.
        """
        alike = self._sorted(list(specs))
        if len(self._groups) > MOST_GROUPS_KEPT + 2 * len(alike):
            self._groups.clear()
        return [self._group_kept(kind, of_kind, promises) for kind, of_kind in alike.items()]

    def _sorted(self, specs: list[ReplicaSpec]) -> dict[_Kind, list[ReplicaSpec]]:
        """The replicas by what makes them alike; as they were sorted last, where they are the same."""
        if not specs:
            return {}
        model = specs[0].model
        known, alike = self._alike.get(model, ([], {}))
        if known == specs:
            return alike
        alike = {}
        for spec in specs:
            alike.setdefault((spec.model, spec.gpu, spec.profile, spec.slowdown), []).append(spec)
        if len(self._alike) >= MOST_GROUPS_KEPT:
            self._alike.clear()
        self._alike[model] = specs, alike
        return alike

    def _group_kept(self, kind: _Kind, specs: list[ReplicaSpec], promises: Sequence[Promise]) -> GroupSupply:
        """The group as it was found last, where it is the same: one replica that changes changes one group."""
        profile, kept = self._profiles[specs[0].profile], self._groups.get(kind)
        if kept is None or (kept.specs, kept.promises, kept.profile) != (specs, promises, profile):
            kept = self._groups[kind] = _Grouped(specs, promises, profile, self._group(specs, promises))
        return kept.supply

    def _group(self, specs: Sequence[ReplicaSpec], promises: Sequence[Promise]) -> GroupSupply:
        profile, slowdown = self._profiles[specs[0].profile], specs[0].slowdown
        found = {promise: self._knees[_key(profile, promise)] for promise in promises}
        knees = {promise: known.knee for promise, known in found.items() if isinstance(known, OperatingPoint)}
        own, point = knees.get(promises[0]), found[promises[0]]
        step_time = point.step_time if isinstance(point, OperatingPoint) else profile.step_time
        note = point.note if isinstance(point, OperatingPoint) else ""
        return GroupSupply(
            group=ReplicaGroup(
                len(specs), step_time.slowed(slowdown), profile.limits, promises[0].slo.slowed(slowdown)
            ),
            gpu=profile.gpu,
            gpus_per_replica=profile.gpus_per_replica,
            profile=profile.name,
            slowdown=slowdown,
            knees=knees,
            provenance=", ".join(filter(None, (_short(profile), note))),
            replicas=tuple(_published(spec, profile, own) for spec in specs),
            domain_replicas=domain_replicas(profile),
            domains=Counter(spec.domain for spec in specs if spec.domain is not None),
            infeasible={promise: known.why for promise, known in found.items() if isinstance(known, _Infeasible)},
        )

    async def run(self) -> None:
        """Find the knees asked for, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._wanted:
                key, wanted = next(iter(self._wanted.items()))
                await self._find(*wanted)
                del self._wanted[key]
                self._on_found()

    async def find(self, spec: ReplicaSpec, promise: Promise) -> None:
        """Have a replica's knee known when this returns."""
        await self._find(spec, self._profiles[spec.profile], promise)

    async def _find(self, spec: ReplicaSpec, profile: Profile, promise: Promise) -> None:
        key = _key(profile, promise)
        if key not in self._knees:
            self._knees[key] = await _find_knee(spec, profile, promise)


def domain_replicas(profile: Profile) -> int:
    """How many replicas of a profile fail together, where nothing labels their failure domains."""
    facts = GPUS.get(profile.gpu)
    return max(1, facts.failure_domain_gpus // profile.gpus_per_replica) if facts else 1


def _published(spec: ReplicaSpec, profile: Profile, own: Knee | None) -> PublishedReplica:
    return PublishedReplica(
        url=spec.url,
        gpu=spec.gpu,
        profile=profile.name,
        slowdown=spec.slowdown,
        requests_per_s=own.requests_per_s / spec.slowdown if own else 0.0,
        domain=spec.domain,
    )


def _key(profile: Profile, promise: Promise) -> _KneeKey:
    measured = None if profile.fit is None else profile.fit.context
    return profile.step_time, profile.limits, profile.surface, measured, promise.mix, promise.slo


async def _find_knee(spec: ReplicaSpec, profile: Profile, promise: Promise) -> OperatingPoint | _Infeasible:
    try:
        return await asyncio.to_thread(operating_point, profile, *promise)
    except InfeasibleSloError as error:
        log.error("replica %s (%s) supplies nothing: %s", spec.url, spec.profile, error)
        return _Infeasible(str(error))


def _short(profile: Profile) -> str:
    known = profile.provenance
    return f"{profile.name}, {known.kind} {known.date}"
