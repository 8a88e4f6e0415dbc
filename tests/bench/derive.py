"""How long deriving takes: a fleet of 100,000 replicas in 1,000 groups, 1,000,000 keys in 20 tiers of 4 promises.

``python -m tests.bench.derive [--json FILE] [--rounds 9]`` times a knee of each mix, the fits of the shipped bench
results, the first derivation, one after a single replica is lost, comparing and encoding what they give, and what a
controller does beside it: sorting its replicas into groups, which of them count, taking up and counting keys. Profiles
are the shipped H100, H200, B200 and GB200 ones; each is slowed in 250 ways, so that all groups are unlike and their
supplies are those of no real fleet. Times are CPU seconds of this process, which has one thread: the least, the median
and the slowest of the rounds, since neighbours on the machine make single rounds slow.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from statistics import median
from time import process_time
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from ratelimit.activekeys import ActiveKeys, owners
from ratelimit.derive import GroupSupply, derive
from ratelimit.gputypes import clear_gpu_types
from ratelimit.inputs import counted
from ratelimit.keys import KeyRecord
from ratelimit.policy import KeyAmounts, Policy, PoolPolicy, Promise, TierPolicy, promises_of
from ratelimit.publication import Publication, PublishedReplica
from ratelimit.supervisor.tasks import background
from ratelimit.supply import SupplyBook, domain_replicas
from serving.benchgroups import fit_groups
from serving.capacity import ReplicaGroup, Slo
from serving.fleet import ReplicaSpec, ReplicaStatus
from serving.fleetcost import clear_costs
from serving.health import ReplicaHealth
from serving.mixes import load_mix
from serving.profile import load_profile
from serving.stepsim import Knee, knee

MODEL = "llama-3.1-8b"
PROFILES = tuple(f"{gpu}-{MODEL}" for gpu in ("h100", "h200", "b200", "gb200"))
GROUPS, REPLICAS, TIERS, KEYS = 1_000, 100_000, 20, 1_000_000
MIXES = ("chat", "decode-heavy", "prefill-heavy", "long-context")
SLO = Slo(2.0, 0.05)
MIB = 1024 * 1024

T = TypeVar("T")


class Timing(msgspec.Struct, frozen=True):
    """What was timed, and the least, the median and the slowest of the rounds, in seconds."""

    what: str
    least_s: float
    median_s: float
    slowest_s: float


class Fleet(msgspec.Struct, frozen=True):
    """Everything that a derivation needs."""

    policy: Policy
    groups: tuple[GroupSupply, ...]
    active_keys: dict[tuple[str, str], int]

    def derived(self, groups: Sequence[GroupSupply] | None = None) -> Publication:
        """The publication of these groups, or of all."""
        supplies = {MODEL: self.groups if groups is None else groups}
        return derive(1, "2026-11-21T00:00:00Z", "bench", self.policy, supplies, self.active_keys, ())

    def after_a_loss(self, at: int = 0) -> tuple[GroupSupply, ...]:
        """The groups when the one at this place has lost a replica; the others are the same objects."""
        one = self.groups[at]
        group = msgspec.structs.replace(one.group, count=one.group.count - 1)
        fewer = msgspec.structs.replace(one, group=group, replicas=one.replicas[1:])
        return *self.groups[:at], fewer, *self.groups[at + 1 :]


def bench_policy(tiers: int = TIERS) -> Policy:
    """Half of the tiers assured, half best effort; a quarter of them on each mix."""
    pool = PoolPolicy(MODEL, SLO, load_mix("chat"), None, 1, 32_768, 0.25)
    mixes = [None, *(load_mix(name) for name in MIXES[1:])]
    return Policy(
        tiers=tuple(
            TierPolicy(
                name=f"tier-{i}",
                share=0 if i % 2 else 1.8 / tiers,
                ceiling=0.8,
                priority=i,
                burst_s=5.0,
                mix=mixes[i % len(mixes)],
                minimum=KeyAmounts() if i % 2 else KeyAmounts(output_tokens=100),
                oversell=4.0 if i % 2 else None,
            )
            for i in range(tiers)
        ),
        pools=(pool,),
        enforce=True,
    )


def bench_fleet(find: Callable[[str, Promise], Knee], groups: int = GROUPS, replicas: int = REPLICAS) -> Fleet:
    """A fleet of unlike groups of equal size, whose knees ``find`` gives by profile and promise."""
    policy = bench_policy()
    promises = promises_of(policy.tiers, policy.pools[0])
    knees = {name: {promise: find(name, promise) for promise in promises} for name in PROFILES}
    size = replicas // groups
    made = tuple(_group(i, size, knees[PROFILES[i % len(PROFILES)]], promises[0]) for i in range(groups))
    return Fleet(policy, made, {(tier.name, MODEL): KEYS // TIERS for tier in policy.tiers})


def _group(i: int, size: int, knees: dict[Promise, Knee], own: Promise) -> GroupSupply:
    profile = load_profile(PROFILES[i % len(PROFILES)])
    slowdown = 1 + i / 1000
    rate = knees[own].requests_per_s / slowdown
    return GroupSupply(
        group=ReplicaGroup(size, profile.step_time.slowed(slowdown), profile.limits, own.slo.slowed(slowdown)),
        gpu=profile.gpu,
        gpus_per_replica=profile.gpus_per_replica,
        profile=profile.name,
        slowdown=slowdown,
        knees=knees,
        provenance=f"{profile.name}, {profile.provenance.kind} {profile.provenance.date}",
        replicas=tuple(
            PublishedReplica(f"http://10.{i >> 8}.{i & 255}.{j}:8000", profile.gpu, profile.name, slowdown, rate)
            for j in range(size)
        ),
        domain_replicas=domain_replicas(profile),
    )


def timed(what: str, run: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> Timing:
    """Median and slowest of some rounds, ``before`` each of them not counted."""
    taken = []
    gc.collect()
    for _ in range(rounds):
        before()
        start = process_time()
        run()
        taken.append(process_time() - start)
    return Timing(what, min(taken), median(taken), max(taken))


def peak_memory_mib() -> float:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / MIB


def timed_knees() -> tuple[list[Timing], dict[tuple[str, Promise], Knee]]:
    """Every knee that the fleet needs, each found once; and how long those of a mix took."""
    policy = bench_policy()
    found: dict[tuple[str, Promise], Knee] = {}
    timings = []
    for promise in promises_of(policy.tiers, policy.pools[0]):
        taken = []
        for name in PROFILES:
            profile = load_profile(name)
            start = process_time()
            found[name, promise] = knee(profile.step_time, profile.limits, *promise)
            taken.append(process_time() - start)
        timings.append(Timing(f"a knee, {promise.mix.name} (4 GPU types)", min(taken), median(taken), max(taken)))
    return timings, found


def timed_fits() -> Timing:
    """All groups of the shipped bench results, fitted with their errors."""
    text = (files("serving") / "profiles" / "bench_serve_results.csv").read_text(encoding="utf-8").splitlines()
    groups = len(fit_groups(text))
    return timed(f"{groups} fits, with leave-one-mix-out errors, all together", lambda: fit_groups(text), 1)


def timed_derivations(fleet: Fleet, rounds: int) -> list[Timing]:
    """The first derivation of a process, one after a loss, and what a controller adds to it."""
    after = fleet.after_a_loss()
    before, same, now = fleet.derived(), fleet.derived(), fleet.derived(after)
    encode = msgspec.json.Encoder().encode

    cold = Fleet(fleet.policy, (), fleet.active_keys)

    def forget() -> None:
        nonlocal cold
        clear_costs()
        clear_gpu_types()
        unused = tuple(msgspec.structs.replace(group) for group in fleet.groups)
        cold = msgspec.structs.replace(fleet, groups=unused)

    def forgotten() -> Publication:
        return cold.derived()

    lost, places = after, cycle(range(len(fleet.groups)))

    def lose_another() -> None:
        """In another group each time, which then was never seen before; the one before has its replica back."""
        nonlocal lost
        lost = fleet.after_a_loss(next(places))

    return [
        timed(f"derive, {REPLICAS:,} replicas, {len(fleet.groups):,} groups, nothing cached", forgotten, 3, forget),
        timed("derive after one replica changes", lambda: fleet.derived(lost), rounds, lose_another),
        timed("compare two equal publications", lambda: before == same, rounds),
        timed(f"encode one ({len(encode(now)) / MIB:.0f} MiB of JSON)", lambda: encode(now), rounds),
    ]


async def filled_book(promises: Sequence[Promise]) -> SupplyBook:
    """A controller's book with the knees of every profile known."""
    found = asyncio.Event()
    book = SupplyBook(found.set)
    book.read(PROFILES)
    specs = [ReplicaSpec("http://10.0.0.1:8000", MODEL, name, name) for name in PROFILES]
    async with asyncio.timeout(600), background(book.run()):
        while book.unknown(specs, {MODEL: promises}):
            await found.wait()
            found.clear()
    return book


