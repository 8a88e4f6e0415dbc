"""``penstock measure``: what a live endpoint can do under an SLO, as a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
import uvloop
from rich.box import SIMPLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ratelimit.cli.common import JsonOption, failing_clearly, stderr
from serving.capacity import Slo
from serving.endpoint import EndpointError
from serving.enginefacts import FactsError, Stated
from serving.fit import FitError
from serving.intervals import Interval
from serving.journal import JournalError
from serving.measure import MeasureSettings, MeasureTarget, Watcher, expected_left_s, most_runs, slow_lives_s
from serving.measure import Progress as SweepProgress
from serving.measure import measure as measure_endpoint
from serving.measurement import MeasureError, Measurement, knee_text
from serving.mixes import MIX_NAMES
from serving.profile import dump_profile
from serving.run_verdict import PointSettings

_STATED = "only where the engine does not tell, recorded as stated by you"
_POINT, _SETTINGS = PointSettings(), MeasureSettings(Slo(1.0, 0.05))


def measure(
    url: Annotated[str, typer.Argument(help="The vLLM server, such as http://127.0.0.1:8000, serving nobody else.")],
    out: Annotated[Path, typer.Option(help="Where to write the profile; the journal is kept beside it.")],
    ttft_ms: Annotated[float, typer.Option(help="The SLO's bound on time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="The SLO's bound on time per output token.")] = 50.0,
    percentile: Annotated[float, typer.Option(help="The percent of requests that must meet each bound.")] = 95.0,
    name: Annotated[str | None, typer.Option(help="The profile's name; the file's if unset.")] = None,
    model: Annotated[str | None, typer.Option(help="The served model; the first one if unset.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="PENSTOCK_MEASURE_API_KEY", help="The server's key.")] = None,
    gpu: Annotated[str | None, typer.Option(help=f"GPU type, such as H100: {_STATED}.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help=f"GPUs of one replica: {_STATED}.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Weight precision: {_STATED}.")] = None,
    parallelism: Annotated[str | None, typer.Option(help=f"Such as tp4: {_STATED}.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help=f"The server's: {_STATED}.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help=f"The server's: {_STATED}.")] = None,
    notes: Annotated[str, typer.Option(help="What else is worth knowing, for the provenance.")] = "",
    warm_up_s: Annotated[float, typer.Option(help="Seconds before a point is watched, at least.")] = _POINT.warm_up_s,
    point_s: Annotated[float, typer.Option(help="Seconds that a point is watched, at least.")] = _POINT.watch_s,
    most_point_s: Annotated[
        float, typer.Option(help="Seconds that a point takes at most, from its start to its last answer.")
    ] = _POINT.most_s,
    point_requests: Annotated[
        int, typer.Option(min=10, help="Requests that an open-loop point watches, at least.")
    ] = _POINT.least_requests,
    search_points: Annotated[
        int, typer.Option(min=1, help="Rates tried for a mix, at most.")
    ] = _SETTINGS.search_points,
    tolerance: Annotated[float, typer.Option(help="A knee is searched to within this share.")] = _SETTINGS.tolerance,
    lag_ms: Annotated[float, typer.Option(help="How late the client may send, at p99.")] = _POINT.lag_bound_s * 1e3,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Find the largest Poisson load that meets the SLO, for each of four mixes, and write the engine's profile.

    Goes on where an interrupted measurement with the same settings stopped.
    """
    with failing_clearly(ValueError):
        slo = Slo(ttft_ms / 1e3, tpot_ms / 1e3, percentile)
    settings = MeasureSettings(
        slo=slo,
        point=PointSettings(warm_up_s, point_s, most_point_s, point_requests, lag_ms / 1e3),
        search_points=search_points,
        tolerance=tolerance,
        seed=seed,
    )
    stated = Stated(gpu, gpus, dtype, parallelism, max_num_seqs, max_num_batched_tokens)
    target = MeasureTarget(url.rstrip("/"), name or out.stem, settings, stated, model, api_key, notes)
    with failing_clearly(MeasureError, EndpointError, FactsError, FitError, JournalError, OSError):
        _check_out(out)
        found = uvloop.run(_measured(target, out))
    _show(found, out)
    if as_json:
        typer.echo(msgspec.json.encode(found))


