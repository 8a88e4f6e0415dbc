from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.benchgroups import GroupReport, fit_groups
from serving.benchrows import OPTIONAL_COLUMNS, TEXT_COLUMNS, TOTAL_COLUMNS, BenchFileError, read_rows
from serving.importers import import_results
from serving.rowchecks import row_problem

COLUMNS = ("section", "hardware", *TEXT_COLUMNS, *TOTAL_COLUMNS, *OPTIONAL_COLUMNS)
#: An open loop of 500 s: 2 requests/s of 5.1 s each, so 10.2 in flight.
GOOD = {
    "section": "Rates > vLLM",
    "hardware": "8 × NVIDIA H100 SXM GPUs on a single node.",
    "model": "qwen3-8b",
    "gpu": "h100",
    "engine": "vllm",
    "serve_command": "vllm serve Qwen/Qwen3-8B",
    "requests": "1000",
    "duration_s": "500",
    "input_tokens": "1000000",
    "output_tokens": "501000",
    "req_s": "2.00",
    "output_tok_s": "1002.00",
    "total_tok_s": "3002.00",
    "ttft_mean_ms": "100",
    "ttft_p50_ms": "90",
    "ttft_p99_ms": "300",
    "tpot_mean_ms": "10",
    "tpot_p50_ms": "9.8",
    "tpot_p99_ms": "14",
    "itl_mean_ms": "10",
    "itl_p99_ms": "30",
    "peak_concurrency": "22",
}


def lines(*changes: dict[str, str]) -> list[str]:
    """A file of the good row, once with each of the changes."""
    rows = [GOOD | change for change in changes]
    return [",".join(COLUMNS), *(",".join(f'"{row[column]}"' for column in COLUMNS) for row in rows)]


def only_report(*changes: dict[str, str]) -> GroupReport:
    """What is said of the one group of these rows."""
    (report,) = fit_groups(lines(*changes))
    return report


def test_the_good_row_has_no_problem() -> None:
    """What the other tests change is right as it stands."""
    (row,), refused = read_rows(lines({}))

    assert refused == []
    assert row_problem(row) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"duration_s": "nan"}, "duration_s is nan, it must be a finite number"),
        ({"duration_s": "-500"}, "duration_s is -500, it must be a finite number of at least 0"),
        ({"output_tokens": "inf"}, "output_tokens is inf"),
        ({"input_tokens": "1,000,000"}, "must be a number, without unit or thousands separator"),
        ({"ttft_mean_ms": "100ms"}, "ttft_mean_ms is '100ms', it must be a number"),
        ({"requests": ""}, "requests is empty"),
        ({"requests": "0"}, "requests is 0: nothing was measured"),
        ({"itl_mean_ms": "0.00"}, "itl_mean_ms is 0: nothing was measured"),
        ({"model": ""}, "model is empty"),
        ({"requests": "0.4", "input_tokens": "5", "output_tokens": "5"}, "requests is 0.4, it must be a whole number"),
        ({"output_tokens": "501000.5"}, "output_tokens is 501000.5, it must be a whole number"),
        ({"serve_command": "vllm serve m --kv-transfer-config kv_producer"}, "prefill and decode ran on GPUs of their"),
        ({"serve_command": "python -m sglang.launch_server --disaggregation-mode prefill"}, "no rate of one replica"),
        ({"input_tokens": "1e300"}, "input_tokens is 1e300, beyond anything that was ever measured"),
        ({"duration_s": "1e-9"}, "duration_s is 1e-9, beyond anything"),
        ({"output_tokens": "900"}, "each has at least one of both"),
        ({"peak_concurrency": "1001"}, "no more can be in flight than there are"),
        ({"section": "Choosing > SGLang"}, "section is of sglang, engine says vllm"),
        ({"output_tok_s": "1100"}, "output_tok_s is 1100, but its total of 501000 in 500 s makes 1002"),
        ({"duration_s": "500000"}, "req_s is 2, but .*factor of 1000"),
        ({"duration_s": "0.5"}, "req_s is 2, but .*factor of 1000"),
        ({"input_tokens": "1000"}, "total_tok_s is 3002, but"),
        ({"ttft_p50_ms": "400"}, "TTFT is 0.4 s at the 50th percentile, above 0.3 s at the 99th"),
        ({"ttft_mean_ms": "100000"}, "mean TTFT of 100 s is far above its 99th percentile"),
        ({"tpot_mean_ms": "0.01"}, "mean TPOT is 1e-05 s and the median 0.0098 s; .*units"),
        ({"tpot_mean_ms": "0.3", "tpot_p50_ms": "0.3"}, "mean TPOT is 0.3 ms and its mean ITL 10 ms"),
        ({"itl_mean_ms": "10000"}, "mean TPOT is 10 ms and its mean ITL 1e.04 ms"),
        (
            {"tpot_mean_ms": "0.01", "tpot_p50_ms": "0.0098", "tpot_p99_ms": "0.014", "itl_mean_ms": "0.01"},
            "tpot_mean_s is 0.01 ms, which no server reaches",
        ),
        (
            {"tpot_mean_ms": "10000", "tpot_p50_ms": "9800", "tpot_p99_ms": "14000", "itl_mean_ms": "10000"},
            "requests took 5e.03 s in the mean, longer than the run of 500 s",
        ),
        ({"peak_concurrency": "5"}, "10.2 requests in flight in the mean, above the 5 that it allowed"),
        ({"peak_concurrency": "1000"}, "10.2 requests in flight in the mean, of 1000 that were sent together"),
    ],
)
def test_a_row_that_cannot_be_true_is_refused_with_its_problem(change: dict[str, str], problem: str) -> None:
    """Malformed, contradictory and impossible rows are named by line, with what is wrong."""
    report = only_report(change)

    assert (report.status, report.points) == ("refused", 0)
    (refusal,) = report.refused
    assert refusal.startswith("line 2: ")
    assert re.search(problem, refusal), refusal
    assert report.reason.startswith("no usable row of 1: line 2: ")


