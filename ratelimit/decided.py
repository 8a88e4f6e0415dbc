"""What people decide of the limits, apart from what the fleet does: a config, overrides, how many keys there are. Pure.

``changes`` takes the way from one state of it to another apart into the changes that ``approval`` weighs.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ratelimit.approval import Change, digest_of
from ratelimit.overrides import Override
from ratelimit.policy import Policy
from ratelimit.publication import Limit, Publication, TierLimits
from serving.fleet import ReplicaSpec
from serving.profile import Profile


class Adopted(msgspec.Struct, frozen=True):
    """A config as limits are derived from it: its rules, its replicas, and their profiles by name as they were then.

    ``raise_after_s`` is by model. ``falls_above`` is the share that a limit may lose without approval; None: all.
    """

    policy: Policy
    specs: tuple[ReplicaSpec, ...]
    profiles: dict[str, Profile]
    raise_after_s: dict[str, float]
    falls_above: float | None


class Decided(msgspec.Struct, frozen=True):
    """What is decided at one moment; ``active_keys`` are counts by tier and model."""

    adopted: Adopted
    overrides: tuple[Override, ...]
    active_keys: Mapping[tuple[str, str], int]


class KeptDecided(msgspec.Struct, frozen=True):
    """``Decided`` as it is kept on disk, for the controller after this one."""

    adopted: Adopted
    overrides: tuple[Override, ...]
    active_keys: tuple[tuple[str, str, int], ...]


def kept(decided: Decided) -> KeptDecided:
    """What is kept of it."""
    counts = tuple((tier, model, count) for (tier, model), count in sorted(decided.active_keys.items()))
    return KeptDecided(decided.adopted, decided.overrides, counts)


def resumed(found: KeptDecided) -> Decided:
    """What was kept, as it was."""
    return Decided(found.adopted, found.overrides, {(tier, model): count for tier, model, count in found.active_keys})


def changes(now: Decided, wanted: Decided) -> list[Change[Decided]]:
    """What turns ``now`` into ``wanted``, one after the other: overrides, each count of keys, and the config whole.

    Overrides come first, for they are an operator's quickest means.
    """
    found = []
    if wanted.overrides != now.overrides:
        found.append(_overrides_change(now.overrides, wanted.overrides))
    for counted in sorted(now.active_keys.keys() | wanted.active_keys.keys()):
        before, after = now.active_keys.get(counted, 0), wanted.active_keys.get(counted, 0)
        if before != after:
            found.append(_keys_change(counted, before, after))
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


def _keys_change(counted: tuple[str, str], before: int, after: int) -> Change[Decided]:
    def applied(decided: Decided) -> Decided:
        return msgspec.structs.replace(decided, active_keys={**decided.active_keys, counted: after})

    tier, model = counted
    return Change(
        f"active keys of {tier} on {model} from {before} to {after}",
        digest_of("keys", [tier, model, before], after),
        applied,
    )


def _config_change(before: Adopted, after: Adopted) -> Change[Decided]:
    return Change(
        "the config or a profile changed",
        digest_of("config", before, after),
        lambda decided: msgspec.structs.replace(decided, adopted=after),
    )


def held_together(
    publication: Publication, active_keys: Mapping[tuple[str, str], int], overrides: tuple[Override, ...]
) -> Publication:
    """The publication, with a bound on all keys of each assured tier that has more of them than its limits count.

    While the new count waits, each key keeps its limits; what the tier is assured as a whole must not grow by that, for
    then the pool would be oversold, at the cost of every other tier. A limit that an operator has set bounds nothing
    else.
    """

    def more(tier: TierLimits) -> bool:
        return active_keys.get((tier.tier, tier.model), 0) > tier.active_keys

    tiers = tuple(_bounded(each, overrides) if each.assured and more(each) else each for each in publication.tiers)
    return msgspec.structs.replace(publication, tiers=tiers)


def _bounded(tier: TierLimits, overrides: tuple[Override, ...]) -> TierLimits:
    bounded = {limit.name for limit in tier.limits if limit.per == "tier" and limit.window == "minute"}
    added = [
        _together(limit, tier)
        for limit in tier.limits
        if limit.per == "key" and limit.per_minute and limit.name not in bounded
        if not any(each.tier == tier.tier and each.sets(tier.model, limit.name) is not None for each in overrides)
    ]
    return msgspec.structs.replace(tier, limits=(*tier.limits, *added))


def _together(limit: Limit, tier: TierLimits) -> Limit:
    keys = tier.active_keys
    per_minute, burst = keys * limit.per_minute, keys * limit.burst
    two_colours = limit.ceiling_per_minute > 0
    return msgspec.structs.replace(
        limit,
        per="tier",
        per_minute=per_minute,
        burst=burst,
        ceiling_per_minute=max(per_minute, limit.ceiling_per_minute) if two_colours else 0,
        ceiling_burst=max(burst, limit.ceiling_burst) if two_colours else 0,
        explanation=f"all keys of {tier.tier} together: {keys} × what each is assured, because a higher count of its "
        "keys waits for approval and the tier must not be assured more than its share",
    )
