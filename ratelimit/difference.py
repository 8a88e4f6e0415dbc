"""What a change of limits does to every tier: two publications compared, limit by limit. Pure.

Of a limit three numbers count: what is assured, the most that may be taken, and what may come at once. Its *fall* is
the largest share that one of the three loses. A limit that appears where nothing was limited is a fall from no bound,
so of 1; so is one that ends because nothing serves the tier any more. A tier without limits in a pool that serves takes
what is idle, so that its first limit is such a first bound, whether or not its promise could be kept before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

import msgspec

from ratelimit.policy import LimitName, LimitRule, LimitScope, LimitWindow
from ratelimit.publication import Limit, Publication, PublishedPool, TierLimits

V = TypeVar("V")

#: ``unlimited``: the callers are served and this bounds nothing. ``borrowed``: so it is, but nothing keeps the tier's
#: promise any more, so that it is assured nothing. ``nothing``: no such tier, or nothing serves it.
NoAmount = Literal["unlimited", "borrowed", "nothing"]
#: What stands for all limits of a tier that has none before and after.
_ANY_LIMIT: tuple[LimitName, LimitScope, LimitWindow] = ("requests", "key", "minute")
_MICROSECONDS_A_MINUTE = 60_000_000


class Amount(msgspec.Struct, frozen=True):
    """A limit in numbers: per minute, or requests in flight, or a window's amount.

    ``assured`` is 0 where a tier only borrows. ``burst`` is the most at once, 0 where that is ``most`` itself.
    """

    assured: int
    most: int
    burst: int = 0


class LimitChange(msgspec.Struct, frozen=True):
    """One limit before and after. ``who`` is a tier, or the callers of an operator's rule (then ``is_rule``).

    ``keys_before`` and ``keys_after`` are the tier's active keys; 0 for a rule.
    """

    who: str
    model: str
    limit: LimitName
    per: LimitScope
    window: LimitWindow
    before: Amount | NoAmount
    after: Amount | NoAmount
    keys_before: int = 0
    keys_after: int = 0
    is_rule: bool = False

    @property
    def fall(self) -> float:
        """The share that is lost, from 0 (nothing falls) to 1."""
        return fall(self.before, self.after)

    @property
    def change(self) -> float | None:
        """The relative change: the fall, negative, or else the largest rise; None from or to no number."""
        if not isinstance(self.before, Amount) or not isinstance(self.after, Amount):
            return None
        pairs = zip(msgspec.structs.astuple(self.before), msgspec.structs.astuple(self.after), strict=True)
        rises = [after / before - 1 for before, after in pairs if before]
        return -self.fall if self.fall else max(rises, default=0.0)


class PoolSupply(msgspec.Struct, frozen=True):
    """What a pool has to give: its replicas by GPU type, and its usable supply. ``busy`` replicas are that supply."""

    replicas: dict[str, int]
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    busy: float


class Snapshot(msgspec.Struct, frozen=True):
    """A publication without the list of its replicas, which may be long; ``supplies`` says by model what they are."""

    publication: Publication
    supplies: dict[str, PoolSupply]


class PoolChange(msgspec.Struct, frozen=True):
    """One pool before and after; None where there is no such pool."""

    model: str
    before: PoolSupply | None
    after: PoolSupply | None


class Setting(msgspec.Struct, frozen=True):
    """Something that is no number of a limit, in words; ``fall`` is 1 where it takes a protection away, else 0."""

    what: str
    before: str
    after: str
    fall: float = 0.0


class Difference(msgspec.Struct, frozen=True):
    """All that differs between two publications; empty where callers would notice nothing.

    ``lost_access`` names each org and the model that it may no longer use; ``warnings`` are those that are new.
    """

    limits: tuple[LimitChange, ...] = ()
    pools: tuple[PoolChange, ...] = ()
    lost_access: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def largest_fall(self) -> float:
        """The largest share that any limit loses; 1 where an org loses a model, or the limits lose their guard."""
        of_limits, of_settings = (each.fall for each in self.limits), (each.fall for each in self.settings)
        return max((1.0 if self.lost_access else 0.0, *of_limits, *of_settings))

    def falls_above(self, share: float) -> tuple[LimitChange, ...]:
        """The limits that lose more than ``share``, the largest falls first."""
        return tuple(sorted((c for c in self.limits if c.fall > share), key=lambda change: -change.fall))


def fall(before: Amount | NoAmount, after: Amount | NoAmount) -> float:
    """The largest share that one of a limit's numbers loses, from 0 to 1."""
    if before in ("nothing", after) or after == "unlimited":
        return 0.0
    if after == "borrowed":
        return 1.0 if isinstance(before, Amount) and before.assured else 0.0
    if not isinstance(before, Amount) or not isinstance(after, Amount):
        return 1.0  # from no bound, or to nothing
    pairs = zip(msgspec.structs.astuple(before), msgspec.structs.astuple(after), strict=True)
    return max(max(0.0, 1 - now / was) if was else 0.0 for was, now in pairs)


