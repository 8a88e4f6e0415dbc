"""Rows of serving benchmarks in columns, as in ``profiles/bench_serve_results.csv``, and what is wrong with them. Pure.

A row states the same facts more than once: totals and rates, means and percentiles, latencies and the length of the
run. One that contradicts itself (``rowchecks``) is refused, with what is wrong and how to mend it; none is guessed at.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import msgspec

from serving.denominators import command_problem, flag_problem
from serving.points import MeasuredPoint

TEXT_COLUMNS = ("model", "gpu", "engine", "serve_command")
#: Text that helps to name a row, and may be missing.
OPTIONAL_TEXT_COLUMNS = ("page", "hardware", "engine_versions", "section")
COUNT_COLUMNS = ("requests", "input_tokens", "output_tokens")
TOTAL_COLUMNS = ("duration_s", *COUNT_COLUMNS)
#: Blank or missing where the source does not say.
RATE_COLUMNS = ("req_s", "output_tok_s", "total_tok_s")
LATENCY_COLUMNS = (
    "ttft_mean_ms",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_mean_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "itl_mean_ms",
    "itl_p99_ms",
)
OPTIONAL_COLUMNS = (*RATE_COLUMNS, *LATENCY_COLUMNS, "peak_concurrency")

#: Numbers of any column are between these.
LEAST_NUMBER = 1e-6
MOST_NUMBER = 1e15

#: Runs whose mean lengths differ by less than these factors are of one mix. Prompts of a data set vary little between
#: runs; answers vary more, since models stop by themselves.
SAME_INPUT = 1.15
SAME_OUTPUT = 1.4


class BenchFileError(ValueError):
    """The file as a whole cannot be read; the message says what is wrong and how to mend it."""


class ServedAs(NamedTuple):
    """What a group of runs has in common: model, GPU type, engine, and how the server was started."""

    model: str
    gpu: str
    engine: str
    serve_command: str


class BenchRow(msgspec.Struct, frozen=True):
    """One row as it stands: its line in the file, its text and its numbers; None where a number is blank."""

    line: int
    served: ServedAs
    text: dict[str, str]
    numbers: dict[str, float | None]

    def number(self, column: str) -> float:
        """A number that is known to be there."""
        value = self.numbers[column]
        assert value is not None, f"{column} was checked to be there"  # noqa: S101 - narrows the type
        return value

    @property
    def run(self) -> tuple[float | None, ...]:
        """What makes two rows the same run, told twice."""
        return tuple(self.numbers[column] for column in (*TOTAL_COLUMNS, "ttft_mean_ms", "tpot_mean_ms"))


class RefusedRow(msgspec.Struct, frozen=True):
    """A row that is not used, and why."""

    line: int
    served: ServedAs
    problem: str


def read_rows(lines: Iterable[str]) -> tuple[list[BenchRow], list[RefusedRow]]:
    """The rows that are numbers where they should be, and those that are not. Raises ``BenchFileError``."""
    reader = csv.DictReader(lines)
    rows, refused = [], []
    try:
        _check_columns(reader.fieldnames or ())
        for record in reader:
            served = ServedAs(*((record[column] or "").strip() for column in TEXT_COLUMNS))
            problem = _malformed(record)
            if problem is not None:
                refused.append(RefusedRow(reader.line_num, served, problem))
                continue
            text = {column: record.get(column) or "" for column in OPTIONAL_TEXT_COLUMNS}
            numbers = {column: _number(record.get(column)) for column in (*TOTAL_COLUMNS, *OPTIONAL_COLUMNS)}
            rows.append(BenchRow(reader.line_num, served, text, numbers))
    except csv.Error as error:
        raise BenchFileError(f"line {reader.line_num}: not CSV: {error}") from error
    return rows, refused


def _check_columns(names: Sequence[str]) -> None:
    missing = [column for column in (*TEXT_COLUMNS, *TOTAL_COLUMNS) if column not in names]
    if missing:
        raise BenchFileError(f"columns {', '.join(missing)} are missing; the first line must name the columns")


def points_of(rows: Iterable[BenchRow]) -> list[MeasuredPoint]:
    """The rows of one group as points, with runs of like lengths under one mix."""
    lengths: list[tuple[float, float]] = []
    points = []
    for row in rows:
        requests = row.number("requests")
        mean = (row.number("input_tokens") / requests, row.number("output_tokens") / requests)
        same = next((known for known in lengths if are_one_mix(known, mean)), None)
        if same is None:
            lengths.append(mean)
            same = mean
        points.append(_point(row, mix=f"{same[0]:.0f} in, {same[1]:.0f} out"))
    return points


def are_one_mix(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether runs of these mean (input, output) lengths are of one mix."""
    return all(
        1 / bound < (a + 1) / (b + 1) < bound for a, b, bound in zip(one, other, (SAME_INPUT, SAME_OUTPUT), strict=True)
    )


