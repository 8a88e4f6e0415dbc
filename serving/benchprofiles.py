"""Profiles of the published benchmark runs: those groups whose fit predicts a mix that it has not seen. Pure.

A group is shipped where GPU and model are known (``serving.gpus``), its runs are of at least four mixes, and its
leave-one-mix-out error is at most ``MOST_ERROR`` in the median; of the groups of one model on one GPU type, the one
that predicts best. What the fit calls measured is ``published`` here, for it was not measured by us.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import floor

import msgspec

from serving.benchgroups import context_of, groups_of, server_roofline
from serving.benchrows import BenchRow, ServedAs, points_of
from serving.capacity import EngineLimits, StepTimeModel
from serving.fit import LEAST_MIXES, FitResult, fit_profile
from serving.gpus import GpuFacts, ModelFacts
from serving.profile import Profile, Provenance, ProvenanceKind
from serving.published import run_text
from serving.roofline import Roofline
from serving.surface import Surface, SurfacePoint

#: Of the token rate, at a mix that was left out of the fit.
MOST_ERROR = 0.15
#: The engine that Penstock runs, by its name in the data and by its own.
ENGINE, ENGINE_NAME = "vllm", "vLLM"
#: When the runs were fitted. They were published without a date of their own.
FITTED_ON = "2026-11-21"

_VERSION = re.compile(r"vLLM: v?([\w.]+)")


class Served(msgspec.Struct, frozen=True):
    """One group of runs, with the facts that it can be fitted within."""

    served: ServedAs
    rows: tuple[BenchRow, ...]
    gpu: GpuFacts
    gpus: int
    model: ModelFacts
    dtype: str
    roofline: Roofline
    max_model_len: int


def bench_profiles(lines: Iterable[str]) -> list[Profile]:
    """The profiles worth shipping of a benchmark file, by name. Raises ``BenchFileError`` and ``FitError``."""
    best: dict[str, Profile] = {}
    for group in known_groups(lines):
        profile = group_profile(group)
        if profile is None:
            continue
        rival = best.get(profile.name)
        if rival is None or _error(profile) < _error(rival):
            best[profile.name] = profile
    return [best[name] for name in sorted(best)]


def known_groups(lines: Iterable[str]) -> list[Served]:
    """The groups of this engine whose GPU and model are known, without the rows that contradict themselves."""
    found = []
    for served, rows, _, facts in groups_of(lines):
        if served.engine == ENGINE and facts.gpu is not None and facts.model is not None:
            roofline = server_roofline(served, facts)
            context = context_of(served, facts) or facts.model.max_model_len
            found.append(Served(served, rows, facts.gpu, facts.gpus, facts.model, facts.dtype, roofline, context))
    return found


def group_profile(group: Served) -> Profile | None:
    """The group's profile, or None where its fit does not predict well enough to be shipped. Raises ``FitError``."""
    points = points_of(group.rows)
    if len({point.mix for point in points}) < LEAST_MIXES:
        return None
    result = fit_profile(points, group.roofline)
    if result.fit.loo_error_median is None or result.fit.loo_error_median > MOST_ERROR:
        return None
    return Profile(
        name=f"{group.gpu.name.lower()}-{group.model.name}",
        model=group.model.name,
        gpu=group.gpu.name,
        gpus_per_replica=group.gpus,
        step_time=StepTimeModel(*(rounded(getattr(result.model, name)) for name in StepTimeModel.__struct_fields__)),
        limits=_limits(group),
        provenance=_provenance(group, result),
        fit=result.fit,
        surface=_rounded_surface(result),
    )


def rounded(value: float) -> float:
    """To five significant digits, so that the files do not differ by a platform's last bit."""
    return float(f"{value:.4e}")


def _rounded_surface(result: FitResult) -> Surface | None:
    if result.surface is None:
        return None
    return Surface(
        tuple(
            SurfacePoint(*(rounded(getattr(point, name)) for name in SurfacePoint.__struct_fields__))
            for point in result.surface.points
        ),
        rounded(result.surface.prompt_context_s),
    )


def _error(profile: Profile) -> float:
    return profile.fit.loo_error_median if profile.fit and profile.fit.loo_error_median is not None else float("inf")


def _limits(group: Served) -> EngineLimits:
    batch = group.roofline.batch
    return EngineLimits(
        max_num_seqs=floor(batch.max_num_seqs),
        max_num_batched_tokens=floor(batch.max_num_batched_tokens),
        kv_tokens=floor(batch.kv_tokens),
        max_model_len=group.max_model_len,
    )


def _provenance(group: Served, result: FitResult) -> Provenance:
    version = _VERSION.search(group.rows[0].text["engine_versions"])
    how: ProvenanceKind = "published" if result.provenance == "measured" else "estimated"
    return Provenance(
        kind=how,
        date=FITTED_ON,
        engine=ENGINE_NAME,
        engine_version=version.group(1) if version else "unknown",
        dtype=group.dtype,
        parallelism=f"tp{group.gpus}",
        source=(
            f"Not measured by us: fitted to {len(group.rows)} published runs of `{group.served.serve_command}`; "
            f"{result.reason}. KV tokens and batch limits are what the data sheets and vLLM's defaults give."
        ),
        anchors=tuple(run_text(row) for row in group.rows),
    )