def bound_changed(before: float | None, after: float | None) -> tuple[Setting, ...]:
    """What becomes of the share that a limit may lose without approval (None: any share), if anything does.

    To allow more is a fall of its own: whatever comes next would fall unasked.
    """
    if before == after:
        return ()
    loosened = before is not None and (after is None or after > before)
    return (Setting("approval.falls_above", _share(before), _share(after), 1.0 if loosened else 0.0),)


def _share(bound: float | None) -> str:
    return "unset: nothing waits" if bound is None else f"{100 * bound:g} %"


def snapshot(publication: Publication) -> Snapshot:
    """What is kept and compared of a publication."""
    pools = tuple(msgspec.structs.replace(pool, replicas=()) for pool in publication.pools)
    supplies = {pool.model: _supply_of(pool) for pool in publication.pools}
    return Snapshot(msgspec.structs.replace(publication, pools=pools), supplies)


def difference(before: Snapshot | None, after: Snapshot) -> Difference:
    """What changes from ``before`` (None: nothing was published) to ``after``."""
    now = after.publication
    was = before.publication if before else Publication(0, "", "", now.enforce, (), ())
    supplies = before.supplies if before else {}
    models = _keys_of(after.supplies, supplies)
    pools = [PoolChange(model, supplies.get(model), after.supplies.get(model)) for model in models]
    return Difference(
        limits=(*_tier_changes(was, now), *(_rule_changes(was.rules, now.rules) if before else ())),
        pools=tuple(pool for pool in pools if pool.before != pool.after),
        lost_access=_lost_access(was, now),
        settings=tuple(setting for setting in _settings(was, now) if setting.before != setting.after) if before else (),
        warnings=tuple(warning for warning in now.warnings if warning not in was.warnings),
    )


class _Named(NamedTuple):
    """Which limit of a tier's is meant."""

    limit: LimitName
    per: LimitScope
    window: LimitWindow


def _tier_changes(before: Publication, after: Publication) -> list[LimitChange]:
    old, new = _by_tier(before), _by_tier(after)
    changes = []
    for tier, model in _keys_of(new, old):
        was, now = old.get((tier, model)), new.get((tier, model))
        for named in _keys_of(_limits_of(now), _limits_of(was)) or [_Named(*_ANY_LIMIT)]:
            amounts = _amount(was, named, before), _amount(now, named, after)
            if amounts[0] != amounts[1]:
                keys = (was.active_keys if was else 0), (now.active_keys if now else 0)
                changes.append(LimitChange(tier, model, *named, *amounts, *keys))
    return changes


def _by_tier(publication: Publication) -> dict[tuple[str, str], TierLimits]:
    return {(of_tier.tier, of_tier.model): of_tier for of_tier in publication.tiers}


def _limits_of(tier: TierLimits | None) -> dict[_Named, Limit]:
    return {_Named(limit.name, limit.per, limit.window): limit for limit in tier.limits} if tier else {}


def _amount(tier: TierLimits | None, named: _Named, publication: Publication) -> Amount | NoAmount:
    pool = publication.pool(tier.model) if tier else None
    if tier is None or pool is None or not pool.budget_per_minute:
        return "nothing"
    if tier.note:
        return "borrowed"
    limits = _limits_of(tier)
    found = limits.get(named)
    if found is not None:
        return _numbers(found, tier.assured)
    each = limits.get(_Named(named.limit, "key", named.window))
    if named.per == "tier" and each is not None:
        return _together(each, tier)
    return "unlimited"


def _numbers(limit: Limit, assured: bool) -> Amount:
    if not limit.per_minute and not limit.ceiling_per_minute:
        return Amount(limit.burst if assured else 0, limit.burst)
    most = limit.ceiling_per_minute or limit.per_minute
    return Amount(limit.per_minute if assured else 0, most, limit.ceiling_burst or limit.burst)


