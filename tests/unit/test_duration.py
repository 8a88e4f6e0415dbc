"""Durations are read as people write them, and nothing else is."""

from __future__ import annotations

import pytest

from ratelimit.duration import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("2h", 7200), ("30d", 2_592_000), ("1h30m", 5400), (" 0.5h ", 1800)],
)
def test_durations(text: str, seconds: float) -> None:
    """A number and a unit, or several, are that many seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 h", "-2h", "2w", "2hx", "1e3s", "2H"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """The message shows what would have been right."""
    with pytest.raises(ValueError, match=r"is not a duration; write a number and a unit, such as 90s"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0s", "100000d"])
def test_durations_out_of_range_are_refused(text: str) -> None:
    """None at all, and more than ten years, are slips."""
    with pytest.raises(ValueError, match="above 0 and at most ten years"):
        parse_duration(text)
