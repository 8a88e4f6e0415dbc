"""``penstock measure``: what a live endpoint can do, as a profile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ratelimit.cli.common import failing_clearly, stderr
from serving.endpoint import EndpointError
from serving.fit import FitError
from serving.measure import MeasureTarget
from serving.measure import Progress as SweepProgress
from serving.measure import measure as measure_endpoint
from serving.profile import Profile, dump_profile


def measure(
    url: Annotated[str, typer.Argument(help="The vLLM server, such as http://127.0.0.1:8000.")],
    gpu: Annotated[str, typer.Option(help="What it runs on, such as H100; profiles are grouped by it.")],
    out: Annotated[Path, typer.Option(help="Where to write the profile.")],
    name: Annotated[str | None, typer.Option(help="The profile's name; the file's if unset.")] = None,
    model: Annotated[str | None, typer.Option(help="The served model; the only one if unset.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one replica.")] = 1,
    dtype: Annotated[str, typer.Option(help="Weight precision, for the provenance.")] = "unknown",
    parallelism: Annotated[str, typer.Option(help="Such as tp1 or tp4, for the provenance.")] = "tp1",
    hardware: Annotated[str, typer.Option(help="What else is worth knowing of the machine, for the provenance.")] = "",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="The server's --max-num-seqs.")] = 1024,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="The server's --max-num-batched-tokens.")] = 8192,
    point_s: Annotated[float, typer.Option(min=1, help="Seconds that each of the 16 points is watched.")] = 12.0,
) -> None:
    """Drive an endpoint through one fixed sweep (4 mixes, 4 concurrencies) and write its profile."""
    target = MeasureTarget(
        url=url.rstrip("/"),
        name=name or out.stem,
        gpu=gpu,
        gpus_per_replica=gpus,
        model=model,
        dtype=dtype,
        parallelism=parallelism,
        hardware=hardware,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        point_s=point_s,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr) as bar, failing_clearly(EndpointError, FitError, OSError):
        task = bar.add_task("measuring")

        def show(progress: SweepProgress) -> None:
            what = f"{progress.mix} × {progress.concurrency}" if progress.mix else "fitting"
            bar.update(task, description=what, completed=progress.done, total=progress.total)

        profile = asyncio.run(measure_endpoint(target, show))
        out.write_bytes(dump_profile(profile))
    _say(profile, out)


def _say(profile: Profile, out: Path) -> None:
    step = profile.step_time
    stderr.print(
        f"{out}: a step takes {step.base_s * 1e3:.3g} ms + {step.prompt_token_s * 1e6:.3g} µs a prompt token + "
        f"{step.sequence_s * 1e6:.3g} µs a sequence + {step.kv_token_s * 1e9:.3g} ns a KV token",
        markup=False,
        soft_wrap=True,
    )
    if profile.fit is not None:
        stderr.print(
            f"the model gives {len(profile.fit.points)} measured points back within "
            f"{profile.fit.residual_median:.1%} in the median, {profile.fit.residual_max:.1%} at most",
            markup=False,
        )
