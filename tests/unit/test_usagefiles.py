"""The usage ledger's files survive a writer that dies at any byte."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ratelimit.statefile import StateFileError
from ratelimit.usage import EntryId, LedgerLine
from ratelimit.usagefiles import Unreadable, UsageFiles
from tests.support.usage import line

DAY_MS = 86_400_000
#: 2023-11-14, a minute before midnight, UTC.
LATE_MS = 1_700_006_340_000


def all_lines(files: UsageFiles) -> list[LedgerLine]:
    return list(files.lines(0, LATE_MS + 10 * DAY_MS))


def test_a_line_goes_into_the_file_of_its_utc_day(tmp_path: Path) -> None:
    """A batch over midnight is parted; the files are for their owner alone."""
    files = UsageFiles(tmp_path)
    batch = [line("a", f"{LATE_MS}-0"), line("b", f"{LATE_MS + 120_000}-0")]

    files.append(batch)

    assert sorted(path.name for path in files.folder.iterdir()) == ["2023-11-14.jsonl", "2023-11-15.jsonl"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files.folder.iterdir())
    assert all_lines(files) == batch


def test_a_half_written_line_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    """Wherever a writer died, whole lines stay, readers do not see the rest, and the next writer goes on after them."""
    files = UsageFiles(tmp_path)
    first, second, third = (line(name, f"{LATE_MS}-{number}") for number, name in enumerate("abc"))
    files.append([first])
    path = files.folder / "2023-11-14.jsonl"
    whole = path.read_bytes()
    files.append([second])
    for end in (len(whole), len(whole) + 1, len(path.read_bytes()) - 1):
        path.write_bytes(path.read_bytes()[:end])
        assert all_lines(files) == [first]
        assert files.written("llama", EntryId(0, 0), EntryId(LATE_MS, 9)) == {(first.entry, "a")}
        files.append([third])
        assert all_lines(files) == [first, third]
        files.append([second])
        path.write_bytes(whole + path.read_bytes()[len(whole) :].splitlines(keepends=True)[1])


def test_a_file_of_one_half_line_is_begun_anew(tmp_path: Path) -> None:
    """A writer that died within its first line, however long that is, leaves nothing behind."""
    files = UsageFiles(tmp_path)
    files.folder.mkdir(mode=0o700)
    (files.folder / "2023-11-14.jsonl").write_bytes(b'{"id":' + 200_000 * b" ")
    files.append([line("a", f"{LATE_MS}-0")])
    assert all_lines(files) == [line("a", f"{LATE_MS}-0")]
    assert (files.folder / "2023-11-14.jsonl").read_bytes().endswith(b"}\n")


def test_written_looks_at_one_cell_and_its_span(tmp_path: Path) -> None:
    """A line of another cell with the same entry id is another line."""
    files = UsageFiles(tmp_path)
    files.append([line("a", f"{LATE_MS}-0"), line("b", f"{LATE_MS}-1"), line("c", f"{LATE_MS}-1", cell="other")])

    assert files.written("llama", EntryId(LATE_MS, 1), EntryId(LATE_MS, 5)) == {(f"{LATE_MS}-1", "b")}


def test_lines_are_chosen_by_the_time_of_their_entry(tmp_path: Path) -> None:
    """From a moment on, before another: two periods that touch share no record and lose none."""
    files = UsageFiles(tmp_path)
    files.append([line(str(i), f"{LATE_MS + i}-0") for i in range(4)])

    assert [found.id for found in files.lines(LATE_MS + 1, LATE_MS + 3)] == ["1", "2"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    """A bill is not made from a file that lost something in the middle."""
    files = UsageFiles(tmp_path)
    files.append([line("a", f"{LATE_MS}-0")])
    path = files.folder / "2023-11-14.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "b"}\n')

    with pytest.raises(StateFileError, match=r"2023-11-14\.jsonl:2 is damaged"):
        all_lines(files)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """A second controller of one state folder writes nothing until the first has ended."""
    with UsageFiles(tmp_path).writing() as first, UsageFiles(tmp_path).writing() as second:
        assert (first, second) == (True, False)
    with UsageFiles(tmp_path).writing() as third:
        assert third


def test_what_is_no_record_is_set_aside(tmp_path: Path) -> None:
    """It is kept for somebody to look at, and is in nobody's bill."""
    files = UsageFiles(tmp_path)
    files.append_unreadable([Unreadable("llama", f"{LATE_MS}-0", "why", {"record": "{"})])
    assert "why" in (files.folder / "unreadable.jsonl").read_text()
    assert all_lines(files) == []
