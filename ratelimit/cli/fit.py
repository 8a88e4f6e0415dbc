"""``penstock fit``: step-time models of published or own benchmark runs, and how well each predicts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratelimit.cli.common import JsonOption, failing_clearly, stderr
from serving.benchgroups import GroupReport, fit_groups
from serving.benchrows import BenchFileError
from serving.solve import MissingSolverError


def fit(
    file: Annotated[Path, typer.Argument(help="CSV in the columns of serving/profiles/bench_serve_results.csv.")],
    as_json: JsonOption = False,
) -> None:
    """Fit each (model, GPU, engine, serve command) of a benchmark file, and say how well it predicts unseen mixes."""
    with failing_clearly(BenchFileError, MissingSolverError, OSError, UnicodeDecodeError):
        reports = _reports(file)
    if as_json:
        for report in reports:
            typer.echo(msgspec.json.encode(report).decode())
        return
    Console().print(_table(reports))
    for report in reports:
        for problem in report.refused:
            stderr.print(f"{report.model} {report.gpu}, {problem}", markup=False, highlight=False, soft_wrap=True)
    stderr.print(_summary(reports), markup=False, highlight=False, soft_wrap=True)


def _reports(file: Path) -> list[GroupReport]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return fit_groups(lines)


def _table(reports: list[GroupReport]) -> Table:
    table = Table(show_lines=True)
    table.add_column("served as", overflow="fold", ratio=3)
    for heading in ("points\nsteady\nmixes", "error at an\nunseen mix", "worst", "two\nrates"):
        table.add_column(heading, justify="right")
    table.add_column("status", overflow="fold", ratio=3)
    for report in reports:
        table.add_row(
            escape(f"{report.model} {report.gpu} {report.engine}\n{report.serve_command}"),
            f"{report.points}\n{report.steady_points}\n{report.mixes}",
            *map(_share, (report.loo_error_median, report.loo_error_max, report.two_rate_error_median)),
            escape(f"{report.status}, {report.model_form or 'no fit'}: {report.reason}"),
        )
    return table


def _share(error: float | None) -> str:
    return "-" if error is None else f"{error:.0%}"


def _summary(reports: list[GroupReport]) -> str:
    statuses = Counter(report.status for report in reports)
    counted = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    compared = [
        (report.loo_error_median, report.two_rate_error_median)
        for report in reports
        if report.loo_error_median is not None and report.two_rate_error_median is not None
    ]
    if not compared:
        return f"{len(reports)} groups: {counted}; none has enough mixes to leave one out"
    ours, two_rates = (median(errors) for errors in zip(*compared, strict=True))
    return (
        f"{len(reports)} groups: {counted}. Error at a mix left out, median of {len(compared)} groups: "
        f"{ours:.1%}; of two plain rates {two_rates:.1%}"
    )
