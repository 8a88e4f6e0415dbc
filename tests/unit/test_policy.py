"""The policy values are plain, comparable and immutable."""

from __future__ import annotations

import msgspec
import pytest

from ratelimit.policy import KeyAmounts, Policy, PoolPolicy, Promise, TierPolicy, promise_of, promises_of
from serving.capacity import RequestShape, Slo, WorkloadMix


def policy() -> Policy:
    pool = PoolPolicy(
        model="llama-3.1-8b",
        slo=Slo(1.0, 0.05),
        mix=WorkloadMix("one", (RequestShape(100, 10),)),
        default_max_output=512,
        spare_domains=0,
        max_model_len=32_768,
        tokens_per_byte=0.25,
    )
    return Policy(tiers=(TierPolicy("pro", 0.6, 1.0, 0, 5.0),), pools=(pool,), enforce=True)


def test_equal_rules_are_equal_values() -> None:
    """Two policies with the same rules compare and hash alike, so a change is seen by comparison."""
    assert policy() == policy()
    assert hash(policy()) == hash(policy())


def test_a_policy_does_not_change() -> None:
    """A policy in use cannot be edited under its readers."""
    with pytest.raises(AttributeError):
        policy().enforce = False  # type: ignore[misc]  # what the test is about


def test_a_policy_survives_json() -> None:
    """A policy can be kept as a document and read back equal."""
    assert msgspec.json.decode(msgspec.json.encode(policy()), type=Policy) == policy()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share": -0.1}, "the share is -0.1"),
        ({"share": float("nan")}, "the share is nan"),
        ({"ceiling": 0.5}, "the ceiling is 0.5, it is at least the share of 0.6"),
        ({"burst_s": float("inf")}, "burst_s is inf"),
        ({"oversell": 2.0}, "oversell is 2.0, it is at least 1 and for a tier with share 0 only"),
        ({"minimum": KeyAmounts(requests=2), "maximum": KeyAmounts(requests=1)}, "the minimum of requests is 2, above"),
    ],
)
def test_a_tier_that_means_nothing_is_refused(changes: dict[str, object], said: str) -> None:
    """Whoever builds a policy without a config file is told of numbers that contradict each other, too."""
    with pytest.raises(ValueError, match=said):
        msgspec.structs.replace(TierPolicy("pro", 0.6, 1.0, 0, 5.0), **changes)


def test_promises_of_a_pool() -> None:
    """Each promise is named once, the pool's own first, whether tiers share it or not."""
    (pool,) = policy().pools
    own, strict = Promise(pool.mix, pool.slo), Promise(pool.mix, Slo(0.5, 0.02))
    tiers = (TierPolicy("a", 0.1, 1.0, 0, 5.0, slo=strict.slo), TierPolicy("b", 0.1, 1.0, 0, 5.0, mix=pool.mix))
    assert promises_of(tiers, pool) == (own, strict)
    assert [promise_of(tier, pool) for tier in tiers] == [strict, own]
