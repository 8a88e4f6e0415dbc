"""``penstock import``: results of other benchmark tools, shown as points, and fitted to a profile."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratelimit.cli.common import JsonOption, failing_clearly, stderr
from serving.fit import FitError
from serving.importers import Imported, ImporterError, Subject, import_results
from serving.importers.building import Stated, profile_of
from serving.points import MeasuredPoint
from serving.profile import Profile, dump_profile
from serving.steady_points import unsteady_sign

#: Larger than any report of a sweep; what is larger is no report, or has every prompt in it.
MOST_BYTES = 512 * 1024 * 1024
#: Rows shown of anchors and refusals; --json has all.
_SHOWN = 20

_FITTED = "for --out"


def import_(
    file: Annotated[list[Path], typer.Argument(help="Files of any of the tools; the format is told by the content.")],
    out: Annotated[Path | None, typer.Option(help="Fit the runs, and write the profile here.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only runs whose model, GPU, engine or command has this.")
    ] = None,
    name: Annotated[str | None, typer.Option(help=f"The profile's name, {_FITTED}; the file's if unset.")] = None,
    model: Annotated[str, typer.Option(help=f"The model, {_FITTED}, where the files do not say or say it oddly.")] = "",
    gpu: Annotated[str, typer.Option(help=f"The GPU type, {_FITTED}, such as H100.")] = "",
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of one replica; as the serve command says.")] = None,
    dtype: Annotated[str, typer.Option(help="Weight precision, such as fp8.")] = "",
    parallelism: Annotated[str, typer.Option(help="Such as tp4; tp and the GPUs if unset.")] = "",
    engine: Annotated[str, typer.Option(help="What served, such as vLLM, where the files do not say.")] = "",
    engine_version: Annotated[str, typer.Option(help="The server's version, where the files do not say.")] = "",
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="The server's GPU KV cache size in tokens.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="The server's --max-model-len.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="The server's --max-num-seqs.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="The server's own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Import runs of vllm bench serve, GuideLLM 0.8 or AIPerf, MLPerf rows, or our own CSV columns."""
    files = _read_all(file)
    if as_json:
        typer.echo(msgspec.json.encode(files).decode())
    else:
        _show(files)
    _say_refused(files)
    if out is None:
        return
    stated = Stated(
        name=name or out.stem,
        date=datetime.now(UTC).date().isoformat(),
        only=tuple(only or ()),
        model=model,
        gpu=gpu,
        gpus=gpus,
        dtype=dtype,
        parallelism=parallelism,
        engine=engine,
        engine_version=engine_version,
        kv_tokens=kv_tokens,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    with failing_clearly(ImporterError, FitError, OSError):
        profile = profile_of(files, stated)
        out.write_bytes(dump_profile(profile))
    _say_written(profile, out)


def _read_all(paths: list[Path]) -> list[Imported]:
    """Every file, or exit status 1 with what is wrong with each that cannot be used."""
    files, problems = [], []
    for path in paths:
        try:
            files.append(import_results(_content(path), path.name))
        except ImporterError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    for problem in problems:
        stderr.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    return files


def _content(path: Path) -> bytes:
    with path.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ImporterError(
            f"{path.name}: it is larger than {MOST_BYTES >> 20} MiB; leave out --save-detailed, or lower sample_size"
        )
    return content


def _show(files: list[Imported]) -> None:
    console = Console()
    if any(imported.runs for imported in files):
        console.print(_table(files))
    anchors = [anchor.text for imported in files for anchor in imported.anchors]
    for text in anchors[:_SHOWN]:
        console.print(f"anchor: {text}", markup=False, highlight=False, soft_wrap=True)
    if len(anchors) > _SHOWN:
        console.print(f"and {len(anchors) - _SHOWN} more anchors; --json has all", markup=False)


def _table(files: list[Imported]) -> Table:
    table = Table(show_lines=True)
    table.add_column("run", overflow="fold", ratio=3)
    table.add_column("mix\nload")
    for heading in ("requests\nseconds", "in/s\nout/s", "p50/p99 ms\nTTFT\nTPOT"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("steady", overflow="fold", ratio=2)
    for imported in files:
        for run in imported.runs:
            point = run.point
            table.add_row(
                escape(f"{point.source}\n{_subject(run.subject)}"),
                f"{point.mix}\n{_load(point)}",
                f"{point.requests}\n{point.duration_s:.1f}",
                f"{point.input_tokens / point.duration_s:,.0f}\n{point.output_tokens / point.duration_s:,.0f}",
                _latencies(point),
                escape(unsteady_sign(point) or "yes"),
            )
    return table


def _load(point: MeasuredPoint) -> str:
    if point.offered_per_s is not None:
        return f"{point.offered_per_s:g} requests/s"
    return "unknown" if point.concurrency is None else f"{point.concurrency:g} in flight"


def _subject(subject: Subject) -> str:
    return " ".join(filter(None, (subject.model, subject.gpu, subject.engine)))


def _latencies(point: MeasuredPoint) -> str:
    pairs = (point.ttft_p50_s, point.ttft_p99_s), (point.tpot_p50_s, point.tpot_p99_s)
    lines = ("/".join("-" if value_s is None else f"{value_s * 1e3:.1f}" for value_s in pair) for pair in pairs)
    return "\n".join(lines)


def _say_refused(files: list[Imported]) -> None:
    refused = [refusal for imported in files for refusal in imported.refused]
    for refusal in refused[:_SHOWN]:
        stderr.print(f"left out, {refusal.where}: {refusal.reason}", markup=False, highlight=False, soft_wrap=True)
    if len(refused) > _SHOWN:
        stderr.print(f"and {len(refused) - _SHOWN} more left out; --json has all", markup=False)


def _say_written(profile: Profile, out: Path) -> None:
    made = profile.provenance
    stderr.print(f"{out}: {made.kind}; {made.source}", markup=False, highlight=False, soft_wrap=True)
    if profile.fit is not None:
        stderr.print(
            f"the model gives its points back within {profile.fit.residual_median:.1%} in the median, "
            f"{profile.fit.residual_max:.1%} at most",
            markup=False,
        )