async def _measured(target: MeasureTarget, out: Path) -> Measurement:
    settings = target.settings
    every = dict.fromkeys(MIX_NAMES, settings.search_points)
    likely_s, slow_s = (
        expected_left_s(settings, lives_s, len(MIX_NAMES), every) for lives_s in ({}, slow_lives_s(settings.slo))
    )
    _say(
        f"about {_minutes(likely_s)} where answers are short, {_minutes(slow_s)} where they take as long as the SLO "
        f"allows; at most {most_runs(settings)} runs, none of them longer than --most-point-s "
        f"({settings.point.most_s:g} s)"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task("measuring")

        def show(progress: SweepProgress) -> None:
            left = f", about {_minutes(progress.left_s)} left" if progress.left_s else ""
            bar.update(task, description=progress.what + left, completed=progress.done, total=progress.total)
            if not stderr.is_terminal:  # a bar would show nothing before its end
                _say(f"{progress.done}/{progress.total} {progress.what}{left}")

        journal = out.with_name(out.name + ".journal.jsonl")

        def keep(found: Measurement) -> None:
            try:
                _replace(out, dump_profile(found.profile))
            except OSError as error:
                raise MeasureError(
                    f"cannot write {out}: {error.strerror}; every run is kept in {journal}, "
                    "so mend that and give the same command again"
                ) from error

        return await measure_endpoint(target, journal, Watcher(show, _say), keep)


def _check_out(out: Path) -> None:
    """Raise ``MeasureError`` where the profile could not be written: now, not when everything has been measured."""
    if out.is_dir():
        raise MeasureError(f"--out {out} is a directory; name the file that the profile is to be written to")
    draft = _draft(out)
    try:
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise MeasureError(f"--out {out} cannot be written: {error.strerror}; name a file that can be") from error


def _replace(path: Path, text: bytes) -> None:
    """Write the file whole or not at all."""
    draft = _draft(path)
    draft.write_bytes(text)
    draft.replace(path)


def _draft(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _show(found: Measurement, out: Path) -> None:
    slo = found.slo
    latencies = [f"{name} p{slo.percentile:g} ms" for name in ("TTFT", "TPOT")]
    table = Table("mix", "load", "state", "output/s", *latencies, "goodput", box=SIMPLE, caption="95 % intervals")
    for point in found.points:
        load = "alone" if point.kind == "anchor" else f"{point.level:.3g}/s"
        figures = (_text(point.output_per_s, 1), _text(point.ttft_s, 1e3), _text(point.tpot_s, 1e3))
        table.add_row(point.mix, load, point.state, *figures, f"{point.goodput:.0%}")
    stderr.print(table)
    for knee in found.knees:
        _say(f"knee: {knee_text(knee)}")
    step, fit = found.profile.step_time, found.profile.fit
    _say(
        f"{out}: a step takes {step.base_s * 1e3:.3g} ms + {step.prompt_token_s * 1e6:.3g} µs a prompt token + "
        f"{step.sequence_s * 1e6:.3g} µs a sequence + {step.kv_token_s * 1e9:.3g} ns a KV token"
    )
    if fit is not None:
        _say(
            f"the model gives {len(fit.points)} steady points back within {fit.residual_median:.1%} in the median, "
            f"{fit.residual_max:.1%} at most"
        )


def _say(text: str) -> None:
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


def _text(figure: Interval, factor: float) -> str:
    if figure.low is None or figure.high is None:
        return _digits(figure.value * factor)
    return f"{_digits(figure.value * factor)} ({_digits(figure.low * factor)}-{_digits(figure.high * factor)})"


def _digits(value: float) -> str:
    """Three significant digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
