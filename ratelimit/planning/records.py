"""Files of recorded traffic: usage exports, access logs in their columns, and public traces of lengths."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import TextIO

import msgspec

from ratelimit.planning.demand import Asked, DemandError
from serving.capacity import RequestShape

#: What an access log needs to be replayed; ``penstock usage export`` has them all. ``cached_tokens`` came from the
#: prefix cache on top of ``input_tokens``; ``model`` chooses the lines of one model.
COLUMNS = ("time", "tier", "key", "input_tokens", "output_tokens")
TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

#: A line longer than this is no record.
_MOST_LINE_LENGTH = 1 << 16
#: A count of tokens above this is no request's.
_MOST_TOKENS = 100_000_000
#: Requests of a trace, which is kept whole.
MOST_TRACED = 2_000_000
#: What a message repeats of a value that is none.
_MOST_TOLD = 60


class Trace(msgspec.Struct, frozen=True):
    """When the requests of a trace came, in seconds, and their lengths."""

    times_s: tuple[float, ...]
    shapes: tuple[RequestShape, ...]


def is_trace(path: Path) -> bool:
    """Whether the file has the columns of a trace. Raises ``DemandError`` where it cannot be read."""
    with _reading(path) as lines:
        heading = next(iter(lines), "")
    return set(TRACE_COLUMNS) <= {*_names(heading)}


def read_trace(path: Path) -> Trace:
    """The whole trace. Raises ``DemandError`` naming the first line that is wrong, and where there is too much."""
    times_s: list[float] = []
    shapes: list[RequestShape] = []
    with _reading(path) as lines:
        for number, row in _table(path, lines):
            if len(times_s) >= MOST_TRACED:
                raise DemandError(f"{path} has more than {MOST_TRACED:,} requests; replay a part of it")
            with _naming(path, number):
                if missing := [name for name in TRACE_COLUMNS if not row.get(name)]:
                    raise DemandError(f"has no {' and no '.join(missing)}; write {', '.join(TRACE_COLUMNS)}")
                times_s.append(moment_s(row["TIMESTAMP"]))
                shapes.append(RequestShape(_count(row, "ContextTokens", 1), _count(row, "GeneratedTokens", 1)))
    return Trace(tuple(times_s), tuple(shapes))


def read_records(path: Path, model: str) -> Iterator[Asked]:
    """The requests of ``model`` in a usage export or an access log, JSON lines or CSV by its first character.

    What an engine refused has no tokens, and is left out. Raises ``DemandError`` naming the first line that is wrong.
    """
    with _reading(path) as lines:
        first = next(iter(lines), "")
    is_json = first.lstrip().startswith("{")
    with _reading(path) as lines:
        for number, row in _json_rows(path, lines) if is_json else _csv_rows(path, lines):
            with _naming(path, number):
                missing = [name for name in COLUMNS if row.get(name) in (None, "")]
                if missing:
                    raise DemandError(f"has no {' and no '.join(missing)}; every line needs {', '.join(COLUMNS)}")
                if row.get("model", model) == model and (asked := _asked(row)):
                    yield asked


def _asked(row: Mapping[str, object]) -> Asked | None:
    cached = _count(row, "cached_tokens", 0) if row.get("cached_tokens") not in (None, "") else 0
    uncached, output = _count(row, "input_tokens", 0), _count(row, "output_tokens", 0)
    if not uncached + cached and not output:
        return None
    # The engine computes at least one token of every prompt, and emits at least one.
    inputs = max(1, uncached) + cached
    return Asked(moment_s(row["time"]), str(row["tier"]), str(row["key"]), inputs, max(1, output), cached)


def moment_s(value: object) -> float:
    """Seconds since 1970, given so or as a UTC date and time. Raises ``DemandError``."""
    try:
        time_s = float(value)  # type: ignore[arg-type]  # what is no number is told below
    except OverflowError as error:
        raise DemandError(f"the time {_told(value)} is none; write seconds since 1970") from error
    except (TypeError, ValueError):
        try:
            moment = datetime.fromisoformat(str(value).strip())
        except ValueError as error:
            said = f"the time {_told(value)} is none; write seconds since 1970, or 2026-01-31T12:00:00"
            raise DemandError(said) from error
        time_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not isfinite(time_s):
        raise DemandError(f"the time {_told(value)} is not finite; write seconds since 1970")
    if abs(time_s) > 1e11:
        raise DemandError(f"the time {_told(value)} looks like milliseconds; write seconds since 1970")
    return time_s


def _told(value: object) -> str:
    """The value as a message repeats it."""
    try:
        text = str(value)
    except ValueError:  # an integer with more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _MOST_TOLD else f"{text[:_MOST_TOLD]}…"


def _count(row: Mapping[str, object], name: str, least: int) -> int:
    value = row[name]
    try:
        count = int(str(value))
    except ValueError as error:
        raise DemandError(f"{name} is {_told(value)}; write a whole number of tokens") from error
    if not 0 <= count <= _MOST_TOKENS:
        raise DemandError(f"{name} is {_told(value)}; a request has from 0 to {_MOST_TOKENS:,} tokens")
    return max(least, count)


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    heading = next(lines, "")
    missing = [name for name in COLUMNS if name not in _names(heading)]
    if missing:
        raise DemandError(
            f"{path} is neither a trace ({', '.join(TRACE_COLUMNS)}) nor records: it has no column "
            f"{' and none '.join(missing)}; write it with `penstock usage export`, or with {', '.join(COLUMNS)}"
        )
    yield from _table(path, chain([heading], lines))


def _names(heading: str) -> list[str]:
    """The columns that a heading names; spaces around them, quotes and a byte order mark mean nothing."""
    return [name.strip().strip('"').strip() for name in heading.removeprefix("\ufeff").split(",")]


def _table(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The rows under a heading, each with the number of its line."""
    rows = csv.DictReader(lines, _names(next(lines, "")), skipinitialspace=True)
    try:
        for row in rows:
            yield rows.line_num + 1, row
    except csv.Error as error:
        raise DemandError(f"{path}:{rows.line_num + 1}: no table: {error}; is a quote left open?") from error


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield number, msgspec.json.decode(line, type=dict[str, object])
        except msgspec.MsgspecError as error:
            raise DemandError(f"{path}:{number}: no JSON object: {error}; mend or leave out that line") from error


@contextmanager
def _naming(path: Path, line: int) -> Iterator[None]:
    """Say in which line of which file a ``DemandError`` was found."""
    try:
        yield
    except DemandError as error:
        raise DemandError(f"{path}:{line}: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a text file; what keeps it from being read is a ``DemandError``."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield _lines(path, file)
    except OSError as error:
        raise DemandError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DemandError(f"{path} is not UTF-8 text; export it anew") from error


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    for line in iter(lambda: file.readline(_MOST_LINE_LENGTH), ""):
        if len(line) >= _MOST_LINE_LENGTH:
            raise DemandError(f"{path} has a line of {_MOST_LINE_LENGTH} characters or more; it is no log")
        yield line