def timed_controller(fleet: Fleet, rounds: int) -> list[Timing]:
    """What a controller does beside ``derive`` when one replica changes, of ``REPLICAS`` replicas."""
    promises = promises_of(fleet.policy.tiers, fleet.policy.pools[0])
    book = asyncio.run(filled_book(promises))
    specs = [
        ReplicaSpec(replica.url, MODEL, replica.gpu, replica.profile, replica.slowdown)
        for group in fleet.groups
        for replica in group.replicas
    ]
    statuses = [ReplicaStatus(spec, ReplicaHealth("healthy")) for spec in specs]
    urls = frozenset(spec.url for spec in specs)
    turns = [specs, specs[1:]]

    def other_groups() -> None:
        turns.reverse()
        book.supplies(turns[0], promises)

    book.supplies(specs, promises)
    return [
        timed("sort the same replicas into groups", lambda: book.supplies(list(specs), promises), rounds),
        timed("sort them after one changes", other_groups, rounds),
        timed("which profiles' knees are unknown", lambda: book.unknown(specs, {MODEL: promises}), rounds),
        timed("which replicas count", lambda: counted(statuses, urls, {MODEL: 5.0}, 0.0), rounds),
    ]


def timed_keys(rounds: int) -> list[Timing]:
    """The keys in use by tier from their records, as a controller counts them: at first, and when nothing is new."""
    records = [KeyRecord(f"k_{i:08x}", f"{i:064x}", "", "acme", f"tier-{i % TIERS}", 0.0) for i in range(KEYS)]
    active = ActiveKeys()

    def count() -> None:
        active.adopt(owners(records), [MODEL], 1.0)
        active.counts(1.0)

    return [
        timed(f"take up {KEYS:,} keys, all in use, and count them", count, 1),
        timed("the same again after the key file changed", count, rounds),
        timed("count them while nothing is new", lambda: active.counts(1.0), rounds),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    timings, knees = timed_knees()
    timings.append(timed_fits())
    fleet = bench_fleet(lambda name, promise: knees[name, promise])
    timings += timed_derivations(fleet, options.rounds)
    peak_mib = peak_memory_mib()
    timings += timed_controller(fleet, options.rounds)
    controller_mib = peak_memory_mib()
    timings += timed_keys(3)
    keys_mib = peak_memory_mib()
    table = Table("what", "least", "median", "slowest", title="Deriving (virtual fleet), CPU time")
    for timing in timings:
        times = (timing.least_s, timing.median_s, timing.slowest_s)
        table.add_row(timing.what, *(f"{taken * 1000:,.1f} ms" for taken in times))
    console = Console(width=120)
    console.print(table)
    console.print(
        f"peak memory with fleet, publications and JSON: {peak_mib:,.0f} MiB; with replicas' statuses and groups: "
        f"{controller_mib:,.0f} MiB; with {KEYS:,} keys, records and uses: {keys_mib:,.0f} MiB"
    )
    if options.json:
        figures = {"timings": timings, "peak_mib": peak_mib, "controller_mib": controller_mib, "keys_mib": keys_mib}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
