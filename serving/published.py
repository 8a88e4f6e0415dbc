"""The published results that come with Penstock, row by row as their publishers gave them."""

from __future__ import annotations

import csv
from importlib.resources import files

import msgspec

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


class BenchRow(msgspec.Struct, frozen=True):
    """One run of a serving benchmark; ``page`` and ``section`` say where it was published."""

    page: str
    section: str
    model: str
    gpu: str
    engine: str
    serve_command: str
    requests: int
    duration_s: float
    input_tokens: int
    output_tokens: int

    @property
    def shape(self) -> RequestShape:
        """Its mean request."""
        return RequestShape(
            max(1, round(self.input_tokens / self.requests)), max(1, round(self.output_tokens / self.requests))
        )

    @property
    def requests_per_s(self) -> float:
        """Its throughput over the whole run, its start and end included."""
        return self.requests / self.duration_s


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
        for row in _rows(MLPERF_FILE)
    ]


def bench_rows() -> list[BenchRow]:
    """The benchmark runs that come with Penstock."""
    return [
        BenchRow(
            page=row["page"],
            section=row["section"],
            model=row["model"],
            gpu=row["gpu"].upper(),
            engine=row["engine"],
            serve_command=row["serve_command"],
            requests=int(row["requests"]),
            duration_s=float(row["duration_s"]),
            input_tokens=int(row["input_tokens"]),
            output_tokens=int(row["output_tokens"]),
        )
        for row in _rows(BENCH_FILE)
    ]


def _rows(name: str) -> list[dict[str, str]]:
    text = (files("serving") / "profiles" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
