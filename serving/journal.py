"""The journal of a measurement: every finished point, appended at once, so that an interrupted one can go on.

JSON lines: a header with everything that must be the same for the points to belong together, then a line for each
point, then a mark when the measurement is complete. A line that was cut off by a crash is dropped. The journal is also
the raw evidence of a profile: it holds every request of every point.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import msgspec

from serving.records import Record

VERSION = "2"


class JournalError(RuntimeError):
    """The journal cannot be used; the message says why, and what to do."""


class _Header(msgspec.Struct, frozen=True, tag="header"):
    version: str
    settings: dict[str, str]


class _Complete(msgspec.Struct, frozen=True, tag="complete"):
    """Nothing is left to measure."""


class _Read(NamedTuple):
    header: _Header
    records: list[Record]
    is_complete: bool
    end: int


_Line = _Header | Record | _Complete


class Journal:
    """An open journal; use it as a context manager. ``news`` says what became of an earlier one, empty for none."""

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self.path = path
        self.records: list[Record] = []
        self.news = ""
        self._settings = dict(settings)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Take up the earlier journal where it fits, else set it aside. Raises ``JournalError`` and ``OSError``."""
        self._lock()
        try:
            self._take_up(self._read())
        except BaseException:
            self._opened().close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened().close()

    def add(self, record: Record) -> None:
        """Write a finished point, and have it on the disk."""
        self.records.append(record)
        self._append(record)

    def complete(self) -> None:
        """The measurement is over; the next one starts anew."""
        self._append(_Complete())

    def _take_up(self, earlier: _Read | None) -> None:
        if earlier is not None and self._fits(earlier):
            # What was unsteady may be steady now; the file keeps it as evidence.
            self.records = [record for record in earlier.records if record.run.state != "unsteady"]
            self._opened().truncate(earlier.end)
            self.news = f"{self.path}: going on after {len(self.records)} finished points" if self.records else ""
            return
        if earlier is None:
            self._opened().truncate(0)
        else:
            aside = self.path.with_name(self.path.name + ".old")
            self._opened().close()
            self.path.replace(aside)
            self.news += f"; measuring anew, the earlier points are in {aside}"
            self._lock()
        self._append(_Header(VERSION, self._settings))

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise JournalError(f"{self.path} is not open")
        return self._file

    def _lock(self) -> None:
        self._file = self.path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise JournalError(f"{self.path} is in use: another penstock measure writes it; wait for it") from error

    def _read(self) -> _Read | None:
        whole, newline, _cut_off = self.path.read_bytes().rpartition(b"\n")
        if not newline:
            return None
        lines: list[_Line] = []
        for number, text in enumerate(whole.split(b"\n"), start=1):
            try:
                lines.append(msgspec.json.decode(text, type=_Line))
            except msgspec.MsgspecError as error:
                raise JournalError(
                    f"line {number} of {self.path} is no line of a journal ({error}); delete the file to measure anew"
                ) from error
        header, rest = lines[0], lines[1:]
        if not isinstance(header, _Header):
            raise JournalError(f"{self.path} does not begin as a journal does; delete it to measure anew")
        records = [line for line in rest if isinstance(line, Record)]
        return _Read(header, records, any(isinstance(line, _Complete) for line in rest), len(whole) + 1)

    def _fits(self, earlier: _Read) -> bool:
        before = {"version of the journal": earlier.header.version, **earlier.header.settings}
        now = {"version of the journal": VERSION, **self._settings}
        changed = [
            f"{name} was {before.get(name, 'unset')} and is {now.get(name, 'unset')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            self.news = f"{self.path}: {'; '.join(changed)}"
        elif earlier.is_complete:
            self.news = f"{self.path}: the earlier measurement was complete"
        return not changed and not earlier.is_complete

    def _append(self, line: _Line) -> None:
        file = self._opened()
        file.write(msgspec.json.encode(line) + b"\n")
        file.flush()
        os.fsync(file.fileno())
