"""What the scenario reads of a running stack."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from loadtests.scenario_01_added_capacity import KEYS_BY_TIER, SETTINGS
from loadtests.stack import MODEL, Stack, StackError, free_ports, requests_in_engine
from ratelimit.config import load_config

EXPOSITION = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
"""


def test_requests_in_an_engine_are_running_and_waiting_ones() -> None:
    """Waiting requests count once, though vLLM also lists them by reason."""
    assert requests_in_engine(EXPOSITION) == 5.0


@pytest.mark.parametrize(("count", "enforce"), [(1, False), (4, True)])
def test_written_config_is_a_valid_one(tmp_path: Path, count: int, enforce: bool) -> None:
    """What the scenario writes is a config that Penstock accepts, with the fleet and tiers that the story needs."""
    Stack(SETTINGS, tmp_path).write_config(count, enforce)
    config = load_config(tmp_path / "penstock.yaml")

    assert config.gateway.enforce is enforce
    assert [pool.model for pool in config.pools] == [MODEL]
    assert config.pools[0].engines[0].count == count
    assert {tier.name for tier in config.tiers} == set(KEYS_BY_TIER)
    assert sum(tier.share for tier in config.tiers) == 1.0
    assert sum(KEYS_BY_TIER.values()) == 6


def testfree_ports_are_neighbours_and_free() -> None:
    """Every port given can be listened on, and none that is taken is given."""
    first = free_ports(3)
    assert first == list(range(first[0], first[0] + 3))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first[1]))
        assert not set(first) & set(free_ports(3))


async def test_a_stack_that_was_not_started_says_so(tmp_path: Path) -> None:
    """Asking before the start is an error of its own, and stopping is harmless."""
    stack = Stack(SETTINGS, tmp_path)

    with pytest.raises(StackError, match="not been started"):
        await stack.ask(b"{}")
    await stack.stop()
