"""Profiles side by side: what one replica, one GPU and one watt of each give of a mix under an SLO. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from serving.capacity import InfeasibleSloError, Slo, WorkloadMix
from serving.curves import (
    LOAD_SHARES,
    CurvePoint,
    Throughput,
    throughput_curve,
    throughput_of,
)
from serving.gpus import find_gpu
from serving.operating import extrapolation_note, operating_point, step_time_around
from serving.profile import OutOfRangeError, Profile


class Compared(msgspec.Struct, frozen=True):
    """One profile at its knee. Rates are None where the SLO is infeasible, and ``note`` says why.

    ``per_joule`` are requests and tokens per joule of the GPUs alone at their rated power, None for a GPU without a
    known rating. ``ratio`` is its rate per GPU over that of the first profile compared.
    """

    name: str
    gpu: str
    gpus_per_replica: int
    estimated: bool
    provenance: str
    per_replica: Throughput | None = None
    per_gpu: Throughput | None = None
    per_joule: Throughput | None = None
    ratio: float | None = None
    note: str = ""


def compare(
    profiles: Sequence[Profile], mix: WorkloadMix, slo: Slo, *, extrapolate: bool = False
) -> tuple[Compared, ...]:
    """Each profile at its knee, in the order given.

    Raises ``OutOfRangeError`` where a profile was not measured at the mix's context, unless to ``extrapolate`` is
    asked for; then its ``note`` says so.
    """
    found = [_at_knee(profile, mix, slo, extrapolate) for profile in profiles]
    first = found[0].per_gpu if found else None
    if first is None:
        return tuple(found)
    return tuple(
        msgspec.structs.replace(one, ratio=one.per_gpu.requests_per_s / first.requests_per_s) if one.per_gpu else one
        for one in found
    )


def curve_of(
    profile: Profile,
    mix: WorkloadMix,
    slo: Slo,
    shares: Sequence[float] = LOAD_SHARES,
    requests: int | None = None,
) -> tuple[CurvePoint, ...]:
    """The profile's throughput against TPOT, extrapolated where need be; empty where no load meets the SLO."""
    try:
        step_time = step_time_around(profile, mix, slo)
        return throughput_curve(step_time, profile.limits, mix, slo, shares, requests)
    except ValueError:
        return ()


def _at_knee(profile: Profile, mix: WorkloadMix, slo: Slo, extrapolate: bool) -> Compared:
    bare = Compared(
        name=profile.name,
        gpu=profile.gpu,
        gpus_per_replica=profile.gpus_per_replica,
        estimated=profile.provenance.kind == "estimated",
        provenance=profile.provenance.kind,
    )
    note = extrapolation_note(profile, mix)
    if note and not extrapolate:
        raise OutOfRangeError(f"profile {profile.name!r}: {mix.name}: {note}; extrapolate on request only")
    try:
        replica = throughput_of(mix, operating_point(profile, mix, slo).knee.requests_per_s)
    except InfeasibleSloError as error:
        return msgspec.structs.replace(bare, note=f"infeasible: {error}")
    facts = find_gpu(profile.gpu)
    return msgspec.structs.replace(
        bare,
        per_replica=replica,
        per_gpu=replica.over(profile.gpus_per_replica),
        per_joule=replica.over(profile.gpus_per_replica * facts.power_w) if facts else None,
        note=note,
    )
