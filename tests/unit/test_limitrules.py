"""A caller has the limits derived for its tier and every rule that names it, the tightest where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.limitrules import limits_for, rule_text, rules_for
from ratelimit.policy import LimitName, LimitRule, LimitScope, LimitWindow
from ratelimit.publication import Limit

CALLER = ("k_1", "acme", "pro", "llama")
DERIVED = (
    Limit("requests", 600, 50, "why requests"),
    Limit("output_tokens", 1000, 100, "why output", ceiling_per_minute=5000, ceiling_burst=500),
    Limit("concurrency", 0, 20, "why concurrency"),
)

names: st.SearchStrategy[tuple[str, ...] | None] = st.sampled_from([None, ("acme", "pro", "k_1", "llama"), ("other",)])
rules = st.builds(
    LimitRule,
    name=st.sampled_from(get_args(LimitName)),
    amount=st.integers(1, 10_000),
    per=st.sampled_from(get_args(LimitScope)),
    window=st.sampled_from(get_args(LimitWindow)),
    burst=st.none() | st.integers(1, 10_000),
    tiers=names,
    orgs=names,
    models=names,
    keys=names,
)


def for_caller(*chosen: LimitRule, derived: Sequence[Limit] = DERIVED) -> dict[tuple[str, str, str], Limit]:
    found = limits_for(derived, chosen, *CALLER)
    return {(limit.per, limit.name, limit.window): limit for limit in found}


@pytest.mark.parametrize(
    ("rule", "amounts"),
    [
        (LimitRule("requests", 60), (60, 60)),
        (LimitRule("requests", 60, burst=5), (60, 5)),
        (LimitRule("requests", 60, "org", "5h"), (0, 60)),
        (LimitRule("input_tokens", 60, "model", "week"), (0, 60)),
        (LimitRule("concurrency", 6), (0, 6)),
    ],
)
def test_a_rule_as_a_limit(rule: LimitRule, amounts: tuple[int, int]) -> None:
    """A rate has a burst, all of it if not told; a window and what is in flight have an amount only."""
    (limit,) = rules_for([rule], *CALLER)
    assert (limit.name, limit.per, limit.window) == (rule.name, rule.per, rule.window)
    assert (limit.per_minute, limit.burst) == amounts
    assert "set by operator" in limit.explanation


@pytest.mark.parametrize("selector", ["keys", "orgs", "tiers", "models"])
def test_a_rule_reaches_only_whom_it_names(selector: str) -> None:
    """Each selector leaves out every caller that it does not name."""
    named = dict(zip(("keys", "orgs", "tiers", "models"), CALLER, strict=True))[selector]
    rule = LimitRule("requests", 1)
    assert rules_for([msgspec.structs.replace(rule, **{selector: ("x", named)})], *CALLER)
    assert rules_for([msgspec.structs.replace(rule, **{selector: ("x",)})], *CALLER) == ()


@given(chosen=st.lists(rules, max_size=8))
def test_each_bucket_is_named_once_and_every_rule_holds(chosen: list[LimitRule]) -> None:
    """Whatever rules there are, no bucket is charged twice, and none allows more than a rule that names the caller."""
    found = limits_for(DERIVED, chosen, *CALLER)
    buckets = [(limit.per, limit.name, limit.window) for limit in found]
    assert len(set(buckets)) == len(buckets)
    by_bucket = dict(zip(buckets, found, strict=True))
    for limit in (*DERIVED, *(each for rule in chosen for each in rules_for([rule], *CALLER))):
        enforced = by_bucket[limit.per, limit.name, limit.window]
        assert enforced.per_minute <= limit.per_minute
        assert enforced.burst <= limit.burst
        most = limit.ceiling_per_minute or limit.per_minute
        assert (enforced.ceiling_per_minute or enforced.per_minute) <= most
        assert (enforced.ceiling_burst or enforced.burst) <= (limit.ceiling_burst or limit.burst)
    for limit in found:
        if limit.ceiling_per_minute:
            assert limit.ceiling_per_minute >= limit.per_minute
            assert limit.ceiling_burst >= limit.burst
    assert [limit.name for limit in found[: len(DERIVED)]] == [limit.name for limit in DERIVED]


def test_a_rule_below_the_assured_rate_keeps_its_colour() -> None:
    """A caller whom a rule cuts is assured what the rule leaves, and borrows nothing beyond it."""
    cut = for_caller(LimitRule("output_tokens", 300, burst=30))["key", "output_tokens", "minute"]
    assert (cut.per_minute, cut.burst) == (cut.ceiling_per_minute, cut.ceiling_burst) == (300, 30)
    assert "why output" in cut.explanation
    assert "set by operator" in cut.explanation


def test_a_rule_between_assured_and_ceiling_cuts_the_ceiling() -> None:
    """What is assured stays; what may be borrowed is cut."""
    cut = for_caller(LimitRule("output_tokens", 3000, burst=300))["key", "output_tokens", "minute"]
    assert (cut.per_minute, cut.burst, cut.ceiling_per_minute, cut.ceiling_burst) == (1000, 100, 3000, 300)


def test_a_rule_in_words() -> None:
    """An operator reads what it allows, per whom, for whom and why."""
    assert rule_text(LimitRule("output_tokens", 10**6, "org", "week", orgs=("acme",), reason="contract 7")) == (
        "1,000,000 output tokens in a week from the first use, per org: set by operator: contract 7 (for orgs acme)"
    )
    assert rule_text(LimitRule("requests", 60, burst=5)).startswith("60 requests a minute, burst 5, per key")
    assert rule_text(LimitRule("concurrency", 6)) == "6 requests in flight, per key: set by operator (for all callers)"
