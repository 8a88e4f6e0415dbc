"""The token that the admin ports ask for: the operator's own file, or one that is made once in the state folder."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from ratelimit.statefile import private_folder

_TOKEN_BYTES = 32
_LONGEST_TOKEN = 4096
_USABLE = re.compile(r"[!-~]{16,}")


class AdminTokenError(RuntimeError):
    """There is no token to be had; the message says why and what to do, and never the token."""


def token_file(state_dir: Path, configured: Path | None) -> Path:
    """Where the token is."""
    return state_dir / "admin_token" if configured is None else configured


def admin_token(state_dir: Path, configured: Path | None) -> str:
    """The token; made, for its owner alone, where the config names no file and there is none yet.

    Raises ``AdminTokenError`` or ``StateFileError``.
    """
    path = token_file(state_dir, configured)
    if configured is None and not path.exists():
        private_folder(state_dir)
        _make(path)
    return _read(path)


def _make(path: Path) -> None:
    """Put a new token there, whole, unless another process was faster."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            return
        finally:
            draft.unlink()
    except OSError as error:
        raise AdminTokenError(f"cannot make the admin token in {path}: {error.strerror}") from error


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            token = file.read(_LONGEST_TOKEN + 1).strip().decode("ascii", errors="replace")
    except OSError as error:
        raise AdminTokenError(f"cannot read the admin token in {path}: {error.strerror}") from error
    if len(token) > _LONGEST_TOKEN or not _USABLE.fullmatch(token):
        raise AdminTokenError(
            f"{path} holds no admin token: write one line of at least 16 letters, digits or signs without spaces, "
            "as `openssl rand -hex 32` prints"
        )
    return token
