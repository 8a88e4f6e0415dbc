"""Knees that a standby finds before it leads."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ratelimit import kneesahead
from ratelimit.config import Config
from ratelimit.kneesahead import find_ahead
from ratelimit.supervisor.tasks import background
from ratelimit.supply import Knees
from serving import operating
from serving.capacity import EngineLimits, Slo, StepTimeModel, WorkloadMix
from serving.stepsim import Knee
from tests.support.waiting import eventually_async

WAIT_S = 20.0
PROFILES = ["h100-llama-3.1-8b", "h200-llama-3.1-8b"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Knees are not simulated here, and configs are looked at often."""

    def knee(_step_time: StepTimeModel, _limits: EngineLimits, _mix: WorkloadMix, slo: Slo) -> Knee:
        return Knee(slo.ttft_s, 0.9, 0.5, 0.04, "tpot")

    monkeypatch.setattr(operating, "knee", knee)
    monkeypatch.setattr(kneesahead, "LOOK_INTERVAL_S", 0.01)


def config_of(*ttfts_ms: float) -> Config:
    """A pool that discovers two profiles; each tier has a promise of its own."""
    discover = {"selector": "a=b", "namespace": "n", "profiles": PROFILES}
    tiers = [{"name": f"t{i}", "share": 0.1, "slo": {"ttft_ms": each}} for i, each in enumerate(ttfts_ms)]
    document = {"pools": [{"model": "m", "discover": discover}], "tiers": tiers, "orgs": [{"name": "acme"}]}
    return Config.model_validate(document, context={"folder": Path()})


async def until(knees: Knees, count: int) -> None:
    async def found() -> bool:
        return len(knees) >= count

    await eventually_async(found, WAIT_S, f"{count} knees")


async def test_a_standby_finds_the_knees_of_all_that_may_come_and_of_a_config_that_changes() -> None:
    """A profile that is only discovered has no replica yet, and is what a takeover would wait for."""
    knees, configs = Knees(), [config_of(500)]
    async with background(find_ahead(lambda: configs[0], knees, lambda: False)):
        await until(knees, 2 * len(PROFILES))
        before = len(knees)
        configs[0] = config_of(500, 700)
        await until(knees, before + len(PROFILES))


async def test_a_leader_finds_none_ahead() -> None:
    """Its own controller knows which it needs first; once it leads no more the others are found."""
    knees, looked, leads, config = Knees(), asyncio.Event(), [True], config_of(500)

    def is_leading() -> bool:
        looked.set()
        return leads[0]

    async with background(find_ahead(lambda: config, knees, is_leading)):
        await asyncio.wait_for(looked.wait(), WAIT_S)
        assert not knees
        leads[0] = False
        await until(knees, 2 * len(PROFILES))
