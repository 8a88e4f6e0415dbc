"""Small plans for tests: a pool of replicas with a given knee, tiers, callers, and the limits that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ratelimit.derive import GroupSupply, Promise, derive
from ratelimit.planning.demand import CallerDemand, Demand
from ratelimit.planning.throttled import Load, load_of
from ratelimit.policy import Policy, PoolPolicy, TierPolicy
from ratelimit.publication import Publication
from serving.capacity import EngineLimits, ReplicaGroup, RequestShape, Slo, StepTimeModel, WorkloadMix
from serving.stepsim import Knee

MODEL = "llama"
SLO = Slo(2.0, 0.05)
MIX = WorkloadMix("even", tuple(RequestShape(100 * k, 20 * k) for k in range(5, 16)))
ENTERPRISE = TierPolicy("enterprise", 0.5, 1.0, 0, 5.0)
PRO = TierPolicy("pro", 0.3, 1.0, 1, 5.0)
FREE = TierPolicy("free", 0.0, 0.5, 2, 5.0)
TIERS = (ENTERPRISE, PRO, FREE)
#: What the tests' tiers ask for, at a capacity of 20 requests/s: each tier's keys, and requests/s of all of them.
ASKED = {"enterprise": (2, 8.0), "pro": (4, 10.0), "free": (6, 12.0)}


def group(count: int, requests_per_s: float = 5.0, gpu: str = "H100", domain_replicas: int = 1) -> GroupSupply:
    """So many replicas, each with that knee."""
    return GroupSupply(
        group=ReplicaGroup(count, StepTimeModel(0.01, 2e-5, 2e-5, 2e-8), EngineLimits(512, 8192, 400_000, 32_768), SLO),
        gpu=gpu,
        gpus_per_replica=1,
        profile=f"{gpu}-test",
        slowdown=1.0,
        knees={Promise(MIX, SLO): Knee(requests_per_s, 0.9, 1.0, 0.04, "tpot")},
        provenance="test",
        domain_replicas=domain_replicas,
    )


def unable(supply: GroupSupply, slo: Slo) -> GroupSupply:
    """The same replicas, of which none meets this SLO."""
    return msgspec.structs.replace(supply, infeasible={Promise(MIX, slo): "too slow"})


def published(*groups: GroupSupply, keys: Mapping[str, int], tiers: tuple[TierPolicy, ...] = TIERS) -> Publication:
    """The limits of that fleet."""
    pool = PoolPolicy(MODEL, SLO, MIX, None, 0, 32_768, 0.3)
    counts = {(tier, MODEL): count for tier, count in keys.items()}
    return derive(1, "", "test", Policy(tiers, (pool,), enforce=True), {MODEL: groups}, counts, ())


def demand_of(scale: int = 1, times: float = 1.0) -> Demand:
    """``ASKED`` by so many times the keys, each asking so many times as often."""
    return Demand(
        tuple(CallerDemand(tier, keys * scale, rate * scale * times, MIX) for tier, (keys, rate) in ASKED.items()),
        "test",
    )


def demand_at(requests_per_s: Sequence[float]) -> Demand:
    """The keys of ``ASKED``, at these rates."""
    asked = zip(ASKED.items(), requests_per_s, strict=True)
    return Demand(tuple(CallerDemand(tier, keys, rate, MIX) for (tier, (keys, _)), rate in asked), "test")


def load(demand: Demand, publication: Publication) -> Load:
    """The demand under those limits."""
    tiers = {tier.tier: tier for tier in publication.tiers}
    return load_of(demand, publication.pools[0], tiers, dict.fromkeys(tiers, SLO))
