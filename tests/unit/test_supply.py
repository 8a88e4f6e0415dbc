"""What a group of replicas supplies: the knee of its profile where its mix and SLO put it."""

from __future__ import annotations

import asyncio

from ratelimit.groupsupply import GroupSupply
from ratelimit.policy import Promise
from ratelimit.supervisor.tasks import background
from ratelimit.supply import SupplyBook
from serving.capacity import Slo
from serving.comparison import compare
from serving.fleet import ReplicaSpec
from serving.mixes import load_mix
from serving.profile import load_profile

SURFACE = "h200-glm-4.6"
SLOW = Slo(2.0, 0.1)


async def supply_of(profile: str, promise: Promise) -> GroupSupply:
    """The supply of two replicas of it."""
    specs = [ReplicaSpec(f"http://127.0.0.1:{port}", "m", "H200", profile, 2.0, 5.0) for port in (1, 2)]
    found = asyncio.Event()
    book = SupplyBook(found.set)
    book.read({profile})
    async with asyncio.timeout(60), background(book.run()):
        while not book.knows(specs[0], [promise]):
            await found.wait()
            found.clear()
    (group,) = book.supplies(specs, [promise])
    return group


async def test_a_surface_counts_in_what_is_derived() -> None:
    """Limits rest on the knee that `profiles compare` shows, and requests cost what its steps take there."""
    profile, promise = load_profile(SURFACE), Promise(load_mix("prefill-heavy"), SLOW)
    group = await supply_of(SURFACE, promise)
    (compared,) = compare([profile], *promise)
    assert compared.per_replica is not None
    assert group.knees[promise].requests_per_s == compared.per_replica.requests_per_s
    assert group.group.step_time != profile.step_time.slowed(2.0)
    assert "extrapolated" not in group.provenance


async def test_what_was_not_measured_is_marked() -> None:
    """A mix beyond the measured contexts gives a supply that says so wherever it is explained."""
    group = await supply_of(SURFACE, Promise(load_mix("chat", 0.05), SLOW))
    assert "extrapolated: a mean context of" in group.provenance
