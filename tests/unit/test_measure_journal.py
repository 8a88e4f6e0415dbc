from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from serving.capacity import EngineLimits
from serving.journal import Journal, JournalError
from serving.measure import fitting_mix
from serving.records import Record
from tests.support.measured import anchor_of

LIMITS = EngineLimits(32, 2048, 10_240, 512)
SETTINGS = {"slo": "1 s", "endpoint": "http://127.0.0.1:1"}


@pytest.fixture(scope="module")
def record() -> Record:
    """One finished run."""
    return anchor_of(fitting_mix("chat", LIMITS), LIMITS)


def written(path: Path, *records: Record) -> Path:
    """A journal that was interrupted after these runs."""
    with Journal(path, SETTINGS) as journal:
        for one in records:
            journal.add(one)
    return path


def test_a_journal_gives_its_runs_back(tmp_path: Path, record: Record) -> None:
    """With every request, and says that it goes on."""
    path = written(tmp_path / "journal", record, record)
    with Journal(path, SETTINGS) as journal:
        assert journal.records == [record, record]
        assert "going on after 2 finished points" in journal.news


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, record: Record) -> None:
    """Whatever a crash left of it: the next line is whole again."""
    path = written(tmp_path / "journal", record)
    whole = path.read_bytes()
    for cut in (1, 10, 500):
        path.write_bytes(whole + whole.splitlines()[1][:cut])
        with Journal(path, SETTINGS) as journal:
            assert journal.records == [record]
            journal.add(record)
        with Journal(path, SETTINGS) as journal:
            assert journal.records == [record, record]


def test_a_header_that_was_cut_off_is_no_journal(tmp_path: Path, record: Record) -> None:
    """It is begun again."""
    path = tmp_path / "journal"
    path.write_bytes(b'{"type":"hea')
    written(path, record)
    with Journal(path, SETTINGS) as journal:
        assert journal.records == [record]


def test_a_changed_setting_starts_anew_and_says_which(tmp_path: Path, record: Record) -> None:
    """The old points are kept aside."""
    path = written(tmp_path / "journal", record)
    with Journal(path, {**SETTINGS, "slo": "2 s"}) as journal:
        assert journal.records == []
        assert "slo was 1 s and is 2 s; measuring anew" in journal.news
    with Journal(path.with_name("journal.old"), SETTINGS) as journal:
        assert journal.records == [record]


def test_an_unsteady_run_is_run_again(tmp_path: Path, record: Record) -> None:
    """It decided nothing that a rerun should inherit."""
    unsteady = msgspec.structs.replace(record, run=msgspec.structs.replace(record.run, state="unsteady"))
    path = written(tmp_path / "journal", record, unsteady)
    with Journal(path, SETTINGS) as journal:
        assert journal.records == [record]


def test_two_measurements_do_not_share_a_journal(tmp_path: Path) -> None:
    """The second is told to wait."""
    with Journal(tmp_path / "journal", SETTINGS), pytest.raises(JournalError, match="is in use"):
        Journal(tmp_path / "journal", SETTINGS).__enter__()


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    """The line is named, and nothing is overwritten."""
    path = tmp_path / "journal"
    path.write_text('{"type":"header","version":"2","settings":{}}\nnonsense\n')
    with pytest.raises(JournalError, match=r"line 2 of .* is no line of a journal"):
        Journal(path, SETTINGS).__enter__()
    assert "nonsense" in path.read_text()
    path.write_text('{"type":"complete"}\n')
    with pytest.raises(JournalError, match="does not begin as a journal does"):
        Journal(path, SETTINGS).__enter__()
