"""The usage ledger on disk: one JSON line per record, in ``usage/YYYY-MM-DD.jsonl`` of the state folder.

The day is the UTC day of the record's entry in the stream, by Redis's clock, so that a day that is over does not change
(but for what a controller that was away writes late). A file ends with a line feed, or with a line that was being
written when its writer died; that part is cut off by the next writer and passed over by readers. Files of past days may
be moved away.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import msgspec

from ratelimit.statefile import StateFileError, private_folder, sync_folder
from ratelimit.usage import EntryId, LedgerLine

_SEEK_BYTES = 1 << 16


class _Mark(msgspec.Struct):
    """What tells a line from every other."""

    id: str
    cell: str
    entry: str


class Unreadable(msgspec.Struct, frozen=True):
    """An entry of a stream that is no record: kept, for somebody to look at."""

    cell: str
    entry: str
    why: str
    fields: dict[str, str]


def day_of(entry: EntryId) -> str:
    """The UTC day of an entry, as ``2026-01-31``."""
    return datetime.fromtimestamp(entry.time_ms / 1000, UTC).strftime("%Y-%m-%d")


class UsageFiles:
    """The day files of one installation. Methods that read or write may raise ``OSError`` and ``StateFileError``."""

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "usage"

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Whether nobody else writes these files, now and until the block ends."""
        private_folder(self.folder)
        descriptor = os.open(self.folder / "writer.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield _locked(descriptor)
        finally:
            os.close(descriptor)  # also gives the lock back

    def append(self, lines: Iterable[LedgerLine]) -> None:
        """Add the lines, each to its day's file; they are on the disk when this returns.

        After an error some of them may be there: ask ``written`` before trying again.
        """
        for day, of_day in groupby(lines, key=lambda line: day_of(EntryId.parse(line.entry))):
            self._append(f"{day}.jsonl", [msgspec.json.encode(line) for line in of_day])

    def append_unreadable(self, entries: Iterable[Unreadable]) -> None:
        """Keep entries that are no records, in a file of their own."""
        self._append("unreadable.jsonl", [msgspec.json.encode(entry) for entry in entries])

    def written(self, cell: str, first: EntryId, last: EntryId) -> set[tuple[str, str]]:
        """The entry and request id of each line of a cell from ``first`` to ``last``; reads those days' files whole."""
        marks = msgspec.json.Decoder(_Mark)
        found = set()
        for path in self._days(day_of(first), day_of(last)):
            for _, text in _whole_lines(path):
                mark = _decoded(marks, text)
                if mark is not None and mark.cell == cell and first <= EntryId.parse(mark.entry) <= last:
                    found.add((mark.entry, mark.id))
        return found

    def lines(self, since_ms: int, until_ms: int) -> Iterator[LedgerLine]:
        """The lines whose entries were made from ``since_ms`` on and before ``until_ms``, in the order of the files.

        Raises ``StateFileError``, which names the line, for one that is damaged.
        """
        lines = msgspec.json.Decoder(LedgerLine)
        for path in self._days(day_of(EntryId(since_ms, 0)), day_of(EntryId(until_ms, 0))):
            for number, text in _whole_lines(path):
                try:
                    line = lines.decode(text)
                    time_ms = EntryId.parse(line.entry).time_ms
                except ValueError as error:  # msgspec's are ValueErrors too
                    raise StateFileError(
                        f"{path}:{number} is damaged ({error}); mend the line, or move it to another file"
                    ) from error
                if since_ms <= time_ms < until_ms:
                    yield line

    def _days(self, first: str, last: str) -> list[Path]:
        return sorted(path for path in self.folder.glob("????-??-??.jsonl") if first <= path.stem <= last)

    def _append(self, name: str, lines: list[bytes]) -> None:
        private_folder(self.folder)
        path = self.folder / name
        is_new = not path.exists()
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.seek(_end_of_whole_lines(file.fileno()))
            file.truncate()
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self.folder)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_of_whole_lines(descriptor: int) -> int:
    """The offset after the last line feed; 0 where there is none."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _SEEK_BYTES)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, but for a last one that has no end."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.endswith(b"\n"):
                yield number, text


def _decoded(marks: msgspec.json.Decoder[_Mark], text: bytes) -> _Mark | None:
    """A damaged line is passed over: it is not one that we are about to write."""
    try:
        return marks.decode(text)
    except ValueError:
        return None
