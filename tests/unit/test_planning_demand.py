"""Demand from declarations, records and traces; what is no demand is refused with the line and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.planning import records
from ratelimit.planning.demand import KEYS_KEPT, MOST_BINS, Asked, CallerDemand, DemandError, replayed, shaped
from ratelimit.planning.records import COLUMNS, is_trace, read_records, read_trace
from ratelimit.usagereport import csv_rows
from serving.capacity import RequestShape
from tests.support.planning import MIX, demand_of
from tests.support.usage import line

TRACE = Path(__file__).parents[2] / "serving" / "mixes" / "azure_llm_2023_conversation.csv"
#: More than the csv module takes for one field, in lines that are not too long by themselves.
OPEN = f"{'x' * 50_000}\n" * 3


def json_line(**fields: str) -> str:
    """A record as JSON, with these fields as they are written."""
    written = {"time": "1", "tier": '"pro"', "key": '"k"', "input_tokens": "3", "output_tokens": "5"} | fields
    return "{" + ", ".join(f'"{name}": {value}' for name, value in written.items()) + "}\n"


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 4)), min_size=1, max_size=50))
def test_a_replay_keeps_every_request(asked: list[tuple[float, int]]) -> None:
    """Rates over all bins add up to the requests recorded, key by key, however they are spread."""
    demand = replayed((Asked(at_s, "pro", f"k{key}", 10, 5) for at_s, key in asked), "test")
    bins = len(demand.callers[0].course)
    counted = sum(sum(each.course) * each.requests_per_s * demand.bin_s for each in demand.callers)
    assert counted == pytest.approx(len(asked))
    assert demand.keys() == {"pro": len({key for _, key in asked})}
    assert bins <= MOST_BINS


def test_the_smallest_keys_of_a_tier_are_taken_together() -> None:
    """However many keys there are, few are told apart; all of them and their requests are counted."""
    asked = [Asked(60.0 * i, "free", f"k{i % (KEYS_KEPT + 30)}", 10, 5) for i in range(KEYS_KEPT + 100)]
    demand = replayed(asked, "test")
    assert len(demand.callers) == KEYS_KEPT + 1
    assert demand.keys() == {"free": KEYS_KEPT + 30}


def test_a_usage_export_is_replayed(tmp_path: Path) -> None:
    """What `penstock usage export` writes gives tiers, keys and lengths, as JSON lines and as CSV; other models' lines
    are left out, and so is what the engine refused.
    """
    lines = [
        line("a", "1-0", key="k_1", tier="pro", model="llama", input_tokens=7, cached_tokens=3, output_tokens=5),
        line("b", "2-0", key="k_2", tier="free", model="llama", input_tokens=4, output_tokens=2),
        line("c", "3-0", key="k_2", tier="free", model="other"),
        line("d", "4-0", key="k_2", tier="free", model="llama", input_tokens=0, output_tokens=0, outcome="refused"),
    ]
    table = tmp_path / "usage.csv"
    table.write_text("".join(csv_rows(lines)))
    found = list(read_records(table, "llama"))
    assert [(asked.tier, asked.key) for asked in found] == [("pro", "k_1"), ("free", "k_2")]
    assert (found[0].input_tokens, found[0].cached_tokens, found[0].output_tokens) == (10, 3, 5)

    objects = tmp_path / "usage.jsonl"
    objects.write_text(
        '{"time": 1700000000, "tier": "pro", "key": "k_1", "input_tokens": 7, "cached_tokens": 3, "output_tokens": 5}\n'
        '{"time": "2026-01-31T12:00:00", "tier": "free", "key": "k_2", "input_tokens": 4, "output_tokens": 2}\n'
    )
    assert [asked.tier for asked in read_records(objects, "llama")] == ["pro", "free"]


def test_a_trace_gives_course_and_lengths() -> None:
    """The public conversation trace: an hour in minutes, its mean rate kept, its peak that of the trace."""
    trace = read_trace(TRACE)
    demand = shaped([CallerDemand("pro", 10, 100.0, MIX)], trace.times_s, "trace")
    each = demand.callers[0]
    assert is_trace(TRACE)
    assert len(trace.shapes) == len(trace.times_s) == 19_366
    assert trace.shapes[0] == RequestShape(374, 44)
    assert sum(each.course) / len(each.course) == pytest.approx(1)
    assert 1.2 < each.peak < 2


def test_spaces_around_the_columns_of_a_trace_mean_nothing(tmp_path: Path) -> None:
    """A heading and rows with spaces after the commas are read like those without."""
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP, ContextTokens , GeneratedTokens\n2023-11-16 18:15:46.68 , 374, 44\n5, 3, 4\n")
    assert is_trace(path)
    assert read_trace(path).shapes == (RequestShape(374, 44), RequestShape(3, 4))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (f'1,3,"{OPEN}', "is a quote left open"),
        ("1,3\n", ":2: has no GeneratedTokens"),
        ("1,2,3\n" * 4, "more than 3 requests"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, said: str) -> None:
    """An open quote, a row cut short, and more requests than are kept are each told."""
    monkeypatch.setattr(records, "MOST_TRACED", 3)
    path = tmp_path / "trace.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    with pytest.raises(DemandError, match=said):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time,tier,key,input_tokens\n1,pro,k,3\n", "output_tokens"),
        ("time,tier,key,input_tokens,output_tokens\n1,pro,k,-3,5\n", ":2: input_tokens is -3"),
        ("time,tier,key,input_tokens,output_tokens\n1,pro,k,3.5,5\n", "whole number"),
        ("time,tier,key,input_tokens,output_tokens\n1700000000000,pro,k,3,5\n", "milliseconds"),
        ("time,tier,key,input_tokens,output_tokens\nnan,pro,k,3,5\n", "not finite"),
        ("time,tier,key,input_tokens,output_tokens\n1,,k,3,5\n", "has no tier"),
        ('{"time": 1}\n', "has no tier"),
        ("{nonsense\n", "no JSON object"),
        ("\xff\xfe", "neither a trace"),
        ('{"time": 1' + "0" * 400 + ', "tier": "pro", "key": "k", "input_tokens": 1, "output_tokens": 1}\n', "log:1: "),
        (
            '{"time": 1' + "0" * 5000 + ', "tier": "pro", "key": "k", "input_tokens": 1, "output_tokens": 1}\n',
            "log:1: ",
        ),
        (
            '{"time": 1, "tier": "pro", "key": "k", "input_tokens": 1' + "0" * 5000 + ', "output_tokens": 1}\n',
            "log:1: ",
        ),
        ('{"time": 1, "tier": 1' + "0" * 5000 + ', "key": "k", "input_tokens": 1, "output_tokens": 1}\n', "log:1: "),
        (f'{",".join(COLUMNS)}\n1,pro,"{OPEN}', "is a quote left open"),
        (f"{','.join(COLUMNS)}\n-1e300,pro,k,3,5\n", "milliseconds"),
    ],
)
def test_what_is_no_record_is_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    """Missing columns, impossible counts and times in milliseconds are named, with what to write."""
    log = tmp_path / "log"
    log.write_text(text)
    with pytest.raises(DemandError, match=said):
        list(read_records(log, "llama"))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    """A missing file and a binary one are told apart from a bad record."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(DemandError, match="not UTF-8"):
        is_trace(binary)
    with pytest.raises(DemandError, match="cannot read"):
        is_trace(tmp_path / "nothing")


@pytest.mark.parametrize("factor", [1e308, 1e20, 1e-323])
def test_a_multiple_that_numbers_cannot_hold_is_refused(factor: float) -> None:
    """Rates beyond what anybody asks, or that come to nothing, are told before they end the arithmetic."""
    with pytest.raises(DemandError, match="nearer to 1"):
        demand_of(times=0.01).times(factor)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_multiple_that_is_none_is_refused(factor: float) -> None:
    """A demand times nothing, less than nothing, or not a number means nothing."""
    with pytest.raises(DemandError, match="above 0"):
        demand_of().times(factor)


def test_nothing_recorded_is_refused() -> None:
    """An export of a quiet hour is no demand."""
    with pytest.raises(DemandError, match="no requests"):
        replayed([], "test")
    with pytest.raises(DemandError, match="no requests"):
        shaped([], [], "test")
