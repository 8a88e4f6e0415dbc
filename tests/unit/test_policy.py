"""The policy values are plain, comparable and immutable."""

from __future__ import annotations

import msgspec
import pytest

from ratelimit.policy import Policy, PoolPolicy, TierPolicy
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