def test_more_tokens_than_the_gpus_can_multiply_are_refused() -> None:
    """A hundred times the prompts in the same time are beyond the data sheet, though the row agrees with itself."""
    report = only_report(
        {"input_tokens": "100000000", "total_tok_s": "201002.00"},
    )

    assert "times what 1 × H100 can multiply for qwen3-8b" in report.refused[0]


def test_a_bad_row_does_not_stop_the_rest() -> None:
    """Of three rows the broken one is named, and the others are fitted."""
    report = only_report({}, {"duration_s": "nan"}, {"output_tokens": "502000", "output_tok_s": "", "total_tok_s": ""})

    assert (report.status, report.points, report.steady_points) == ("estimated", 2, 2)
    assert [each.split(":")[0] for each in report.refused] == ["line 3"]


def test_a_run_told_twice_counts_once() -> None:
    """The same figures in two rows are one run."""
    report = only_report({}, {"section": "the same again"})

    assert report.points == 1
    assert report.refused == ("line 3: the same run as line 2: told twice, it would count twice",)


def test_blank_figures_are_not_figures() -> None:
    """A row without latencies, rates and concurrency is used for what it says."""
    report = only_report(dict.fromkeys(OPTIONAL_COLUMNS, ""))

    assert (report.status, report.points, report.steady_points) == ("estimated", 1, 0)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(COLUMNS),
        st.one_of(st.floats().map(str), st.text("0123456789.eE+-x,;", max_size=8), st.integers(-5, 10**12).map(str)),
        max_size=6,
    )
)
def test_whatever_a_row_holds_it_ends_in_a_status(change: dict[str, str]) -> None:
    """No text in any column stops the fit of the file; what is fitted is finite and not negative."""
    reports = fit_groups(lines(change, {"gpu": "unknown", "model": "unknown"} | change))

    assert sum(report.points + len(report.refused) for report in reports) == 2
    for report in reports:
        assert report.status in ("estimated", "refused")
        assert report.residual_max is None or 0 <= report.residual_max < float("inf")


@pytest.mark.parametrize("column", ["is_disagg", "num_decode_gpus"])
def test_a_column_that_says_disaggregated_is_heeded(column: str) -> None:
    """Columns beside ours are not read, but for those that say what the rates are divided by."""
    header, row = lines({})
    (report,) = fit_groups([f"{header},{column}", f"{row},4"])
    (unset,) = fit_groups([f"{header},{column}", f"{row},0"])

    assert report.status == "refused"
    assert f"{column} is '4': prefill and decode" in report.refused[0]
    assert unset.status == "estimated"


@pytest.mark.parametrize("place", [0, 1])
def test_a_cell_without_end_is_no_traceback(place: int) -> None:
    """What the CSV reader refuses is a file that cannot be read, in the first line as in any other."""
    broken = lines({})
    broken[place] = "x" * 200_000 + "," + broken[place]

    with pytest.raises(BenchFileError, match=rf"line {place}: not CSV: field larger"):
        fit_groups(broken)


def test_fit_and_import_refuse_the_same_rows() -> None:
    """One set of rules: what the one leaves out, the other does, for the same reason."""
    rows = lines(
        {},
        {"section": "the same again"},
        {"requests": "1000.5"},
        {"ttft_p50_ms": "400"},
        {"input_tokens": "100000000", "total_tok_s": "201002.00"},
        {"serve_command": "vllm serve m --kv-transfer-config kv_consumer"},
    )
    fitted = {refusal for report in fit_groups(rows) for refusal in report.refused}
    imported = import_results("\n".join(rows).encode(), "rows.csv").refused

    assert {f"{each.where.removeprefix('rows.csv ')}: {each.reason}" for each in imported} == fitted
    assert len(fitted) == 5


def test_a_file_without_the_columns_is_refused() -> None:
    """What is missing is named."""
    with pytest.raises(BenchFileError, match=r"columns engine, serve_command, .* are missing"):
        fit_groups(["model,gpu", "a,b"])
    with pytest.raises(BenchFileError, match="are missing"):
        fit_groups([])
