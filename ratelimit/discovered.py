"""Discovered replicas as part of the fleet. Pure.

What a config says of discovery is decided by people; which replicas are found is observed. Until Kubernetes has been
asked, those that the limits in force were derived from are taken to be there still: each is probed like any other, so a
controller that starts while the API server is away goes on with the fleet that it finds alive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from ratelimit.publication import Publication
from serving.endpointslices import EndpointSlice, FoundReplica, KnownProfile, Listing, Refusal, Rules, found_in
from serving.fleet import ReplicaSpec
from serving.health import stuck_time_s
from serving.profile import Profile


class PoolDiscovery(msgspec.Struct, frozen=True):
    """How the replicas of one pool are found; ``profiles`` has the config's references by the name in a label."""

    model: str
    namespace: str | None
    selector: str
    port: str | None
    profiles: dict[str, str]
    slowdown: float
    stuck_after_s: float

    @property
    def listing(self) -> Listing:
        """The slices to follow."""
        return Listing(self.namespace, self.selector)


class Discovered(msgspec.Struct, frozen=True):
    """The replicas found, and what was refused."""

    specs: tuple[ReplicaSpec, ...] = ()
    refused: tuple[Refusal, ...] = ()


def discovered(
    discoveries: Iterable[PoolDiscovery],
    profiles: Mapping[str, Profile],
    listed: Mapping[Listing, Mapping[str, EndpointSlice]],
    before: Mapping[Listing, Publication | None],
    configured: Collection[str],
) -> Discovered:
    """The replicas of these pools, by the slices listed; of a listing that was not listed yet, those ``before``.

    A URL that is ``configured`` is no discovery, and one that two pools find is the first one's.
    """
    specs: dict[str, ReplicaSpec] = {}
    refused: list[Refusal] = []
    for pool in discoveries:
        known = {name: KnownProfile(each, profiles[each].gpu) for name, each in pool.profiles.items()}
        if pool.listing in listed:
            found = found_in(listed[pool.listing].values(), Rules(pool.port, known))
            replicas: Sequence[FoundReplica] = found.replicas
            refused += found.refused
        else:
            replicas = _published_before(pool, known, before.get(pool.listing))
        for replica in replicas:
            spec = _spec(pool, replica, profiles[replica.profile.reference])
            if spec.url in configured:
                continue
            if specs.setdefault(spec.url, spec).model != pool.model:
                why = f"is a replica of {specs[spec.url].model} too; a server has one model, mend the selectors"
                refused.append(Refusal(f"{spec.url} of {pool.model}", why))
    return Discovered(tuple(specs.values()), tuple(refused))


def _published_before(
    pool: PoolDiscovery, known: Mapping[str, KnownProfile], published: Publication | None
) -> list[FoundReplica]:
    """Those that these rules could have found, on the nodes that they were on."""
    return [
        FoundReplica(replica.url, known[replica.profile], replica.domain)
        for each in (published.pools if published else ())
        if each.model == pool.model
        for replica in each.replicas
        if replica.profile in known and replica.slowdown == pool.slowdown
    ]


def _spec(pool: PoolDiscovery, replica: FoundReplica, profile: Profile) -> ReplicaSpec:
    return ReplicaSpec(
        url=replica.url,
        model=pool.model,
        gpu=profile.gpu,
        profile=replica.profile.reference,
        slowdown=pool.slowdown,
        stuck_after_s=stuck_time_s(pool.stuck_after_s, profile.step_time.slowed(pool.slowdown), profile.limits),
        domain=replica.domain,
    )
