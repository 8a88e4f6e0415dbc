"""Questions about usage records: whose, of when, how much together. Pure."""

from __future__ import annotations

import csv
import io
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal, get_args

import msgspec

from ratelimit.duration import parse_duration
from ratelimit.usage import EntryId, LedgerLine

Grouping = Literal["key", "org", "model", "tier"]

COLUMNS = LedgerLine.__struct_fields__
#: A settlement whose answer was lost with Redis's last writes is repeated for less than this, and recorded twice.
REPEATED_WITHIN_S = 600.0


class Wanted(msgspec.Struct, frozen=True):
    """Which records are asked for; None for any."""

    key: str | None = None
    org: str | None = None
    model: str | None = None

    def matches(self, line: LedgerLine) -> bool:
        """Whether this is one of them."""
        return all(
            asked is None or asked == found
            for asked, found in ((self.key, line.key), (self.org, line.org), (self.model, line.model))
        )


class Totals(msgspec.Struct):
    """What some records come to. ``cost_us`` is in replica-microseconds."""

    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_us: int = 0

    def add(self, line: LedgerLine) -> None:
        """Count one more."""
        self.requests += 1
        self.input_tokens += line.input_tokens
        self.cached_tokens += line.cached_tokens
        self.output_tokens += line.output_tokens
        self.cost_us += line.cost_us


def parse_moment(text: str, now_s: float) -> int:
    """A moment in milliseconds since 1970: a UTC date or time such as ``2026-01-31T12:00``, or how long ago, as ``7d``.

    Raises ``ValueError`` saying what is accepted.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return round((now_s - parse_duration(text)) * 1000)
        except ValueError as error:
            raise ValueError(
                f"{text!r} is no moment; write a UTC date or time, such as 2026-01-31 or 2026-01-31T12:00, "
                "or how long ago it was, such as 7d"
            ) from error
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def without_repeats(lines: Iterable[LedgerLine]) -> Iterator[LedgerLine]:
    """The lines in their order, but for one whose request was recorded less than ``REPEATED_WITHIN_S`` before."""
    seen: OrderedDict[str, int] = OrderedDict()
    for line in lines:
        time_ms = EntryId.parse(line.entry).time_ms
        while seen and next(iter(seen.values())) < time_ms - REPEATED_WITHIN_S * 1000:
            seen.popitem(last=False)
        if line.id not in seen:
            seen[line.id] = time_ms
            yield line


def totals(lines: Iterable[LedgerLine], by: Sequence[Grouping]) -> dict[tuple[str, ...], Totals]:
    """What the lines come to for each combination of these fields, in the order of the names."""
    found: dict[tuple[str, ...], Totals] = {}
    for line in lines:
        found.setdefault(tuple(getattr(line, name) for name in by), Totals()).add(line)
    return dict(sorted(found.items()))


def parse_groupings(text: str) -> tuple[Grouping, ...]:
    """From ``org,key``. Raises ``ValueError`` saying what is accepted."""
    known = get_args(Grouping)
    names = tuple(name.strip() for name in text.split(","))
    if not all(name in known for name in names) or len(set(names)) < len(names):
        raise ValueError(f"cannot sum by {text!r}; write one or more of {', '.join(known)}, such as org,key")
    return names  # type: ignore[return-value]  # each is one of the known, seen just above


def csv_rows(lines: Iterable[LedgerLine]) -> Iterator[str]:
    """A heading and one row for each line, each with its end; marks are parted by spaces."""
    yield _csv_row(COLUMNS)
    for line in lines:
        fields = msgspec.structs.asdict(line) | {"marks": " ".join(line.marks)}
        yield _csv_row(tuple(_plain(fields[name]) for name in COLUMNS))


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _csv_row(fields: Sequence[str]) -> str:
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow(fields)
    return row.getvalue()
