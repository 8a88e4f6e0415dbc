"""A finished measurement: the profile, and what it stands on. Pure.

A profile is made only of runs that are fit for it. What is missing is refused by name, with what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from serving.capacity import EngineLimits, Slo, WorkloadMix
from serving.enginefacts import EngineFacts
from serving.fit import FitResult, fit_profile
from serving.identify import Identifiability, identifiability, measured_rows
from serving.measured_knees import KneeReport, PointReport, is_fitted, knee_report, point_report
from serving.points import MeasuredPoint
from serving.profile import Profile, Provenance
from serving.records import Record
from serving.steady_points import steady_points

#: A model that misses a point by more than this says so in its provenance.
WELL_FITTED = 0.10


class MeasureError(RuntimeError):
    """Nothing can be measured, or the runs make no profile; the message says which, and what to do."""


class Target(NamedTuple):
    """What a profile holds besides what the runs say: its name, the SLO searched under, a date, tokens, free words."""

    name: str
    slo: Slo
    date: str
    tokens_per_byte: float
    notes: str = ""


class Measurement(msgspec.Struct, frozen=True):
    """The profile, the knee of each mix, every run with its intervals, and how well they tell coefficients apart."""

    profile: Profile
    slo: Slo
    knees: tuple[KneeReport, ...]
    points: tuple[PointReport, ...]
    condition: float
    distinctness: dict[str, float]
    sources: tuple[str, ...]


def assemble(
    target: Target,
    facts: EngineFacts,
    limits: EngineLimits,
    mixes: Sequence[WorkloadMix],
    records: Sequence[Record],
    seed: int,
) -> Measurement:
    """The measurement that these runs of these mixes make. Raises ``MeasureError`` and ``FitError``."""
    slo = target.slo
    names = [mix.name for mix in mixes]
    fitted = fitted_points(names, records)
    clear = identifiability(measured_rows(fitted))
    if clear.problem:
        raise MeasureError(f"no profile is written: {clear.problem}")
    fit = fit_profile(fitted)
    if fit.provenance != "measured":
        raise MeasureError(
            f"no profile is written: {fit.reason}; raise --point-s and --most-point-s, and measure again"
        )
    knees = tuple(knee_report(records, name, slo, seed) for name in names)
    return Measurement(
        profile=_profile(target, facts, limits, fit, knees),
        slo=slo,
        knees=knees,
        points=tuple(point_report(record, slo, seed) for record in records),
        condition=clear.condition,
        distinctness=_named(clear),
        sources=(*facts.sources, *facts.extras),
    )


def fitted_points(mixes: Sequence[str], records: Sequence[Record]) -> list[MeasuredPoint]:
    """The points that a fit may use. Raises ``MeasureError`` where a mix has none of a kind that it needs."""
    for mix in mixes:
        for kind, what in (("anchor", "run alone"), ("open", "open-loop run")):
            runs = [record for record in records if (record.kind, record.mix) == (kind, mix)]
            if not any(record.run.state == "steady" for record in runs):
                states = ", ".join(f"{r.level:.3g}: {r.run.state}, {r.run.why}" for r in runs) or "none was made"
                raise MeasureError(
                    f"no profile is written: {mix} has no steady {what} ({states}); raise --point-s and "
                    "--most-point-s, see that nobody else uses the engine, and measure again"
                )
    points = [record.run.point for record in records if is_fitted(record)]
    signs = [f"{sign.point.mix}: {sign.reason}" for sign in steady_points(points)[1]]
    if signs:
        raise MeasureError(
            f"no profile is written: runs that looked steady are not ({'; '.join(signs)}); raise --most-point-s"
        )
    return points


def _named(clear: Identifiability) -> dict[str, float]:
    names = ("base_s", "prompt_token_s", "sequence_s", "kv_token_s")
    return {name: round(share, 4) for name, share in zip(names, clear.distinctness, strict=True)}


def _profile(
    target: Target, facts: EngineFacts, limits: EngineLimits, fit: FitResult, knees: Sequence[KneeReport]
) -> Profile:
    provenance = Provenance(
        kind="measured",
        date=target.date,
        engine="vLLM",
        engine_version=facts.engine_version,
        dtype=facts.dtype,
        parallelism=facts.parallelism,
        source=_source(target, facts, fit, knees),
    )
    return Profile(
        name=target.name,
        model=facts.model,
        gpu=facts.gpu,
        gpus_per_replica=facts.gpus,
        step_time=fit.model,
        limits=limits,
        provenance=provenance,
        fit=fit.fit,
        tokens_per_byte=round(target.tokens_per_byte, 3),
        surface=fit.surface,
    )


def _source(target: Target, facts: EngineFacts, fit: FitResult, knees: Sequence[KneeReport]) -> str:
    slo = target.slo
    worst = fit.linear_miss
    steady = f"{len(fit.steady)} steady points (anchors at concurrency 1, Poisson rates)"
    parts = [
        f"penstock measure: {steady}, mixes {', '.join(knee.mix for knee in knees)}",
        f"knees under p{slo.percentile:g} TTFT {slo.ttft_s * 1e3:g} ms and TPOT {slo.tpot_s * 1e3:g} ms: "
        + ", ".join(knee_text(knee) for knee in knees),
        f"the linear model misses a point by {worst:.0%}" if worst > WELL_FITTED else "",
        *facts.sources,
        *facts.extras,
        f"operator's note: {target.notes}" if target.notes else "",
    ]
    return "; ".join(filter(None, parts))


def knee_text(knee: KneeReport) -> str:
    """A knee in a few words, with the interval of where the bound is crossed."""
    if knee.requests_per_s is None:
        return f"{knee.mix} {knee.reason}"
    crossing = knee.crossing_per_s
    sure = f" (bound crossed at {crossing.low:.3g}-{crossing.high:.3g}/s, 95 %)" if crossing and crossing.low else ""
    return f"{knee.mix} {knee.requests_per_s:.3g}/s{sure}{', ' + knee.reason if knee.reason else ''}"
