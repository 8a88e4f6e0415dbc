"""How a mixed fleet fares by its routing, simulated, and what a choice costs beside what a charge costs.

``python -m tests.bench.routing`` prints both within two minutes. ``for chat`` is the routing of a gateway that is not
told of which kind each replica is, and weighs them for one mix.
"""

from __future__ import annotations

from timeit import repeat

import msgspec
from rich.console import Console
from rich.table import Table

from serving.capacity import ReplicaGroup, RequestShape, Slo, WorkloadMix, fleet_cost_s
from serving.mixes import load_mix
from serving.profile import load_profile
from serving.routing import Alike, Load, Router
from tests.support.routed import Named, Routed, RoutedFleet

GPUS = ("h100", "h200", "gb200")
SLO = Slo(1.0, 0.05)
REQUESTS = 16_000
#: A quarter and half as long as the shipped mixes, so that 16,000 requests are many lifetimes.
DECODES, PREFILLS = load_mix("decode-heavy", 0.25), load_mix("prefill-heavy", 0.5)
CHAT = load_mix("chat")
_CHOICES = 5_000


def kinds() -> dict[str, ReplicaGroup]:
    """One replica of each GPU type, by its shipped profile."""
    profiles = {gpu: load_profile(f"{gpu}-llama-3.1-8b") for gpu in GPUS}
    return {gpu: ReplicaGroup(1, profile.step_time, profile.limits, SLO) for gpu, profile in profiles.items()}


def mixes() -> dict[str, WorkloadMix]:
    """The mixes that are sent, one at a time."""
    thirds = [mix.shapes * (1_000 // len(mix.shapes)) for mix in (CHAT, DECODES, PREFILLS)]
    mixed = WorkloadMix("a third of each", tuple(shape for third in thirds for shape in third))
    return {"chat": CHAT, "decode-heavy": DECODES, "prefill-heavy": PREFILLS, mixed.name: mixed}


def simulated(console: Console) -> None:
    """Print every case, by both ways of routing."""
    table = Table("mix", "Σ λ × cost", "slower", "routed", *GPUS, "TTFT p95, s", "TPOT p95, ms", "in time")
    cases: list[tuple[str, float, dict[str, float]]] = [
        (name, utilization, {}) for name in mixes() for utilization in (0.5, 0.8, 0.95, 1.0)
    ]
    cases += [(name, 0.85, {gpu: 1.25}) for name in ("chat", "a third of each") for gpu in ("h200", "gb200")]
    cases += [("chat", 0.6, {"gb200": 2}), ("chat", 0.4, {"gb200": 4}), ("chat", 0.35, {"gb200": 10})]
    cases += [("chat", 0.55, {"h100": 10}), ("decode-heavy", 0.4, {"gb200": 4}), ("decode-heavy", 0.35, {"gb200": 10})]
    for name, utilization, slower in cases:
        for weighed_for in (CHAT, None):
            fleet = RoutedFleet(kinds(), mixes()[name].shapes, weighed_for, slower)
            row = _row(fleet.run(utilization, REQUESTS))
            told = " ".join(f"{gpu} x{factor:g}" for gpu, factor in slower.items())
            table.add_row(name, f"{utilization:g}", told, "for chat" if weighed_for else "by shape", *row)
    console.print(table)


def _row(found: Routed) -> list[str]:
    loads = [f"{load:.3f}" for load in found.loads.values()]
    return [*loads, f"{found.p95_ttft_s:.3f}", f"{found.p95_tpot_s * 1e3:.1f}", f"{found.in_time:.2%}"]


def choice_cost(console: Console) -> None:
    """Print what a choice among four kinds takes beside the cost of a request on them, and a choice among equals."""
    found = [
        msgspec.structs.replace(kind, slo=Slo(1.0, 0.05 + n / 1e3)) for n, kind in enumerate([*kinds().values()] * 2)
    ][:4]
    four = [Alike("pool", kind, [Named(f"{n} {i}", 1.0) for i in range(4)]) for n, kind in enumerate(found)]
    one = [Alike("pool", None, [replica for alike in four for replica in alike.replicas])]
    shape = RequestShape(800, 200)
    load, router = Load(shape, 1, 1.0), Router(0.0, lambda: 1)
    timed = {
        "choice by shape, 4 kinds of 4 replicas": lambda: router.choose(four, load),
        "choice among 16 equals": lambda: router.choose(one, load),
        "cost of a request on 4 kinds": lambda: fleet_cost_s(found, shape),
    }
    for what, call in timed.items():
        console.print(f"{what}: {min(repeat(call, number=_CHOICES, repeat=5)) / _CHOICES * 1e6:.1f} µs")


if __name__ == "__main__":
    console = Console(width=140)
    choice_cost(console)
    simulated(console)
