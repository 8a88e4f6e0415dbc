from __future__ import annotations

import csv
import io

import msgspec
import pytest

from ratelimit.usagereport import (
    REPEATED_WITHIN_S,
    Totals,
    Wanted,
    csv_rows,
    parse_groupings,
    parse_moment,
    totals,
    without_repeats,
)
from tests.support.usage import line

NOW_S = 1_700_000_000.0


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [
        ("2023-11-14", 1_699_920_000_000),
        ("2023-11-14T22:13:20", 1_700_000_000_000),
        ("2023-11-14T23:13:20+01:00", 1_700_000_000_000),
        ("2h", 1_699_992_800_000),
    ],
)
def test_moments_are_utc_unless_they_say_otherwise(text: str, expected_ms: int) -> None:
    """Dates, times and durations ago."""
    assert parse_moment(text, NOW_S) == expected_ms


@pytest.mark.parametrize("text", ["", "yesterday", "2023-13-01", "-2h"])
def test_what_is_no_moment_is_refused_with_what_is(text: str) -> None:
    """The message shows both forms."""
    with pytest.raises(ValueError, match=r"2026-01-31.*7d"):
        parse_moment(text, NOW_S)


def test_a_request_is_counted_once() -> None:
    """A settlement that was recorded twice, because Redis had lost the first, is one; much later an id may return."""
    later_ms = round(1000 * REPEATED_WITHIN_S) + 2
    lines = [line("a", "1-0"), line("b", "1-1"), line("a", "2-0", cell="other"), line("a", f"{later_ms}-0")]

    assert [each.entry for each in without_repeats(lines)] == ["1-0", "1-1", f"{later_ms}-0"]


def test_only_what_is_asked_for_matches() -> None:
    """Key, org and model each narrow it down."""
    ours = line("a", "1-0")
    assert Wanted().matches(ours)
    assert Wanted(key="k_1", org="acme", model="llama").matches(ours)
    for other in (Wanted(key="k_2"), Wanted(org="k_1"), Wanted(model="acme")):
        assert not other.matches(ours)


def test_totals_by_any_of_the_names() -> None:
    """Each combination has its own sums, in the order of the names."""
    lines = [line("a", "1-0", key="k_2"), line("b", "1-1"), line("c", "1-2", cached_tokens=3, org="zeta")]

    assert totals(lines, ("org",)) == {
        ("acme",): Totals(2, 20, 0, 10, 4_000_000),
        ("zeta",): Totals(1, 10, 3, 5, 2_000_000),
    }
    assert list(totals(lines, ("key", "model"))) == [("k_1", "llama"), ("k_2", "llama")]


@pytest.mark.parametrize("text", ["", "secret", "key,key", "key,"])
def test_what_nothing_can_be_summed_by_is_refused(text: str) -> None:
    """The message names what there is."""
    with pytest.raises(ValueError, match="key, org, model, tier"):
        parse_groupings(text)


def test_csv_is_read_back_whole() -> None:
    """Every field has a column, whatever is in it."""
    odd = line("a", "1-0", model='with, "quotes"', marks=("shadow", "local"))

    (row,) = csv.DictReader(io.StringIO("".join(csv_rows([odd]))))

    assert row.keys() == msgspec.structs.asdict(odd).keys()
    assert (row["model"], row["marks"], row["stream"], row["cost_us"]) == (
        odd.model,
        "shadow local",
        "false",
        "2000000",
    )
