"""On what terms a key is served: the publication as a request needs it. Pure."""

from __future__ import annotations

import msgspec

from ratelimit.gateway.headers import policy_header
from ratelimit.publication import Limit, Publication, PublishedPool
from serving.capacity import ReplicaGroup, merged_groups


class Terms(msgspec.Struct, frozen=True):
    """On what terms a key is served by a pool; ``groups`` are the pool's, identical ones counted together."""

    epoch: int
    enforce: bool
    pool: PublishedPool
    groups: tuple[ReplicaGroup, ...]
    limits: tuple[Limit, ...]
    policy_header: tuple[bytes, bytes]


def terms_by_tier(publication: Publication) -> dict[tuple[str, str], Terms]:
    """The terms of each (tier, model); a model that lost all its replicas is known, with no groups and no limits."""
    pools = {pool.model: (pool, merged_groups(pool.groups)) for pool in publication.pools}
    return {
        (tier.tier, tier.model): Terms(
            publication.epoch, publication.enforce, *pools[tier.model], tier.limits, policy_header(tier.limits)
        )
        for tier in publication.tiers
        if tier.model in pools
    }
