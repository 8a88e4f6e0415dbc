"""The handle on a running virtual GPU: a small file that its executor watches.

A test or a demo writes it to change the device's speed, to freeze it (steps stop, ``/health`` still says 200), or to
crash it (the engine core ends as if killed). Written whole or not at all, by a rename.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec


class ControlError(ValueError):
    """A control file or a command that means nothing."""


class ControlState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the device is told: how many times its profile's speed it runs at, and whether it runs at all."""

    speed: float = 1.0
    mode: Literal["run", "frozen", "crashed"] = "run"


class VirtualGpuControl:
    """Commands to one virtual GPU; each takes effect at the end of the device's current step at the latest."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def set_speed(self, factor: float) -> None:
        """Run at ``factor`` times the speed of the profile and its slowdown; 1 is as started."""
        if not 0 < factor < float("inf"):
            raise ControlError(f"speed factor {factor} is not a positive number")
        self._write(msgspec.structs.replace(self.state(), speed=factor))

    def freeze(self) -> None:
        """Stop making steps, as a hung GPU does; nothing fails, nothing ends."""
        self._write(msgspec.structs.replace(self.state(), mode="frozen"))

    def thaw(self) -> None:
        """Go on where ``freeze`` stopped."""
        self._write(msgspec.structs.replace(self.state(), mode="run"))

    def crash(self) -> None:
        """End the engine core at once, as a fatal device error does."""
        self._write(msgspec.structs.replace(self.state(), mode="crashed"))

    def reset(self) -> None:
        """Forget what an earlier device of the same path was told."""
        self._write(ControlState())

    def state(self) -> ControlState:
        """What the device is told now. Raises ``ControlError`` for a file that is no control file."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=ControlState)
        except FileNotFoundError:
            return ControlState()
        except msgspec.MsgspecError as error:
            raise ControlError(f"{self._path} is not a control file: {error}") from error

    def version(self) -> int:
        """A number that differs after each command; 0 before the first."""
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _write(self, state: ControlState) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(state))
        draft.replace(self._path)
