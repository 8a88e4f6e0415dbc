"""A small list of records in one JSON file that survives crashes and concurrent writers.

Writers take an exclusive ``flock`` on a neighbouring lock file, write a temporary file, sync it and rename it over
the old one, so a reader needs no lock and sees the old list or the new one. A file that cannot be understood is
reported and never overwritten.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 5.0
LOCK_RETRY_S = 0.02

T = TypeVar("T")


class StateFileError(RuntimeError):
    """The state cannot be read or written; the message says why and what to do."""


class StateFile(Generic[T]):
    """The records of one type kept in one file of the state folder."""

    def __init__(self, path: Path, record_type: type[T]) -> None:
        self.path = path
        self._record_type = record_type

    def read(self) -> list[T]:
        """The records; none where there is no file yet. Raises ``StateFileError``."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StateFileError(f"cannot read {self.path}: {error.strerror}") from error
        try:
            document = msgspec.json.decode(text)
            if not isinstance(document, dict) or "schema_version" not in document:
                raise StateFileError(self._damaged("it has no schema_version"))
            if document["schema_version"] != SCHEMA_VERSION:
                raise StateFileError(
                    f"{self.path} has schema_version {document['schema_version']!r}, this Penstock reads "
                    f"{SCHEMA_VERSION}; it was left as it is, use the Penstock that wrote it"
                )
            return msgspec.convert(document.get("records"), list[self._record_type])  # type: ignore[name-defined]  # a type only known at run time
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StateFileError(self._damaged(str(error))) from error

    @contextmanager
    def changing(self) -> Iterator[list[T]]:
        """The records, to change in place under the lock; written when the block ends without an exception."""
        private_folder(self.path.parent)
        with self._locked():
            records = self.read()
            yield records
            self._replace(records)

    def _replace(self, records: list[T]) -> None:
        document = {"schema_version": SCHEMA_VERSION, "records": records}
        write_state(self.path, msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock_path = self.path.with_suffix(".lock")
        try:
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StateFileError(f"cannot open {lock_path}: {error.strerror}") from error
        try:
            take_lock(descriptor, lock_path, LOCK_TIMEOUT_S)
            yield
        finally:
            os.close(descriptor)  # also gives the lock back

    def _damaged(self, why: str) -> str:
        return (
            f"{self.path} is damaged ({why}); it was left as it is. Restore it from a backup, "
            f"or move it away to start with an empty one"
        )


def write_state(path: Path, content: bytes) -> None:
    """Replace a file of the state folder as a whole, readable by its owner alone. Raises ``StateFileError``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise StateFileError(f"cannot write {path}: {error.strerror}; the old file is unchanged") from error


def private_folder(path: Path) -> None:
    """Make the folder for its owner alone (0700). One that others may write to is made so, too, where it is ours.

    Kubernetes gives a volume to a group at each mount (``fsGroup``). A folder that stays open to others is refused with
    ``StateFileError``: whoever writes there gives out API keys.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _others_may_write(path):
            with suppress(PermissionError):  # it is another's: said below
                path.chmod(0o700)
                log.warning("others could write to the state folder %s until now: it is 0700 from now on", path)
        found = path.stat()
    except OSError as error:
        raise StateFileError(f"cannot make the state folder {path}: {error.strerror}") from error
    if not found.st_mode & 0o022:
        return
    mode = f"{stat.S_IMODE(found.st_mode):04o}"
    if found.st_uid != os.geteuid():
        raise StateFileError(
            f"other users may write to the state folder {path} (mode {mode}), which belongs to user {found.st_uid}: "
            f"as that user, chmod 700 it, or chown it to user {os.geteuid()}"
        )
    raise StateFileError(
        f"other users may write to the state folder {path} (mode {mode}), and its filesystem keeps no other mode: use "
        "a storage class whose volumes have Unix permissions (a disk, NFS 4, CephFS), or mount it with dir_mode=0700"
    )


def _others_may_write(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o022)


def take_lock(descriptor: int, lock_path: Path, timeout_s: float) -> None:
    """Wait for the lock of this open file. Raises ``StateFileError`` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise StateFileError(f"{lock_path} has been held for {timeout_s:g} s by another process") from error
            time.sleep(LOCK_RETRY_S)
        else:
            return


def sync_folder(folder: Path) -> None:
    """Have the folder's own entries on the disk: a new name in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
