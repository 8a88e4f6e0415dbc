"""``penstock plan``: what a fleet would serve, whom it would throttle, and what more or less hardware would change."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from ratelimit.cli.common import JsonOption, failing_clearly, stderr
from ratelimit.cli.planviews import print_plan
from ratelimit.derive import SupplyError
from ratelimit.planning.demand import DemandError
from ratelimit.planning.document import PlanConfig, example_text, examples, load_example, load_plan
from ratelimit.planning.knees import Found, KneeKey, find_knees
from ratelimit.planning.plan import Inputs, outcome
from ratelimit.planning.plots import draw_all
from ratelimit.planning.sites import FleetError, parse_changes
from ratelimit.planning.wiring import inputs_of
from serving.plotstyle import PlotError

#: Wide enough for the tables where nobody's terminal says otherwise.
_WIDTH = 150


def plan(
    file: Annotated[Path | None, typer.Argument(help="The plan's file.")] = None,
    example: Annotated[str | None, typer.Option(help=f"In place of a file: {', '.join(examples())}.")] = None,
    add: Annotated[list[str] | None, typer.Option(help="Hardware to add, as H200=1000 or SITE:H200=1000.")] = None,
    lose: Annotated[list[str] | None, typer.Option(help="Hardware to lose, as H100=8 or SITE:H100=8.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Demand from a usage export, an access log or a trace, in place of the plan's.")
    ] = None,
    times: Annotated[float, typer.Option(help="The demand, so many times.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Also draw the pictures, into this folder.")] = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the example's file, to start your own from.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what limits follow from a fleet, a policy and a demand, and who is throttled by how much."""
    if (file is None) == (example is None):
        stderr.print(
            f"name a plan's file, or one example: --example {', '.join(examples())}", style="red", markup=False
        )
        raise typer.Exit(1)
    with failing_clearly(FleetError, DemandError, SupplyError, PlotError, OSError, TimeoutError, BrokenExecutor):
        planned = load_plan(file) if file is not None else load_example(example or "")
        if as_yaml:
            typer.echo(example_text(planned.name) if file is None else file.read_text(encoding="utf-8"), nl=False)
            return
        inputs = _inputs(planned, add or [], lose or [], replay, times)
        found = outcome(inputs, _knees(inputs))
        if plot is not None:
            for path in draw_all(found, plot):
                stderr.print(f"drew {path}", markup=False, highlight=False)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found.document()), indent=2).decode())
        return
    console = Console()
    print_plan(console if console.is_terminal else Console(width=_WIDTH), found)


def _inputs(planned: PlanConfig, add: list[str], lose: list[str], replay: Path | None, times: float) -> Inputs:
    changes = [*parse_changes(add, 1), *parse_changes(lose, -1)]
    return inputs_of(planned, changes, replay, times)


def _knees(inputs: Inputs) -> Mapping[KneeKey, Found]:
    """The knees that the plan needs, with their progress for whoever watches."""
    keys = inputs.knee_keys()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("simulating replicas", total=len(set(keys)))

        def tell(key: KneeKey) -> None:
            progress.update(task, advance=1, description=f"simulated {key.profile.name}")

        return find_knees(keys, tell)
