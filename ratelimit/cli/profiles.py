"""``penstock profiles``: what the profiles say, how that is known, and how GPUs compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from ratelimit.cli import profileviews as views
from ratelimit.cli.common import JsonOption, failing_clearly, stderr
from serving.capacity import RequestShape, Slo, WorkloadMix
from serving.comparison import Compared, compare, curve_of
from serving.curves import SKETCH_REQUESTS, SKETCH_SHARES, CurvePoint
from serving.fit import FitError
from serving.mixes import MIX_NAMES, UnknownMixError, load_mix
from serving.plausible import contradictions, unchecked
from serving.plotstyle import PlotError
from serving.profile import Profile, ProfileError, load_profile, shipped_profiles
from serving.profileplot import Drawn, draw_comparison, draw_profile

app = typer.Typer(help="What replicas can do: the shipped profiles and your own.", no_args_is_help=True)

PlotOption = Annotated[Path | None, typer.Option(help="Also draw throughput against TPOT into this file (.png, .svg).")]
_WHOLE_CURVE = Slo(ttft_s=10.0, tpot_s=0.1, percentile=50.0)


@app.command("list")
def list_profiles(
    profile: Annotated[list[str] | None, typer.Argument(help="Names or files; every shipped one if unset.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List profiles with their provenance, coefficients and fit error."""
    with failing_clearly(ProfileError):
        found = [_load(name) for name in profile or shipped_profiles()]
    if as_json:
        typer.echo(msgspec.json.encode([views.summary(one) for one in found]).decode())
        return
    _wide_console().print(views.profile_table(found))
    _say_marked(any(one.provenance.kind == "estimated" for one in found))


@app.command()
def show(
    profile: Annotated[str, typer.Argument(help="A shipped profile's name, or a file.")],
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Show everything that a profile says: coefficients, limits, sources, points and residuals."""
    with failing_clearly(ProfileError, FitError):
        found = _load(profile)
        if as_json:
            typer.echo(msgspec.json.encode(found).decode())
        else:
            views.print_profile(_wide_console(), found, unchecked(found))
    if plot is not None:
        with failing_clearly(PlotError, OSError):
            _draw_profile(found, plot)
        stderr.print(f"drawn: {plot}", markup=False, soft_wrap=True)


@app.command("compare")
def compare_profiles(
    profile: Annotated[list[str], typer.Argument(help="Names or files; ratios are to the first.")],
    mix: Annotated[str, typer.Option(help=f"The workload: {', '.join(MIX_NAMES)}.")] = "chat",
    ttft_ms: Annotated[float, typer.Option(min=1, help="Bound of the time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(min=1, help="Bound of the time per output token.")] = 50.0,
    percentile: Annotated[float, typer.Option(min=50, max=99.9, help="Share of requests that meet both, in %.")] = 95.0,
    extrapolate: Annotated[bool, typer.Option(help="Also where a profile was not measured; the row says so.")] = False,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Compare profiles at their knees: requests and tokens a second by replica, GPU and watt."""
    slo = Slo(ttft_ms / 1e3, tpot_ms / 1e3, percentile)
    with failing_clearly(ProfileError, UnknownMixError):
        found = [_load(name) for name in profile]
        workload = load_mix(mix)
        rows = compare(found, workload, slo, extrapolate=extrapolate)
    if as_json:
        typer.echo(msgspec.json.encode({"mix": mix, "slo": slo, "profiles": rows}).decode())
    else:
        _wide_console().print(views.comparison_table(rows, workload, slo))
        for row in rows:
            if row.note:
                stderr.print(f"{row.name}: {row.note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        _say_marked(any(row.estimated for row in rows))
    if plot is not None:
        with failing_clearly(PlotError, OSError):
            _draw_comparison(found, rows, workload, slo, plot)
        stderr.print(f"drawn: {plot}", markup=False, soft_wrap=True)


def _load(name: str) -> Profile:
    """The profile, refused where it contradicts itself or the data sheets. Raises ``ProfileError``."""
    profile = load_profile(name)
    problems = contradictions(profile)
    if problems:
        raise ProfileError("\n".join(f"profile {profile.name!r}: {problem}" for problem in problems))
    return profile


def _wide_console() -> Console:
    """Standard output as it is, or, where nobody looks on, wide enough that a pipe gets whole cells."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _say_marked(any_estimated: bool) -> None:
    if any_estimated:
        stderr.print(views.ESTIMATED_NOTE, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _draw_comparison(
    profiles: Sequence[Profile], rows: Sequence[Compared], mix: WorkloadMix, slo: Slo, path: Path
) -> None:
    one_model = len({profile.model for profile in profiles}) == 1
    one_each = len({profile.gpu for profile in profiles}) == len(profiles)
    curves = [
        Drawn(
            label=_gpu_text(profile) if one_model and one_each else profile.name,
            gpu=profile.gpu,
            gpus=profile.gpus_per_replica,
            estimated=row.estimated,
            points=curve_of(profile, mix, slo),
            knee_tokens_per_s=row.per_gpu.output_tokens_per_s if row.per_gpu else None,
        )
        for profile, row in zip(profiles, rows, strict=True)
    ]
    headline = f"{profiles[0].model}: throughput against latency" if one_model else "Throughput against latency"
    draw_comparison(curves, headline, mix, slo, path)


def _gpu_text(profile: Profile) -> str:
    count = f"{profile.gpus_per_replica} × " if profile.gpus_per_replica > 1 else ""
    return f"{count}{profile.gpu} {profile.provenance.dtype}"


def _draw_profile(profile: Profile, path: Path) -> None:
    estimated = profile.provenance.kind == "estimated"
    measured = _measured_mixes(profile)
    curves = [
        Drawn(mix.name, profile.gpu, profile.gpus_per_replica, estimated, _sketch(profile, mix), seen=s)
        for mix, s in (measured or [(load_mix(name), ()) for name in MIX_NAMES])
    ]
    how = "estimated, not measured" if estimated else profile.provenance.kind
    caption = (
        f"{profile.provenance.engine} {profile.provenance.engine_version}, {profile.provenance.dtype}, "
        f"{profile.provenance.date}: {how}. Curves are simulated from the step-time model."
    )
    if measured and profile.provenance.kind != "measured":
        caption += " Most published runs are bursts sent at once: their TPOT is of no steady state."
    headline = f"{profile.name}: throughput against latency"
    seen = "measured" if profile.provenance.kind == "measured" else "published run"
    draw_profile(curves, headline, caption, _WHOLE_CURVE.percentile, seen, path)


def _sketch(profile: Profile, mix: WorkloadMix) -> tuple[CurvePoint, ...]:
    return curve_of(profile, mix, _WHOLE_CURVE, SKETCH_SHARES, SKETCH_REQUESTS)


def _measured_mixes(profile: Profile) -> list[tuple[WorkloadMix, tuple[tuple[float, float], ...]]]:
    """The mean request of each measured mix, and its points as (p50 TPOT, output tokens/s per GPU)."""
    points = [point for point in (profile.fit.points if profile.fit else ()) if point.requests and point.tpot_p50_s]
    mixes = []
    for name in dict.fromkeys(point.mix for point in points):
        own = [point for point in points if point.mix == name]
        requests = sum(point.requests for point in own)
        shape = RequestShape(
            max(1, round(sum(point.input_tokens for point in own) / requests)),
            max(1, round(sum(point.output_tokens for point in own) / requests)),
        )
        seen = [(p.tpot_p50_s or 0.0, p.output_tokens / p.duration_s / profile.gpus_per_replica) for p in own]
        mixes.append((WorkloadMix(name, (shape,)), tuple(seen)))
    return mixes
