"""``penstock usage``: what was used, for bills; from the day files that the controller writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from time import time
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratelimit.cli.common import DEFAULT_CONFIG, ConfigOption, JsonOption, failing_clearly, read_config
from ratelimit.statefile import StateFileError
from ratelimit.usage import LedgerLine
from ratelimit.usagefiles import UsageFiles
from ratelimit.usagereport import Totals, Wanted, csv_rows, parse_groupings, parse_moment, totals, without_repeats

app = typer.Typer(help="What was used: export the records, or sum them up.", no_args_is_help=True)

SinceOption = Annotated[
    str, typer.Option(help="From when on, by when it was settled: a UTC time, or 7d for 7 days ago.")
]
UntilOption = Annotated[str | None, typer.Option(help="Before when; now if unset.")]
KeyOption = Annotated[str | None, typer.Option(help="One key's id; every key if unset.")]
OrgOption = Annotated[str | None, typer.Option(help="One org; every org if unset.")]
ModelOption = Annotated[str | None, typer.Option(help="One model; every model if unset.")]


@app.command()
def export(
    since: SinceOption = "30d",
    until: UntilOption = None,
    key: KeyOption = None,
    org: OrgOption = None,
    model: ModelOption = None,
    form: Annotated[Literal["jsonl", "csv"], typer.Option("--format", help="JSON lines, or CSV.")] = "jsonl",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Print the usage records, one a line."""
    with failing_clearly(StateFileError, ValueError, OSError):
        lines = _lines(read_config(config).state_dir, since, until, Wanted(key, org, model))
        for text in csv_rows(lines) if form == "csv" else _json_lines(lines):
            typer.echo(text, nl=False)


@app.command("sum")
def sum_up(
    since: SinceOption = "30d",
    until: UntilOption = None,
    key: KeyOption = None,
    org: OrgOption = None,
    model: ModelOption = None,
    by: Annotated[str, typer.Option(help="What to sum by: any of key, org, model, tier.")] = "org,key,model",
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Print what the records come to, for each key, org and model."""
    with failing_clearly(StateFileError, ValueError, OSError):
        groupings = parse_groupings(by)
        found = totals(_lines(read_config(config).state_dir, since, until, Wanted(key, org, model)), groupings)
    if as_json:
        rows = [
            dict(zip(groupings, names, strict=True)) | msgspec.structs.asdict(total) for names, total in found.items()
        ]
        typer.echo(msgspec.json.encode(rows).decode())
        return
    Console().print(_table(groupings, found))


def _lines(state_dir: Path, since: str, until: str | None, wanted: Wanted) -> Iterator[LedgerLine]:
    now_s = time()
    until_ms = round(now_s * 1000) if until is None else parse_moment(until, now_s)
    lines = UsageFiles(state_dir).lines(parse_moment(since, now_s), until_ms)
    return (line for line in without_repeats(lines) if wanted.matches(line))


def _json_lines(lines: Iterable[LedgerLine]) -> Iterator[str]:
    return (msgspec.json.encode(line).decode() + "\n" for line in lines)


def _table(groupings: Iterable[str], found: dict[tuple[str, ...], Totals]) -> Table:
    table = Table()
    for grouping in groupings:
        table.add_column(grouping, overflow="fold")
    for heading in ("requests", "input", "cached", "output", "replica-seconds"):
        table.add_column(heading, justify="right")
    for names, total in found.items():
        tokens = (total.requests, total.input_tokens, total.cached_tokens, total.output_tokens)
        table.add_row(*map(escape, names), *(f"{amount:,}" for amount in tokens), f"{total.cost_us / 1e6:,.3f}")
    return table
