"""The published results that come with Penstock, row by row as their publishers gave them."""

from __future__ import annotations

import csv
from importlib.resources import files

import msgspec

from serving.benchrows import BenchRow, read_rows
from serving.capacity import RequestShape

MLPERF_FILE = "mlperf_rows.csv"
BENCH_FILE = "bench_serve_results.csv"
BENCH_SOURCE = "gpustack/gpustack@47277d7"


class PublishedRow(msgspec.Struct, frozen=True):
    """One MLPerf result, per GPU."""

    result_id: str
    gpu: str
    model: str
    scenario: str
    output_tokens_per_s: float
    weight_dtype: str
    software: str
    submitter: str
    mlperf_round: str


def published_rows() -> list[PublishedRow]:
    """The MLPerf rows that come with Penstock."""
    return [
        PublishedRow(
            result_id=row["result_id"],
            gpu=row["gpu"],
            model=row["model"],
            scenario=row["scenario"],
            output_tokens_per_s=float(row["output_tok_s_per_gpu"]),
            weight_dtype=row["weight_dtype"],
            software=row["software"],
            submitter=row["submitter"],
            mlperf_round=row["round"],
        )
        for row in csv.DictReader(_text(MLPERF_FILE).splitlines())
    ]


def bench_lines() -> list[str]:
    """The file of benchmark runs that comes with Penstock, line by line."""
    return _text(BENCH_FILE).splitlines()


def bench_rows() -> list[BenchRow]:
    """Its rows."""
    return read_rows(bench_lines())[0]


def mean_shape(row: BenchRow) -> RequestShape:
    """The mean request of a benchmark's run."""
    requests = row.number("requests")
    inputs, outputs = row.number("input_tokens") / requests, row.number("output_tokens") / requests
    return RequestShape(max(1, round(inputs)), max(1, round(outputs)))


def run_text(row: BenchRow) -> str:
    """The run in one line: where it was published, and what it was."""
    shape = mean_shape(row)
    return (
        f"{BENCH_SOURCE} {row.text['page']}, {row.text['section']} (line {row.line} of {BENCH_FILE}): "
        f"{row.number('requests'):.0f} requests of {shape.input_tokens} + {shape.output_tokens} tokens in the mean "
        f"in {row.number('duration_s'):g} s"
    )


def _text(name: str) -> str:
    return (files("serving") / "profiles" / name).read_text(encoding="utf-8")
