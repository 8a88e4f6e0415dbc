"""An open-loop load against a gateway that runs elsewhere, on a cluster say.

    PENSTOCK_API_KEY=pn-... python -m loadtests --url http://penstock-gateway:8080 --model llama-3.1-8b --rate 5

Requests are due at Poisson times and have the lengths of the conversation trace. Prints what became of them as one line
of JSON, and exits 0 if none failed: a 429 with its time to wait is the limiter at work, and no failure.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from loadtests.results import Fate, Figures, figures
from loadtests.runner import LoadError, run_load
from loadtests.schedule import KeyLoad, Schedule, Window, build_schedule
from loadtests.wire import Plan, PlannedCall
from serving.capacity import Slo
from serving.engine.guard import GuardError
from serving.mixes import trace_shapes

#: The one caller of this load, by the name that the schedule gives it.
CALLER = "caller"


class Summary(msgspec.Struct, frozen=True):
    """What became of a load: its requests by fate, and the figures over all of them. ``problems``: the first few."""

    requests: int
    fates: dict[Fate, int]
    figures: Figures
    problems: tuple[str, ...]


def main(
    url: Annotated[str, typer.Option(help="The gateway, without /v1.")],
    model: Annotated[str, typer.Option(help="The model to ask for.")],
    api_key: Annotated[str, typer.Option(envvar="PENSTOCK_API_KEY", help="Whose limits the load meets.")],
    rate: Annotated[float, typer.Option(min=0.001, max=10_000, help="Requests a second, in the mean.")] = 1.0,
    duration_s: Annotated[float, typer.Option(min=1, max=86_400, help="Seconds of arrivals.")] = 60.0,
    scale: Annotated[float, typer.Option(min=0.001, max=100, help="Factor on the trace's lengths.")] = 1.0,
    patience_s: Annotated[float, typer.Option(min=0, help="Seconds that the last answers are waited for.")] = 60.0,
    ttft_ms: Annotated[float, typer.Option(min=0.001, help="The SLO that goodput is counted under.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(min=0.001, help="The same, per output token.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 1,
) -> None:
    """Send one load and say what became of it."""
    loads = (KeyLoad(CALLER, "", rate),)
    schedule = build_schedule(loads, trace_shapes(scale), Window(0.0, duration_s), seed)
    with tempfile.TemporaryDirectory(prefix="penstock-load-") as folder:
        plan = _plan(schedule, url.rstrip("/"), model, api_key, patience_s, Path(folder))
        try:
            run = asyncio.run(run_load(plan, Path(folder), _silently))
        except (LoadError, GuardError) as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
    problems = tuple(dict.fromkeys(record.problem for record in run.records if record.problem))[:5]
    shown = figures(schedule, run, Slo(ttft_ms / 1e3, tpot_ms / 1e3))
    fates = Counter(record.fate for record in run.records)
    typer.echo(msgspec.json.encode(Summary(len(run.records), dict(fates), shown, problems)).decode())
    raise typer.Exit(1 if fates["failed"] else 0)


def _plan(schedule: Schedule, url: str, model: str, api_key: str, patience_s: float, folder: Path) -> Plan:
    """The schedule as Locust takes it; a word is about a token, exactly one on the virtual GPUs."""
    calls = tuple(
        PlannedCall(request.index, request.time_s, request.key, request.input_tokens, request.output_tokens)
        for request in schedule.requests
    )
    return Plan(url, model, {CALLER: api_key}, calls, patience_s, f"load/{schedule.seed}", str(folder / "records"))


def _silently(fates: Counter[Fate]) -> None:
    """Nobody watches a job's progress; its last line says it all."""


if __name__ == "__main__":
    typer.run(main)
