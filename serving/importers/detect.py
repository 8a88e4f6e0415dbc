"""Which tool wrote a file, told by its content, and its runs. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TypeVar

from serving.denominators import are_per_gpu
from serving.importers import aiperf, columns, guidellm, mlperf, vllm_bench
from serving.importers.checks import check_flags
from serving.importers.fields import Fields
from serving.importers.results import (
    Imported,
    ImporterError,
    Refusal,
    Run,
    RunRefusedError,
    nothing_left,
    with_common_mixes,
)
from serving.importers.table import header_of, rows_of

_KNOWN = (
    "`vllm bench serve --save-result` JSON, a GuideLLM 0.8 JSON report, AIPerf's profile_export_aiperf.json, or a CSV "
    "with the columns of serving/profiles/bench_serve_results.csv or mlperf_rows.csv"
)
_PER_GPU = (
    "states rates per GPU and no totals of a run. Disaggregated rows even divide input by the prefill GPUs and output "
    "by the decode GPUs; import the JSON that the benchmark itself wrote"
)

T = TypeVar("T")
U = TypeVar("U")


def import_results(content: bytes, file: str) -> Imported:
    """Everything that a file holds; ``file`` is its name, for messages and sources.

    Runs that cannot be vouched for are left out, and stand in ``refused`` with the reason. Raises ``ImporterError``,
    and nothing else, for a file of no known format, or one of which nothing is left.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImporterError(f"{file}: it is no UTF-8 text ({error.reason}); import {_KNOWN}") from error
    documents = _documents(text)
    if documents is not None:
        return _of_documents(documents, file)
    header = frozenset(header_of(text))
    if header >= mlperf.SIGNATURE:
        return _of_mlperf(text, file)
    if header >= columns.SIGNATURE:
        return _of_columns(text, file)
    raise ImporterError(f"{file}: unknown format{_missing(header)}; import {_KNOWN}")


def _documents(text: str) -> list[object] | None:
    """The JSON document, or the one of each line as ``--append-result`` writes them; None where it is no JSON."""
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()] or None
    except (ValueError, RecursionError):
        return None


def _of_documents(documents: list[object], file: str) -> Imported:
    first = documents[0]
    if not isinstance(first, Mapping):
        raise ImporterError(f"{file}: it is JSON, but no object; import {_KNOWN}")
    if first.keys() >= vllm_bench.SIGNATURE:
        return _of_vllm(documents, file)
    if len(documents) == 1 and "benchmarks" in first:
        return _of_guidellm(Fields(first), file)
    if len(documents) == 1 and "aiperf_version" in first:
        return _of_aiperf(Fields(first), file)
    if are_per_gpu(map(str, first)):
        raise ImporterError(f"{file}: it {_PER_GPU}")
    near = vllm_bench.SIGNATURE & first.keys()
    lacking = f" (it lacks {', '.join(sorted(vllm_bench.SIGNATURE - near))} of vllm bench serve)" if near else ""
    raise ImporterError(f"{file}: unknown format{lacking}; import {_KNOWN}")


def _of_vllm(documents: list[object], file: str) -> Imported:
    def run(document: object, where: str) -> Run:
        if not isinstance(document, Mapping):
            raise RunRefusedError("it is no object; import the file as the tool wrote it")
        check_flags((str(key), value) for key, value in document.items())
        return vllm_bench.run_of(Fields(document), where)

    names = [file] if len(documents) == 1 else [f"{file} line {number}" for number in range(1, len(documents) + 1)]
    runs, refused = _kept(run, zip(documents, names, strict=True))
    first = documents[0]
    date = vllm_bench.date_of(Fields(first)) if isinstance(first, Mapping) else ""
    return _whole(Imported(file, vllm_bench.TOOL, "", date, "measured", with_common_mixes(runs), refused=refused))


def _of_guidellm(report: Fields, file: str) -> Imported:
    try:
        benchmarks, version = guidellm.benchmarks_of(report), guidellm.tool_version_of(report)
    except RunRefusedError as error:
        raise ImporterError(f"{file}: {error}") from error
    named = ((benchmark, f"{file} benchmark {number}") for number, benchmark in enumerate(benchmarks, start=1))
    runs, refused = _kept(guidellm.run_of, named)
    date = guidellm.date_of(benchmarks[0]) if benchmarks else ""
    return _whole(Imported(file, guidellm.TOOL, version, date, "measured", with_common_mixes(runs), refused=refused))


def _of_aiperf(export: Fields, file: str) -> Imported:
    runs, refused = _kept(aiperf.run_of, [(export, file)])
    version, date = export.text("aiperf_version"), aiperf.date_of(export)
    return _whole(Imported(file, aiperf.TOOL, version, date, "measured", tuple(runs), refused=refused))


def _of_columns(text: str, file: str) -> Imported:
    runs, refused = _kept(columns.run_of, columns.rows_of(text, file))
    return _whole(Imported(file, columns.TOOL, "", "", "published", with_common_mixes(runs), refused=refused))


def _of_mlperf(text: str, file: str) -> Imported:
    rows = ((row, f"{file} line {line}") for line, row in rows_of(text, file))
    anchors, refused = _kept(lambda row, _: mlperf.anchor_of(row), rows)
    return _whole(Imported(file, mlperf.TOOL, "", "", "published", anchors=tuple(anchors), refused=refused))


def _kept(read: Callable[[T, str], U], items: Iterable[tuple[T, str]]) -> tuple[list[U], tuple[Refusal, ...]]:
    """What could be read of these, and what not."""
    kept, refused = [], []
    for item, where in items:
        try:
            kept.append(read(item, where))
        except RunRefusedError as error:
            refused.append(Refusal(where, str(error)))
    return kept, tuple(refused)


def _whole(imported: Imported) -> Imported:
    if not any(chain(imported.runs, imported.anchors)):
        raise nothing_left(imported.file, imported.refused)
    return imported


def _missing(header: frozenset[str]) -> str:
    for known in (columns.SIGNATURE, mlperf.SIGNATURE):
        if len(header & known) * 2 >= len(known):
            return f" (it lacks the columns {', '.join(sorted(known - header))})"
    return ""
