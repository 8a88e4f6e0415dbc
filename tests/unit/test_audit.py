"""The audit log keeps every epoch, within its bounds, whatever happens to its writer."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from ratelimit import audit
from ratelimit.audit import AuditLog, Entry
from ratelimit.difference import Difference, snapshot
from ratelimit.publication import Publication
from ratelimit.statefile import StateFileError


def entry(epoch: int, cause: str = "test") -> Entry:
    published = snapshot(Publication(epoch, "2026-11-21T10:00:00+00:00", cause, True, (), ()))
    return Entry(epoch, "2026-11-21T10:00:00+00:00", cause, epoch - 1, Difference(), published)


def epochs(log: AuditLog) -> list[int]:
    return [each.epoch for each in log.entries()]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "audit").glob("*.jsonl"))


def test_epochs_are_kept_newest_first_and_found_by_number(tmp_path: Path) -> None:
    """What was appended is read back whole, also by another process's log."""
    for epoch in (1, 2, 3):
        AuditLog(tmp_path).append(entry(epoch))

    assert list(AuditLog(tmp_path).entries()) == [entry(3), entry(2), entry(1)]
    assert AuditLog(tmp_path).epoch(2) == entry(2)
    assert AuditLog(tmp_path).newest() == entry(3)


def test_an_epoch_that_is_not_kept_names_those_that_are(tmp_path: Path) -> None:
    """The message says what could have been asked for."""
    log = AuditLog(tmp_path)
    with pytest.raises(StateFileError, match="no epoch is kept"):
        log.epoch(4)
    log.append(entry(2))
    log.append(entry(3))

    with pytest.raises(StateFileError, match="epochs 2 to 3 are kept"):
        log.epoch(4)


def test_the_log_is_for_its_owner_alone(tmp_path: Path) -> None:
    """It tells of every tier's limits."""
    AuditLog(tmp_path).append(entry(1))

    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files(tmp_path))


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("torn", [b"{", b'{"epoch": 9, "at', b"x" * 200_000])
def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path: Path, kept: int, torn: bytes) -> None:
    """A writer that died in the middle of a line costs that line and no other."""
    log = AuditLog(tmp_path)
    for epoch in range(1, kept + 1):
        log.append(entry(epoch))
    (tmp_path / "audit").mkdir(mode=0o700, exist_ok=True)
    with (tmp_path / "audit" / "00000001.jsonl").open("ab") as file:
        file.write(torn)

    assert epochs(log) == list(range(kept, 0, -1))
    log.append(entry(10))
    assert epochs(log) == [10, *range(kept, 0, -1)]
    assert len(files(tmp_path)[0].read_bytes().splitlines()) == kept + 1


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    """Somebody has edited the log: the reader says where, and the writer does not touch it."""
    log = AuditLog(tmp_path)
    log.append(entry(1))
    with files(tmp_path)[0].open("ab") as file:
        file.write(b"nonsense\n")
    log.append(entry(2))

    with pytest.raises(StateFileError, match=r"00000001.jsonl:2 is damaged .*mend the line"):
        list(log.entries())


def test_an_epoch_whose_append_failed_when_it_was_written_is_not_kept_twice(tmp_path: Path) -> None:
    """The next try after an error finds the line there."""
    log = AuditLog(tmp_path)
    log.append(entry(1))
    log.append(entry(1))

    assert epochs(log) == [1]


def test_the_log_stays_within_its_bounds(tmp_path: Path) -> None:
    """Old files go, the newest epochs stay, and no number is used again."""
    log = AuditLog(tmp_path, file_bytes=1000, most_files=3)
    for epoch in range(1, 51):
        log.append(entry(epoch))

    kept = epochs(log)
    assert kept == list(range(50, 50 - len(kept), -1))
    assert len(files(tmp_path)) <= 3
    line = len(files(tmp_path)[0].read_bytes().splitlines()[0])
    assert all(path.stat().st_size <= 1000 + line for path in files(tmp_path))
    assert int(files(tmp_path)[-1].stem) > 3


def _append_many(folder: Path, first: int, count: int) -> None:
    for epoch in range(first, first + count):
        AuditLog(folder, file_bytes=4000, most_files=100).append(entry(epoch))


def test_two_writers_lose_and_tear_nothing(tmp_path: Path) -> None:
    """Two controllers by mistake, over files that are followed by others: every line is there and whole."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(tmp_path, first, 40)) for first in (1000, 2000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0

    assert sorted(epochs(AuditLog(tmp_path))) == [*range(1000, 1040), *range(2000, 2040)]


def test_a_writer_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is never given back fails the append, which may be tried again."""
    log = AuditLog(tmp_path)
    log.append(entry(1))
    monkeypatch.setattr(audit, "LOCK_TIMEOUT_S", 0.05)
    holder = os.open(tmp_path / "audit" / "writer.lock", os.O_RDWR)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(StateFileError, match=r"writer\.lock has been held for 0\.05 s"):
            log.append(entry(2))
    finally:
        os.close(holder)

    log.append(entry(2))
    assert epochs(log) == [2, 1]
