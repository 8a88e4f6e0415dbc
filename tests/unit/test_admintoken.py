from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from ratelimit.admintoken import AdminTokenError, admin_token, token_file


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    """Every start finds the same 256 random bits, in a file of mode 0600 and nothing beside it."""
    state_dir = tmp_path / "state"

    token = admin_token(state_dir, None)

    assert len(token) == 43
    assert admin_token(state_dir, None) == token
    assert admin_token(tmp_path / "other", None) != token
    (path,) = state_dir.iterdir()
    assert path == token_file(state_dir, None)
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(state_dir.stat().st_mode)) == (0o600, 0o700)


def test_processes_that_start_together_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of workers that all find no token, one makes it, and all have that one."""
    together = threading.Barrier(4)
    makers = iter(range(100))
    monkeypatch.setattr("os.getpid", lambda: next(makers))
    exists = Path.exists

    def all_find_none(path: Path) -> bool:
        found = exists(path)
        together.wait(20)
        return found

    monkeypatch.setattr(Path, "exists", all_find_none)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(admin_token(tmp_path, None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4
    assert len(set(found)) == 1


def test_the_operators_file_is_read_without_its_line_feed(tmp_path: Path) -> None:
    """A secret mounted from elsewhere is used as it is, and nothing is made."""
    mounted = tmp_path / "mounted"
    mounted.write_text("a-token-of-our-own\n")
    assert admin_token(tmp_path / "state", mounted) == "a-token-of-our-own"
    assert token_file(tmp_path / "state", mounted) == mounted
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("content", [b"", b"short", b"two words are not one token", b"\xff" * 32, b"x" * 5000])
def test_a_file_without_a_usable_token_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty or weak token would leave the admin port open; the message does not repeat it."""
    mounted = tmp_path / "mounted"
    mounted.write_bytes(content)
    with pytest.raises(AdminTokenError, match=r"mounted holds no admin token.*openssl rand") as refused:
        admin_token(tmp_path, mounted)
    assert not content.strip() or content.decode("latin-1") not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A path in the config that leads nowhere is an error, and no token is made there."""
    with pytest.raises(AdminTokenError, match=r"cannot read the admin token in .*nowhere: No such file"):
        admin_token(tmp_path, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
