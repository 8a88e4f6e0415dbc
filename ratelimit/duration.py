"""Durations as people type them: ``90s``, ``15m``, ``2h``, ``30d``."""

from __future__ import annotations

import re

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_S = 3660 * 86400


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``2h`` or ``1h30m``. Raises ``ValueError`` saying what is accepted."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not parts or "".join(amount + unit for amount, unit in parts) != text.strip():
        raise ValueError(f"{text!r} is not a duration; write a number and a unit, such as 90s, 15m, 2h or 30d")
    seconds = sum(float(amount) * _UNIT_S[unit] for amount, unit in parts)
    if not 0 < seconds <= _MOST_S:
        raise ValueError(f"{text!r} is out of range; a duration is above 0 and at most ten years")
    return seconds
