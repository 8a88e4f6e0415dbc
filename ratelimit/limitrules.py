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


def _names(rule: LimitRule, key_id: str, org: str, tier: str, model: str) -> bool:
    chosen = ((rule.keys, key_id), (rule.orgs, org), (rule.tiers, tier), (rule.models, model))
    return all(names is None or name in names for names, name in chosen)


def _limit(rule: LimitRule) -> Limit:
    rated = rule.window == "minute" and rule.name != "concurrency"
    burst = rule.amount if rule.burst is None or not rated else rule.burst
    return Limit(rule.name, rule.amount if rated else 0, burst, _explanation(rule, burst), rule.per, rule.window)


def _explanation(rule: LimitRule, burst: int) -> str:
    what = f"{rule.amount:,} {rule.name.replace('_', ' ')}"
    if rule.name == "concurrency":
        what = f"{rule.amount:,} requests in flight"
    else:
        what += f" {_WINDOWS[rule.window]}"
        what += f", burst {burst:,}" if rule.window == "minute" else ""
    return f"{what} per {rule.per}: set by operator" + (f": {rule.reason}" if rule.reason else "")


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
