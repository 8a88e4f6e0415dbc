"""The columns of this project, those of ``serving/profiles/bench_serve_results.csv``: a run for each row. Pure.

``penstock fit`` reads the same tables by the same rules (``serving.benchrows``, ``serving.rowchecks``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from io import StringIO

from serving.benchrows import TEXT_COLUMNS, TOTAL_COLUMNS, BenchFileError, BenchRow, RefusedRow, points_of, read_rows
from serving.importers import table
from serving.importers.denominators import check_command, check_flags
from serving.importers.fields import MOST_COUNT, plain_text
from serving.importers.results import ImporterError, Run, RunRefusedError, Subject
from serving.rowchecks import row_problem

TOOL = "bench serve columns"
#: Without these columns it is another table.
SIGNATURE = frozenset((*TEXT_COLUMNS, *TOTAL_COLUMNS))


def rows_of(text: str, name: str) -> Iterator[tuple[BenchRow | RefusedRow, str]]:
    """Each row with where it stands. Raises ``ImporterError`` where the text is no such table any more."""
    try:
        rows, refused = read_rows(StringIO(text, newline=""))
    except BenchFileError as error:
        raise ImporterError(f"{name}: {error}") from error
    every: dict[int, BenchRow | RefusedRow] = {row.line: row for row in rows} | {row.line: row for row in refused}
    for line, cells in table.rows_of(text, name):
        if line in every:
            yield _flagged(every[line], cells), f"{name} line {line}"


def run_of(row: BenchRow | RefusedRow, _: str) -> Run:
    """One row as a run. Raises ``RunRefusedError``."""
    if isinstance(row, RefusedRow):
        raise RunRefusedError(plain_text(row.problem))
    check_command(row.served.serve_command)
    for column in ("requests", "input_tokens", "output_tokens"):
        value = row.number(column)
        if value != int(value) or value > MOST_COUNT:
            raise RunRefusedError(f"{column} is {value:g}, it must be a whole number; give the run's total")
    problem = row_problem(row)
    if problem is not None:
        raise RunRefusedError(problem)
    (point,) = points_of([row])
    return Run(_subject(row), point)


def _flagged(row: BenchRow | RefusedRow, cells: Mapping[str, str | None]) -> BenchRow | RefusedRow:
    """The row, refused where a column beside ours says that it is of a disaggregated deployment."""
    try:
        check_flags(cells.items())
    except RunRefusedError as error:
        return RefusedRow(row.line, row.served, str(error))
    return row


def _subject(row: BenchRow) -> Subject:
    model, gpu, engine, command = map(plain_text, row.served)
    return Subject(model, gpu, engine, _version_of(engine, row.text["engine_versions"]), command)


def _version_of(engine: str, versions: str) -> str:
    """The engine's version in a text such as ``- vLLM: v0.11.0 - SGLang: v0.5.3``; empty where it is not there."""
    found = re.search(rf"{re.escape(engine)}\s*:?\s*v?(\d[\w.+-]*)", versions, re.IGNORECASE) if engine else None
    return plain_text(found.group(1)) if found else ""