def _point(row: BenchRow, mix: str) -> MeasuredPoint:
    def seconds(column: str) -> float | None:
        value = row.numbers[column]
        return None if value is None else value / 1e3

    return MeasuredPoint(
        mix=mix,
        requests=round(row.number("requests")),
        duration_s=row.number("duration_s"),
        input_tokens=round(row.number("input_tokens")),
        output_tokens=round(row.number("output_tokens")),
        concurrency=row.numbers["peak_concurrency"],
        ttft_mean_s=seconds("ttft_mean_ms"),
        ttft_p50_s=seconds("ttft_p50_ms"),
        ttft_p99_s=seconds("ttft_p99_ms"),
        tpot_mean_s=seconds("tpot_mean_ms"),
        tpot_p50_s=seconds("tpot_p50_ms"),
        tpot_p99_s=seconds("tpot_p99_ms"),
        itl_mean_s=seconds("itl_mean_ms"),
        source=f"line {row.line}: {row.text['page']} {row.text['section']}".rstrip(": "),
    )


def _malformed(record: Mapping[str, str | None]) -> str | None:
    return next(_problems_of_form(record), None)


def _problems_of_form(record: Mapping[str, str | None]) -> Iterator[str]:
    for column in TEXT_COLUMNS:
        if not (record[column] or "").strip():
            yield f"{column} is empty: say which was measured"
    disaggregated = command_problem(record["serve_command"] or "") or flag_problem(_named_cells(record))
    if disaggregated is not None:
        yield disaggregated
    for column in (*TOTAL_COLUMNS, *OPTIONAL_COLUMNS):
        problem = _problem_of_number(column, (record.get(column) or "").strip())
        if problem is not None:
            yield problem


def _problem_of_number(column: str, text: str) -> str | None:
    if not text:
        return f"{column} is empty: a run cannot be reckoned without it" if column in TOTAL_COLUMNS else None
    try:
        value = float(text)
    except ValueError:
        return f"{column} is {text!r}, it must be a number, without unit or thousands separator"
    if not isfinite(value) or value < 0:
        return f"{column} is {text}, it must be a finite number of at least 0; leave it blank if it is not known"
    if value == 0:
        return f"{column} is 0: nothing was measured; leave it blank if it is not known, or drop the row"
    if not LEAST_NUMBER <= value <= MOST_NUMBER:
        return f"{column} is {text}, beyond anything that was ever measured: is a decimal point missing?"
    if column in COUNT_COLUMNS and not value.is_integer():
        return f"{column} is {text}, it must be a whole number; give the run's total"
    return None


def _named_cells(record: Mapping[str, str | None]) -> Iterator[tuple[str, object]]:
    """Without what stands beyond the last column, which ``csv`` puts under None."""
    return ((column, cell) for column, cell in record.items() if isinstance(column, str))


def _number(text: str | None) -> float | None:
    return float(text) if text and text.strip() else None
