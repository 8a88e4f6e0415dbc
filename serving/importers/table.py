"""CSV tables, row by row. Pure."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO

from serving.importers.fields import Fields
from serving.importers.results import ImporterError, RunRefusedError


def header_of(text: str) -> Sequence[str]:
    """The names of the columns; empty for what is no table."""
    try:
        return next(csv.reader(StringIO(text)), [])
    except csv.Error:
        return []


def rows_of(text: str, name: str) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    """Each row with its line. Raises ``ImporterError`` where it is no CSV any more."""
    reader = csv.DictReader(StringIO(text))
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if isinstance(key, str)}
    except csv.Error as error:
        raise ImporterError(f"{name}: line {reader.line_num} is no CSV ({error}); write it again as CSV") from error


def typed(row: Mapping[str, str | None], numeric: Sequence[str]) -> Fields:
    """The row with its numbers as such, empty ones absent. Raises ``RunRefusedError`` for what is no number."""
    return Fields({key: _number(value, key) if key in numeric else value for key, value in row.items()})


def _number(value: str | None, column: str) -> float | None:
    if value is None or not value.strip():
        return None
    try:
        return float(value)
    except ValueError as error:
        raise RunRefusedError(f"{column} is {value[:40]!r}, it must be a number; mend that cell") from error
