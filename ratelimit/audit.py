"""The audit log: every published epoch, when, who or what caused it, and what it did to every limit.

One JSON line per epoch in ``audit/NNNNNNNN.jsonl`` of the state folder, appended under a lock and synced before it
counts. A line holds the whole publication but for the list of its replicas, so any epoch that is kept can be shown and
compared again. A file that has reached ``FILE_BYTES`` is followed by the next number, and all but the newest
``MOST_FILES`` are deleted. A last line without an end was being written when its writer died: readers pass over it, and
the next writer cuts it off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from ratelimit.approval import Approval
from ratelimit.difference import Difference, Snapshot
from ratelimit.statefile import StateFileError, private_folder, sync_folder, take_lock

FILE_BYTES = 8 << 20
MOST_FILES = 8
LOCK_TIMEOUT_S = 1.0
_SEEK_BYTES = 1 << 16
_FIRST = "00000001"


class Entry(msgspec.Struct, frozen=True):
    """One epoch: when it was published (ISO 8601, UTC), what caused it, who let which change through, and what it did.

    ``before`` is the epoch that ``does`` compares with, 0 where none was known; the epoch itself where it stayed in
    force and only what guards it changed. ``unsure``: nobody can tell whether it was ever in force.
    """

    epoch: int
    at: str
    cause: str
    before: int
    does: Difference
    published: Snapshot
    approved: tuple[Approval, ...] = ()
    unsure: bool = False


class AuditLog:
    """The audit log of one installation. Methods may raise ``OSError`` and ``StateFileError``."""

    def __init__(self, state_dir: Path, file_bytes: int = FILE_BYTES, most_files: int = MOST_FILES) -> None:
        self.folder = state_dir / "audit"
        self._file_bytes = file_bytes
        self._most_files = most_files

    def append(self, entry: Entry) -> None:
        """Keep an epoch; it is on the disk when this returns. The one that was kept last is not kept twice."""
        private_folder(self.folder)
        with self._locked():
            path = self._newest()
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                last, end = _last_line(file.fileno())
                _write_at(file, end, b"" if _is_of(last, entry) else msgspec.json.encode(entry) + b"\n")
                size = os.fstat(file.fileno()).st_size
            if size >= self._file_bytes:
                path.with_name(f"{int(path.stem) + 1:08d}.jsonl").touch(mode=0o600)
            for old in self._files()[: -self._most_files]:
                old.unlink()
            sync_folder(self.folder)

    def entries(self) -> Iterator[Entry]:
        """Every epoch that is kept, newest first. Raises ``StateFileError``, which names the line that is damaged."""
        decoder = msgspec.json.Decoder(Entry)
        for path in reversed(self._files()):
            lines = _whole_lines(path)
            for number in range(len(lines), 0, -1):
                try:
                    yield decoder.decode(lines[number - 1])
                except ValueError as error:  # msgspec's are ValueErrors too
                    raise StateFileError(
                        f"{path}:{number} is damaged ({error}); mend the line, or move it to another file"
                    ) from error

    def epoch(self, number: int) -> Entry:
        """One epoch. Raises ``StateFileError`` where it is not kept, saying which are."""
        oldest = newest = None
        for entry in self.entries():
            if entry.epoch == number:
                return entry
            oldest, newest = entry.epoch, newest or entry.epoch
        kept = f"epochs {oldest} to {newest} are" if newest else "no epoch is"
        raise StateFileError(f"epoch {number} is not in the audit log; {kept} kept in {self.folder}")

    def newest(self) -> Entry | None:
        """The last epoch that was kept. Raises ``StateFileError``."""
        return next(self.entries(), None)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("????????.jsonl"))

    def _newest(self) -> Path:
        files = self._files()
        return files[-1] if files else self.folder / f"{_FIRST}.jsonl"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "writer.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            take_lock(descriptor, self.folder / "writer.lock", LOCK_TIMEOUT_S)
            yield
        finally:
            os.close(descriptor)  # also gives the lock back


def _last_line(descriptor: int) -> tuple[bytes, int]:
    """The last whole line, without its end, and the offset after it."""
    size = os.fstat(descriptor).st_size
    start, tail = size, b""
    while start > 0 and tail.count(b"\n") < 2:
        start = max(0, start - _SEEK_BYTES)
        tail = os.pread(descriptor, size - start, start)
    whole, end, _ = tail.rpartition(b"\n")
    return whole.rpartition(b"\n")[2], start + len(whole) + len(end)


def _write_at(file: BinaryIO, end: int, text: bytes) -> None:
    file.seek(end)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _is_of(line: bytes, entry: Entry) -> bool:
    """Whether the line is this very entry, as after an error that came when it was written already."""
    return line == msgspec.json.encode(entry)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, but for a last one that has no end."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:  # deleted by the writer meanwhile
        return []
