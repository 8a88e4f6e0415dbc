"""On what terms a caller is served: the publication as a request needs it. Pure."""

from __future__ import annotations

from itertools import islice

import msgspec

from ratelimit.gateway.headers import policy_header
from ratelimit.limitrules import limits_for
from ratelimit.policy import Holds
from ratelimit.publication import Limit, Publication, PublishedPool, PublishedReplica, TierLimits
from serving.capacity import ReplicaGroup, merged_groups
from serving.routing import Alike


class Terms(msgspec.Struct, frozen=True, eq=False):
    """On what terms a caller is served by a pool; ``groups`` are the pool's, identical ones counted together.

    ``fleet`` are its replicas by their kind, all together where a publication does not tell it.
    ``limits`` are those of its tier, then those of the operator's rules that name it. ``active_keys`` share what the
    tier is assured. ``derived`` are the tier's limits before any rule cuts them: they grow with the fleet. The other
    fields are ``publication.TierLimits``'s. Two are the same only if they are one object.
    """

    epoch: int
    enforce: bool
    pool: PublishedPool
    groups: tuple[ReplicaGroup, ...]
    fleet: tuple[Alike[PublishedReplica], ...]
    limits: tuple[Limit, ...]
    policy_header: tuple[bytes, bytes]
    org: str
    tier: str
    active_keys: int
    priority: int
    borrow_up_to: int
    assured: bool
    holds: Holds
    shadow: bool
    derived: tuple[Limit, ...] = ()


class TermsBook:
    """The terms of every caller under one publication. Callers that no rule tells apart share theirs."""

    def __init__(self, publication: Publication) -> None:
        self._publication = publication
        self._pools = {pool.model: (pool, merged_groups(pool.groups), fleet_of(pool)) for pool in publication.pools}
        self._tiers = {(tier.tier, tier.model): tier for tier in publication.tiers if tier.model in self._pools}
        self._named_keys = {key for rule in publication.rules for key in rule.keys or ()} | {*publication.shadow_keys}
        self._orgs = {org.name for org in publication.orgs}
        self._found: dict[tuple[str, str, str, str], Terms] = {}

    def find(self, key_id: str, org: str, tier: str, model: str) -> Terms | None:
        """The caller's terms; None where its tier has none for this model."""
        published = self._tiers.get((tier, model))
        if published is None:
            return None
        # Both are names that were published, so what is kept is bounded by the publication.
        caller = (key_id if key_id in self._named_keys else "", org if org in self._orgs else "", tier, model)
        terms = self._found.get(caller)
        if terms is None:
            terms = self._found[caller] = self._terms(published, *caller)
        return terms

    def each_tier(self) -> dict[tuple[str, str], Terms]:
        """The terms of each (tier, model), for callers whom no rule names by org or key."""
        return {
            (tier, model): self._terms(published, "", "", tier, model)
            for (tier, model), published in self._tiers.items()
        }

    def models(self, tier: str) -> list[str]:
        """The models that a tier has limits for."""
        return sorted(model for known, model in self._tiers if known == tier)

    def _terms(self, published: TierLimits, key_id: str, org: str, tier: str, model: str) -> Terms:
        publication = self._publication
        pool, groups, fleet = self._pools[model]
        limits = limits_for(published.limits, publication.rules, key_id, org, tier, model)
        return Terms(
            epoch=publication.epoch,
            enforce=publication.enforce,
            pool=pool,
            groups=groups,
            fleet=fleet,
            limits=limits,
            policy_header=policy_header(limits),
            org=org,
            tier=tier,
            active_keys=published.active_keys,
            priority=published.priority,
            borrow_up_to=published.borrow_up_to,
            assured=published.assured,
            holds=published.holds,
            shadow=published.shadow or key_id in publication.shadow_keys,
            derived=published.limits,
        )


def terms_by_tier(publication: Publication) -> dict[tuple[str, str], Terms]:
    """The terms of each (tier, model); a model that lost all its replicas is known, with no groups and no limits."""
    return TermsBook(publication).each_tier()


def fleet_of(pool: PublishedPool) -> tuple[Alike[PublishedReplica], ...]:
    """A pool's replicas that can serve, by their kind; all as one where it is not told of which kind they are."""
    able = [replica for replica in pool.replicas if replica.requests_per_s > 0]
    told = all(0 <= index < len(pool.groups) and count > 0 for index, count in pool.runs)
    if not told or sum(count for _, count in pool.runs) != len(pool.replicas):
        return (Alike(pool.model, None, able),)
    kinds = [msgspec.structs.replace(group, count=1) for group in pool.groups]
    found: dict[ReplicaGroup, list[PublishedReplica]] = {}
    named = iter(pool.replicas)
    for index, count in pool.runs:
        those = (replica for replica in islice(named, count) if replica.requests_per_s > 0)
        found.setdefault(kinds[index], []).extend(those)
    return tuple(Alike(pool.model, kind, those) for kind, those in found.items() if those)