def _together(each: Limit, tier: TierLimits) -> Amount:
    """What the limit of each key comes to for all of them, where none of their own is published.

    It is stated as ``keylimits`` states one, so that a limit which only becomes visible is no change.
    """
    amount = _numbers(each, tier.assured)
    assured = tier.active_keys * amount.assured
    return Amount(assured, max(assured, amount.most), max(tier.active_keys * each.burst, amount.burst))


def _rule_changes(before: Iterable[LimitRule], after: Iterable[LimitRule]) -> list[LimitChange]:
    """Several rules about the same limit and callers hold together, so the lowest of each number stands for them."""
    old, new = _tightest(before), _tightest(after)
    changes = []
    for rule in _keys_of(new, old):
        amounts: tuple[Amount | NoAmount, Amount | NoAmount]
        amounts = old.get(rule, "unlimited"), new.get(rule, "unlimited")
        if amounts[0] != amounts[1]:
            models = ", ".join(rule.models) if rule.models else "every model"
            changes.append(LimitChange(callers(rule), models, rule.name, rule.per, rule.window, *amounts, is_rule=True))
    return changes


def _tightest(rules: Iterable[LimitRule]) -> dict[LimitRule, Amount]:
    """By whom and what rules are about, the lowest amount and the lowest burst, which need not be of one rule."""
    found: dict[LimitRule, Amount] = {}
    for rule in rules:
        named = msgspec.structs.replace(rule, amount=0, burst=None, reason="")
        amount = _rule_amount(rule)
        known = found.get(named, amount)
        found[named] = Amount(0, min(known.most, amount.most), min(known.burst, amount.burst))
    return found


def _rule_amount(rule: LimitRule) -> Amount:
    is_rated = rule.window == "minute" and rule.name != "concurrency"
    burst = rule.amount if rule.burst is None else rule.burst
    return Amount(0, rule.amount, burst if is_rated else 0)


def callers(rule: LimitRule) -> str:
    """Whom a rule is about, in words."""
    parts = [("tier", rule.tiers), ("org", rule.orgs), ("key", rule.keys)]
    named = [f"{what} {', '.join(names)}" for what, names in parts if names is not None]
    return "; ".join(named) or "everybody"


def _supply_of(pool: PublishedPool) -> PoolSupply:
    """A pool's supply in numbers; replicas that are not named count under no GPU type."""
    gpus = Counter(replica.gpu for replica in pool.replicas)
    unnamed = sum(group.count for group in pool.groups) - len(pool.replicas)
    counts = dict(sorted(gpus.items())) | ({"unnamed": unnamed} if unnamed > 0 else {})
    return PoolSupply(
        counts,
        pool.usable_requests_per_s,
        pool.usable_input_tokens_per_s,
        pool.usable_output_tokens_per_s,
        pool.budget_per_minute / _MICROSECONDS_A_MINUTE,
    )


def _lost_access(before: Publication, after: Publication) -> tuple[str, ...]:
    """Each org that loses a model which is still there; a pool that has gone is seen in the limits."""
    models = [pool.model for pool in after.pools if before.pool(pool.model)]
    return tuple(
        f"org {org.name} may no longer use {model}"
        for org in before.orgs
        for model in models
        if before.allows(org.name, model) and not after.allows(org.name, model)
    )


def _settings(before: Publication, after: Publication) -> Iterable[Setting]:
    yield Setting("enforce", _word(before.enforce), _word(after.enforce))
    yield Setting("orgs", _orgs(before), _orgs(after))
    yield Setting("shadow keys", _keys(before), _keys(after))
    old, new = _by_tier(before), _by_tier(after)
    for tier, model in new:
        was, now = old.get((tier, model)), new[tier, model]
        if was is None:
            continue
        where = f"{tier} on {model}"
        yield Setting(f"{where}: shadow", _word(was.shadow), _word(now.shadow))
        yield Setting(f"{where}: holds", was.holds, now.holds)
        yield Setting(f"{where}: priority", str(was.priority), str(now.priority))
        yield Setting(f"{where}: borrows up to", f"{was.borrow_up_to}/1000", f"{now.borrow_up_to}/1000")


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _orgs(publication: Publication) -> str:
    named = [
        org.name if org.models is None else f"{org.name} ({', '.join(org.models) or 'no model'})"
        for org in publication.orgs
    ]
    return ", ".join(sorted(named)) or "none"


def _keys(publication: Publication) -> str:
    return ", ".join(sorted(publication.shadow_keys)) or "none"


def _keys_of(first: Mapping[V, object], second: Mapping[V, object]) -> list[V]:
    """The keys of both, those of ``first`` before the others, each in its order."""
    return list(dict.fromkeys([*first, *second]))
