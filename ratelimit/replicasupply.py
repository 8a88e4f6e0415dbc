"""What the replicas of each GPU type are to their pool, and what one more would be: what autoscaling needs. Pure.

One more replica of a GPU type adds its knee's requests/s of the pool's mix × the pool's trim to what is usable, while
the failure domains that are kept spare stay the same. Where the replicas of one type are not alike, it adds their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from ratelimit.decided import Adopted
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


def possible_specs(adopted: Adopted) -> list[ReplicaSpec]:
    """A replica of each kind that a config lets be discovered, at no address: there may be none of it yet."""
    return [
        ReplicaSpec("any", each.model, adopted.profiles[profile].gpu, profile, each.slowdown)
        for each in adopted.discover
        for profile in each.profiles.values()
    ]


def gpu_supplies(inputs: Inputs, rate_of: RateOf, possible: Iterable[ReplicaSpec] = ()) -> list[GpuSupply]:
    """Every GPU type of every pool: those that count, and those that are known of, or ``possible``, and none counts."""
    known = {(spec.model, spec.gpu, spec.profile, spec.slowdown): spec for spec in (*possible, *inputs.specs)}
    found: list[GpuSupply] = []
    for pool in inputs.policy.pools:
        own = promises_of(inputs.policy.tiers, pool)[0]
        trim = inputs.trims[pool.model].factor if pool.model in inputs.trims else 1.0
        counting = _counting(inputs.supplies.get(pool.model, ()), own)
        absent = [spec for spec in known.values() if spec.model == pool.model and spec.gpu not in counting]
        found += [
            GpuSupply(pool.model, gpu, count, of_all / count * trim)
            for gpu, (count, of_all) in sorted(counting.items())
        ]
        for gpu in sorted({spec.gpu for spec in absent}):
            rates = [rate for spec in absent if spec.gpu == gpu and (rate := rate_of(spec, own)) is not None]
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
