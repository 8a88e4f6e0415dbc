"""What people decide of the limits, apart from what is observed: a config, overrides, the keys that they issue. Pure.

How many of the keys are in use is observed, as the fleet is, and takes effect at once: shares must not add up to more
than the tier's. But where that number may have grown because keys were issued, the counts stay until that is decided.
``changes`` takes the way from one state of it to another apart into the changes that ``approval`` weighs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ratelimit.approval import Change, digest_of
from ratelimit.difference import bound_changed
from ratelimit.discovered import PoolDiscovery
from ratelimit.keylimits import added_up, countable
from ratelimit.keys import KeyRecord, active_keys, valid_records
from ratelimit.overrides import Override, active
from ratelimit.policy import Policy
from ratelimit.publication import Publication, TierLimits
from serving.fleet import ReplicaSpec
from serving.profile import Profile

_WHY_TOGETHER = ", because more of its keys wait for approval and the tier must not be assured more than its share"


class Adopted(msgspec.Struct, frozen=True):
    """A config as limits are derived from it: its rules, its replicas, and their profiles by name as they were then.

    ``raise_after_s`` is by model. ``falls_above`` is the share that a limit may lose without approval; None: all. What
    ``discover`` finds is no part of it: replicas that come and go in Kubernetes are the fleet, and wait for nobody.
    """

    policy: Policy
    specs: tuple[ReplicaSpec, ...]
    profiles: dict[str, Profile]
    raise_after_s: dict[str, float]
    falls_above: float | None
    discover: tuple[PoolDiscovery, ...] = ()


class Decided(msgspec.Struct, frozen=True):
    """What is decided at one moment: how many keys were issued, by tier; the counts in use, by tier and model."""

    adopted: Adopted
    overrides: tuple[Override, ...]
    issued: Mapping[str, int]
    active_keys: Mapping[tuple[str, str], int]


class KeptConfig(msgspec.Struct, frozen=True):
    """The config of ``Decided`` as it is kept on disk, for the controller after this one. It grows with the fleet."""

    adopted: Adopted


class KeptKeys(msgspec.Struct, frozen=True):
    """The rest of ``Decided`` as it is kept on disk: small, for it changes whenever a key comes into use."""

    overrides: tuple[Override, ...]
    issued: dict[str, int]
    active_keys: tuple[tuple[str, str, int], ...]


def kept_keys(decided: Decided) -> KeptKeys:
    """What is kept of it beside its config."""
    counts = tuple((tier, model, count) for (tier, model), count in sorted(decided.active_keys.items()))
    return KeptKeys(decided.overrides, dict(decided.issued), counts)


def resumed(adopted: Adopted, keys: KeptKeys) -> Decided:
    """What was kept, as it was."""
    counts = {(tier, model): count for tier, model, count in keys.active_keys}
    return Decided(adopted, keys.overrides, keys.issued, counts)


def issued_keys(records: Iterable[KeyRecord], policies: Sequence[Policy], now_s: float) -> dict[str, int]:
    """By tier, the keys that may be used at ``now_s`` of the orgs and tiers that any of the policies knows."""
    orgs, tiers = (
        {org.name for each in policies for org in each.orgs},
        {t.name for each in policies for t in each.tiers},
    )
    return active_keys(valid_records(records, orgs, tiers), now_s)


def standing(before: Decided, wanted: Decided, now_s: float) -> Decided:
    """What was decided ``before``, with what is observed in ``wanted``.

    An override that ends at its time was decided when it was set. The first keys of a tier take nothing from anybody.
    """
    grown = {tier for tier, count in wanted.issued.items() if 0 < before.issued.get(tier, 0) < count}
    counts = {
        (tier, model): min(count, before.active_keys.get((tier, model), 0)) if tier in grown else count
        for (tier, model), count in wanted.active_keys.items()
    }
    issued = {tier: before.issued[tier] if tier in grown else count for tier, count in wanted.issued.items()}
    return Decided(before.adopted, active(before.overrides, now_s), issued, counts)


def without_overrides(decided: Decided) -> Decided:
    """What this comes to by itself: each override ends at its time."""
    return msgspec.structs.replace(decided, overrides=())


def changes(now: Decided, wanted: Decided) -> list[Change[Decided]]:
    """What turns ``now`` into ``wanted``, one after the other: overrides, the keys of each tier, and the config whole.

    Overrides come first, for they are an operator's quickest means.
    """
    found = []
    if wanted.overrides != now.overrides:
        found.append(_overrides_change(now.overrides, wanted.overrides))
    for tier, after in sorted(wanted.issued.items()):
        if now.issued.get(tier, 0) != after:
            found.append(_keys_change(tier, now.issued.get(tier, 0), wanted))
    if wanted.adopted != now.adopted:
        found.append(_config_change(now.adopted, wanted.adopted))
    return found


def _overrides_change(before: tuple[Override, ...], after: tuple[Override, ...]) -> Change[Decided]:
    named = [f"{o.id} ({o.reason})" for o in after if o not in before]
    named += [f"the end of {o.id}" for o in before if o not in after]
    return Change(
        f"overrides changed: {', '.join(named)}",
        digest_of("overrides", before, after),
        lambda decided: msgspec.structs.replace(decided, overrides=after),
    )


def _keys_change(tier: str, before: int, wanted: Decided) -> Change[Decided]:
    after = wanted.issued[tier]

    def applied(decided: Decided) -> Decided:
        counts = {pair: count for pair, count in wanted.active_keys.items() if pair[0] == tier}
        issued, active_now = {**decided.issued, tier: after}, {**decided.active_keys, **counts}
        return msgspec.structs.replace(decided, issued=issued, active_keys=active_now)

    return Change(f"keys issued to {tier} from {before} to {after}", digest_of("keys", [tier, before], after), applied)


def _config_change(before: Adopted, after: Adopted) -> Change[Decided]:
    return Change(
        "the config or a profile changed",
        digest_of("config", before, after),
        lambda decided: msgspec.structs.replace(decided, adopted=after),
        bound_changed(before.falls_above, after.falls_above),
    )


def held_together(
    publication: Publication, counts: Mapping[tuple[str, str], int], overrides: tuple[Override, ...]
) -> Publication:
    """The publication, with a bound on all keys of each assured tier that has more in use than its limits count.

    ``counts`` are those in use by tier and model. While new keys wait, each key keeps its limits; what the tier is
    assured as a whole must not grow by that, for then the pool would be oversold, at the cost of every other tier. A
    limit that an operator has set bounds nothing else.
    """

    def more(tier: TierLimits) -> bool:
        return counts.get((tier.tier, tier.model), 0) > tier.active_keys

    tiers = tuple(_bounded(each, overrides) if each.assured and more(each) else each for each in publication.tiers)
    return msgspec.structs.replace(publication, tiers=tiers)


def _bounded(tier: TierLimits, overrides: tuple[Override, ...]) -> TierLimits:
    bounded = {limit.name for limit in tier.limits if limit.per == "tier" and limit.window == "minute"}
    added = [
        countable(added_up(tier.tier, tier.active_keys, limit, _WHY_TOGETHER))
        for limit in tier.limits
        if limit.per == "key" and limit.per_minute and limit.name not in bounded
        if not any(each.tier == tier.tier and each.sets(tier.model, limit.name) is not None for each in overrides)
    ]
    return msgspec.structs.replace(tier, limits=(*tier.limits, *added))
