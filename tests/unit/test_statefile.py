"""State files change whole or not at all, one writer at a time."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import msgspec
import pytest

from ratelimit import statefile
from ratelimit.statefile import StateFile, StateFileError, private_folder, write_state


class Note(msgspec.Struct, frozen=True):
    text: str


def test_a_failed_change_is_not_written(tmp_path: Path) -> None:
    """When the block that changes the records fails, the file stays, and the lock is free again."""
    notes = StateFile(tmp_path / "notes.json", Note)
    with notes.changing() as records:
        records.append(Note("kept"))
    with pytest.raises(ZeroDivisionError), notes.changing() as records:
        records.append(Note(str(1 // 0)))
    with notes.changing() as records:
        assert records == [Note("kept")]


def test_a_lock_held_for_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer does not wait for ever for another, and names the lock."""
    monkeypatch.setattr(statefile, "LOCK_TIMEOUT_S", 0.0)
    with (tmp_path / "notes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(StateFileError, match=r"notes\.lock has been held for 0 s"),
            StateFile(tmp_path / "notes.json", Note).changing(),
        ):
            pass


def test_write_state_replaces_the_whole_file(tmp_path: Path) -> None:
    """A shorter document leaves nothing of a longer one, for its owner alone, and no temporary file behind."""
    path = tmp_path / "publication.json"
    path.write_bytes(b"something longer")
    write_state(path, b"short")
    assert path.read_bytes() == b"short"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file of a writer that died with our process id is replaced."""
    monkeypatch.setattr("os.getpid", lambda: 4242)
    (tmp_path / ".notes.json.4242.tmp").write_bytes(b"half")
    write_state(tmp_path / "notes.json", b"whole")
    assert (tmp_path / "notes.json").read_bytes() == b"whole"


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    """A state folder that cannot be made is a clear error."""
    (tmp_path / "file").write_text("")
    notes = StateFile(tmp_path / "file" / "notes.json", Note)
    with pytest.raises(StateFileError, match="cannot make the state folder"), notes.changing():
        pass


@pytest.mark.parametrize("mode", [0o2770, 0o777])
def test_a_folder_of_ours_that_others_may_write_to_is_made_private(tmp_path: Path, mode: int) -> None:
    """As a volume is that was given to a group when it was mounted."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    with StateFile(tmp_path / "state" / "notes.json", Note).changing():
        pass
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) & 0o777 == 0o700


@pytest.mark.parametrize(
    ("uid", "told"), [(os.geteuid(), "storage class"), (4242, "chown it to user")], ids=["ours", "another's"]
)
def test_a_folder_that_stays_open_to_others_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, told: str
) -> None:
    """A filesystem that keeps no modes, or a folder of another user: each with what mends it."""

    def refused(_path: Path, _mode: int) -> None:
        if uid != os.geteuid():
            raise PermissionError

    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    monkeypatch.setattr(Path, "chmod", refused)
    found = (tmp_path / "state").stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: os.stat_result((*found[:4], uid, *found[5:])))
    with pytest.raises(StateFileError, match=told):
        private_folder(tmp_path / "state")
