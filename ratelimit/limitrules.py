"""Which limits one caller has: those derived for its tier, and the operator's rules that name it. Pure.

A bucket is known by whom it is shared by, its limit's name and its window. Where several limits would share a bucket
they become one, each number the lowest of theirs, so that all of them hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ratelimit.policy import LimitRule
from ratelimit.publication import Limit

_WINDOWS = {"minute": "a minute", "5h": "in 5 hours from the first use", "week": "in a week from the first use"}


def limits_for(
    derived: Sequence[Limit], rules: Iterable[LimitRule], key_id: str, org: str, tier: str, model: str
) -> tuple[Limit, ...]:
    """All limits of one caller on one model, each bucket once: those derived in their order, then those of rules.

    An assured limit that a rule cuts stays assured, up to the rule, and its ceiling is cut as well.
    """
    return _tightest((*derived, *rules_for(rules, key_id, org, tier, model)))


def rules_for(rules: Iterable[LimitRule], key_id: str, org: str, tier: str, model: str) -> tuple[Limit, ...]:
    """The limits that the operator's rules set for one caller on one model, each bucket once."""
    return _tightest(_limit(rule) for rule in rules if _names(rule, key_id, org, tier, model))


def rule_text(rule: LimitRule) -> str:
    """A rule in words: its amount, for whom, and why."""
    chosen = (("keys", rule.keys), ("orgs", rule.orgs), ("tiers", rule.tiers), ("models", rule.models))
    callers = "; ".join(f"{what} {', '.join(names)}" for what, names in chosen if names is not None)
    return f"{_explanation(rule)} (for {callers or 'all callers'})"


def _names(rule: LimitRule, key_id: str, org: str, tier: str, model: str) -> bool:
    chosen = ((rule.keys, key_id), (rule.orgs, org), (rule.tiers, tier), (rule.models, model))
    return all(names is None or name in names for names, name in chosen)


def _limit(rule: LimitRule) -> Limit:
    per_minute = rule.amount if _is_rated(rule) else 0
    return Limit(rule.name, per_minute, _burst(rule), _explanation(rule), rule.per, rule.window)


def _is_rated(rule: LimitRule) -> bool:
    return rule.window == "minute" and rule.name != "concurrency"


def _burst(rule: LimitRule) -> int:
    return rule.amount if rule.burst is None or not _is_rated(rule) else rule.burst


def _explanation(rule: LimitRule) -> str:
    if rule.name == "concurrency":
        what = f"{rule.amount:,} requests in flight"
    else:
        what = f"{rule.amount:,} {rule.name.replace('_', ' ')} {_WINDOWS[rule.window]}"
    if _is_rated(rule):
        what += f", burst {_burst(rule):,}"
    return f"{what}, per {rule.per}: set by operator" + (f": {rule.reason}" if rule.reason else "")


def _tightest(limits: Iterable[Limit]) -> tuple[Limit, ...]:
    found: dict[tuple[str, str, str], Limit] = {}
    for limit in limits:
        bucket = (limit.per, limit.name, limit.window)
        found[bucket] = _both(found[bucket], limit) if bucket in found else limit
    return tuple(found.values())


def _both(one: Limit, other: Limit) -> Limit:
    """A limit under which both hold: a plain one bounds a ceiling too."""
    ceiling_per_minute = ceiling_burst = 0
    if one.ceiling_per_minute or other.ceiling_per_minute:
        ceiling_per_minute = min(one.ceiling_per_minute or one.per_minute, other.ceiling_per_minute or other.per_minute)
        ceiling_burst = min(one.ceiling_burst or one.burst, other.ceiling_burst or other.burst)
    return msgspec.structs.replace(
        one,
        per_minute=min(one.per_minute, other.per_minute),
        burst=min(one.burst, other.burst),
        explanation=f"the lower of\n{one.explanation}\nand\n{other.explanation}",
        ceiling_per_minute=ceiling_per_minute,
        ceiling_burst=ceiling_burst,
    )
