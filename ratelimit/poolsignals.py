"""What the replicas of a pool did in a window, as shares of its measured supply. Pure.

Work is counted in requests of the pool's mix: a replica's requests, each as big as its mean one of the window, over
the mean request of the mix, by the replica-seconds that they need there. Only replicas that were seen count, on both
sides, so a replica whose metrics are lost changes nothing while enough others are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import NamedTuple

from ratelimit.feedback import LateShare, Signals
from ratelimit.groupsupply import GroupSupply
from ratelimit.policy import Promise
from serving.capacity import InfeasibleSloError, ReplicaGroup, RequestShape, Slo, WorkloadMix, replica_seconds
from serving.signals import Activity

#: The share of the supply whose replicas must have been seen for the pool to be judged.
LEAST_SEEN_SHARE = 0.5


class _Seen(NamedTuple):
    """One replica of a group: what it did, its supply and the bounds it is held to."""

    activity: Activity
    requests_per_s: float
    ratio: float
    slo: Slo


def pool_signals(own: Promise, groups: Sequence[GroupSupply], activities: Mapping[str, Activity]) -> Signals | None:
    """The pool's window; None where too little of it was seen. ``own`` is the pool's promise, as in ``supplies``.

    Each replica is held to its own bounds. Those of the pool are their means, weighted by supply: a slow replica that
    carries little does not make the pool patient.
    """
    able = [group for group in groups if own in group.rates]
    supply = fsum(float(group.rates[own]) * group.group.count for group in able)
    seen = [each for group in able for each in _seen(own, group, activities)]
    supply_seen = fsum(each.requests_per_s for each in seen)
    if not supply_seen or supply_seen < LEAST_SEEN_SHARE * supply:
        return None
    started_per_s = fsum(each.activity.started / each.activity.duration_s for each in seen)
    duration_s = fsum(each.activity.duration_s for each in seen) / len(seen)
    waiting = fsum(each.activity.waiting for each in seen)
    return Signals(
        duration_s=duration_s,
        offered=_work_per_s(seen, [each.activity.arrivals for each in seen]) / supply_seen,
        served=_work_per_s(seen, [each.activity.started for each in seen]) / supply_seen,
        arrivals=fsum(each.activity.arrivals for each in seen),
        ttft=LateShare(
            "TTFT",
            fsum(each.slo.ttft_s * each.requests_per_s for each in seen) / supply_seen,
            fsum(each.activity.ttft.total for each in seen),
            fsum(each.activity.ttft.beyond(each.slo.ttft_s) for each in seen),
        ),
        tpot=LateShare(
            "TPOT",
            fsum(each.slo.tpot_s * each.requests_per_s for each in seen) / supply_seen,
            fsum(each.activity.tpot.total for each in seen),
            fsum(each.activity.tpot.beyond(each.slo.tpot_s) for each in seen),
        ),
        may_be_late=max(1 - each.slo.percentile / 100 for each in seen),
        waiting_s=waiting / max(started_per_s, 1 / duration_s),
        refused=fsum(each.activity.refused for each in seen),
    )


def _work_per_s(seen: Iterable[_Seen], requests: Iterable[float]) -> float:
    pairs = zip(seen, requests, strict=True)
    return fsum(count / each.activity.duration_s * each.ratio for each, count in pairs)


def _seen(own: Promise, group: GroupSupply, activities: Mapping[str, Activity]) -> list[_Seen]:
    slo = _loosest(promise.slo for promise in group.knees).slowed(group.slowdown)
    rate = float(group.rates[own])
    found = [activities[replica.url] for replica in group.replicas if replica.url in activities]
    return [_Seen(activity, rate, _ratio(group.group, own.mix, activity), slo) for activity in found]


def _loosest(slos: Iterable[Slo]) -> Slo:
    """What every request is held to: replicas do not tell the requests of one promise from those of another."""
    known = list(slos)
    return Slo(max(slo.ttft_s for slo in known), max(slo.tpot_s for slo in known), min(slo.percentile for slo in known))


def _ratio(group: ReplicaGroup, mix: WorkloadMix, activity: Activity) -> float:
    """How many requests of the mix one of the window's is; 1 while nothing is known of their lengths.

    Both are taken at their mean lengths: the error of that is much the same, and cancels.
    """
    if activity.mean_prompt_tokens < 1 or activity.mean_output_tokens < 1:
        return 1.0
    usual = _shape(
        fsum(shape.input_tokens for shape in mix.shapes) / len(mix.shapes),
        fsum(shape.cached_tokens for shape in mix.shapes) / len(mix.shapes),
        mix.mean_output_tokens,
    )
    seen = _shape(activity.mean_prompt_tokens, activity.mean_cached_tokens, activity.mean_output_tokens)
    try:
        return replica_seconds(group, seen) / replica_seconds(group, usual)
    except InfeasibleSloError:
        return 1.0


def _shape(input_tokens: float, cached_tokens: float, output_tokens: float) -> RequestShape:
    inputs = max(1, round(input_tokens))
    return RequestShape(inputs, max(1, round(output_tokens)), min(round(cached_tokens), inputs - 1))
