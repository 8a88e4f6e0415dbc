"""What a group of replicas supplies: the knee of its profile where its mix and SLO put it."""

from __future__ import annotations

import asyncio

import pytest

from ratelimit.groupsupply import GroupSupply
from ratelimit.policy import Promise
from ratelimit.supervisor.tasks import background
from ratelimit.supply import SupplyBook
from serving.capacity import Slo, WorkloadMix
from serving.comparison import compare
from serving.fleet import ReplicaSpec
from serving.mixes import load_mix
from serving.operating import OperatingPoint
from serving.profile import Profile, load_profile
from serving.stepsim import Knee

pytestmark = pytest.mark.slow

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


async def found_all(book: SupplyBook, found: asyncio.Event, spec: ReplicaSpec, promises: list[Promise]) -> None:
    """Wait until the book knows the replica's knees for these promises."""
    async with asyncio.timeout(30), background(book.run()):
        while not book.knows(spec, promises):
            await found.wait()
            found.clear()


async def test_knees_that_nothing_uses_are_forgotten_beyond_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading profiles anew keeps the knees of all groups, and of the others those that were found last."""

    def quick(profile: Profile, mix: WorkloadMix, slo: Slo) -> OperatingPoint:
        return OperatingPoint(profile.step_time, Knee(slo.ttft_s, 0.9, 0.5, 0.04, "tpot"), "")

    monkeypatch.setattr("ratelimit.supply.operating_point", quick)
    monkeypatch.setattr("ratelimit.supply.MOST_KNEES_KEPT", 2)
    mix, spec = load_mix("chat"), ReplicaSpec("http://127.0.0.1:1", "m", "H200", SURFACE)
    first, *others = [Promise(mix, Slo(1.0 + i, 0.1)) for i in range(5)]
    found = asyncio.Event()
    book = SupplyBook(found.set)
    book.read({SURFACE})
    for each in (first, *others):
        await found_all(book, found, spec, [each])
    book.supplies([spec], [first])

    book.read({SURFACE})

    assert [book.knows(spec, [each]) for each in (first, *others)] == [True, False, False, True, True]


async def test_the_same_replicas_are_the_same_groups() -> None:
    """As long as the replicas are the same their groups are too, and one that goes changes only its own."""
    promise = Promise(load_mix("prefill-heavy"), SLOW)
    specs = [ReplicaSpec(f"http://127.0.0.1:{i}", "m", "H200", SURFACE, 1.0 + i % 2) for i in range(6)]
    found = asyncio.Event()
    book = SupplyBook(found.set)
    book.read({SURFACE})
    await found_all(book, found, specs[0], [promise])

    first = book.supplies(specs, [promise])
    again = book.supplies(list(specs), [promise])
    fewer = book.supplies(specs[:-1], [promise])

    assert [one is other for one, other in zip(first, again, strict=True)] == [True, True]
    assert [one is other for one, other in zip(first, fewer, strict=True)] == [True, False]
    assert [group.group.count for group in fewer] == [3, 2]
    assert [group.group.count for group in book.supplies([], [promise])] == []
