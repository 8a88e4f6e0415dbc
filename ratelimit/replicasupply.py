"""What the replicas of each GPU type are to their pool, and what one more would be: what autoscaling needs. Pure.

One more replica of a GPU type adds its knee's requests/s of the pool's mix × the pool's trim to what is usable, while
the failure domains that are kept spare stay the same. Where the replicas of one type are not alike, it adds their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ratelimit.groupsupply import GroupSupply
from ratelimit.inputs import Inputs
from ratelimit.policy import Promise, promises_of
from serving.fleet import ReplicaSpec

#: Requests/s of one such replica under a promise; ``None`` where it is not known yet, or no load meets the promise.
RateOf = Callable[[ReplicaSpec, Promise], float | None]


class GpuSupply(msgspec.Struct, frozen=True):
    """The replicas of one GPU type that count in a pool, and the requests/s of its mix that one more adds."""

    model: str
    gpu: str
    replicas: int
    adds_requests_per_s: float


def gpu_supplies(inputs: Inputs, rate_of: RateOf) -> list[GpuSupply]:
    """Every GPU type of every pool: those that count, and those that are known of though no replica counts now."""
    found: list[GpuSupply] = []
    for pool in inputs.policy.pools:
        own = promises_of(inputs.policy.tiers, pool)[0]
        trim = inputs.trims[pool.model].factor if pool.model in inputs.trims else 1.0
        counting = _counting(inputs.supplies.get(pool.model, ()), own)
        absent = _absent([spec for spec in inputs.specs if spec.model == pool.model and spec.gpu not in counting])
        found += [
            GpuSupply(pool.model, gpu, count, of_all / count * trim)
            for gpu, (count, of_all) in sorted(counting.items())
        ]
        for gpu, specs in sorted(absent.items()):
            rates = [rate for spec in specs if (rate := rate_of(spec, own)) is not None]
            if rates:
                found.append(GpuSupply(pool.model, gpu, 0, sum(rates) / len(rates) * trim))
    return found


def _counting(groups: Sequence[GroupSupply], own: Promise) -> dict[str, tuple[int, float]]:
    """By GPU type: how many replicas take requests, and their requests/s."""
    found: dict[str, tuple[int, float]] = {}
    for group in groups:
        worth = group.worth.get(own)
        if worth is not None:
            count, of_all = found.get(group.gpu, (0, 0.0))
            found[group.gpu] = count + group.group.count, of_all + float(worth.of_all)
    return found


def _absent(specs: Sequence[ReplicaSpec]) -> dict[str, list[ReplicaSpec]]:
    """One replica of each kind, by GPU type."""
    kinds = {(spec.gpu, spec.profile, spec.slowdown): spec for spec in specs}
    found: dict[str, list[ReplicaSpec]] = {}
    for spec in kinds.values():
        found.setdefault(spec.gpu, []).append(spec)
    return found
