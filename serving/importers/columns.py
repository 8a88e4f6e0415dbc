"""The columns of this project, those of ``serving/profiles/bench_serve_results.csv``: a run for each row. Pure.

``penstock fit`` reads the same tables by the same rules: both take what ``serving.benchgroups`` leaves of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO

from serving.benchgroups import groups_of
from serving.benchrows import TEXT_COLUMNS, TOTAL_COLUMNS, BenchFileError, BenchRow, RefusedRow, points_of
from serving.importers.fields import plain_text
from serving.importers.results import ImporterError, Run, RunRefusedError, Subject

TOOL = "bench serve columns"
#: Without these columns it is another table.
SIGNATURE = frozenset((*TEXT_COLUMNS, *TOTAL_COLUMNS))


def rows_of(text: str, name: str) -> Iterator[tuple[BenchRow | RefusedRow, str]]:
    """Each row with where it stands. Raises ``ImporterError`` where the text is no such table any more."""
    try:
        groups = groups_of(StringIO(text, newline=""))
    except BenchFileError as error:
        raise ImporterError(f"{name}: {error}") from error
    every: list[BenchRow | RefusedRow] = []
    for group in groups:
        every += (*group.rows, *group.refused)
    for row in sorted(every, key=lambda row: row.line):
        yield row, f"{name} line {row.line}"


def run_of(row: BenchRow | RefusedRow, _: str) -> Run:
    """One row as a run. Raises ``RunRefusedError``."""
    if isinstance(row, RefusedRow):
        raise RunRefusedError(plain_text(row.problem))
    (point,) = points_of([row])
    return Run(_subject(row), point)


def _subject(row: BenchRow) -> Subject:
    model, gpu, engine, command = map(plain_text, row.served)
    return Subject(model, gpu, engine, _version_of(engine, row.text["engine_versions"]), command)


def _version_of(engine: str, versions: str) -> str:
    """The engine's version in a text such as ``- vLLM: v0.11.0 - SGLang: v0.5.3``; empty where it is not there."""
    found = re.search(rf"{re.escape(engine)}\s*:?\s*v?(\d[\w.+-]*)", versions, re.IGNORECASE) if engine else None
    return plain_text(found.group(1)) if found else ""
