"""Which installation a state folder is: its API keys, overrides and records belong together, and to one Redis.

The id is made once and kept in the folder. The leader writes it to Redis beside its lease, and a candidate from another
folder does not lead there (see ``leadership``): it would put its own keys, maybe none, in place of those in force.
"""

from __future__ import annotations

from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import msgspec

from ratelimit.statefile import StateFile


class Installation(NamedTuple):
    """A state folder and its id."""

    id: str
    state_dir: Path


class _Record(msgspec.Struct, frozen=True):
    id: str


def installation_of(state_dir: Path) -> Installation:
    """The folder's installation; its id is made where it has none. Raises ``StateFileError``."""
    file = StateFile(state_dir / "installation.json", _Record)
    records = file.read()
    if not records:
        with file.changing() as records:  # another process may have made it meanwhile
            if not records:
                records.append(_Record(token_hex(8)))
    return Installation(records[0].id, state_dir)
