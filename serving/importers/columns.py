"""The columns of this project, those of ``serving/profiles/bench_serve_results.csv``: a run for each row. Pure.

Rates in the table are rounded to two digits, and so may be off by half of the last. A latency of 0 throughout was not
measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from serving.importers.checks import StatedRate, check_succeeded, checked
from serving.importers.denominators import check_command, check_flags
from serving.importers.fields import Fields
from serving.importers.latency import Latency, in_seconds, measured, with_latencies
from serving.importers.results import Run, Subject, mix_name
from serving.importers.table import typed
from serving.points import MeasuredPoint

TOOL = "bench serve columns"
#: Without these columns it is another table.
SIGNATURE = frozenset({"model", "gpu", "requests", "duration_s", "input_tokens", "output_tokens"})
NUMERIC = (
    *("requests", "failed", "duration_s", "input_tokens", "cached_tokens", "output_tokens"),
    *("req_s", "output_tok_s", "total_tok_s"),
    *("ttft_mean_ms", "ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms"),
    *("tpot_mean_ms", "tpot_p50_ms", "tpot_p95_ms", "tpot_p99_ms"),
    *("itl_mean_ms", "e2e_mean_ms", "peak_concurrency", "offered_req_s"),
)
#: Half of the last digit that the table's rates have, and a little.
_ROUNDING_PER_S = 0.006


def run_of(row: Mapping[str, str | None], source: str) -> Run:
    """One row as a run. Raises ``RunRefusedError``."""
    values = typed(row, NUMERIC)
    check_flags(row.items())
    check_command(row.get("serve_command") or "")
    completed, failed = values.count("requests"), values.optional_count("failed")
    check_succeeded(completed, failed)
    input_tokens, output_tokens = values.count("input_tokens"), values.count("output_tokens")
    point = MeasuredPoint(
        mix=mix_name(input_tokens / completed, output_tokens / completed),
        requests=completed,
        duration_s=values.positive("duration_s"),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=values.optional("peak_concurrency") or None,
        offered_per_s=values.optional("offered_req_s") or None,
        cached_tokens=values.optional_count("cached_tokens"),
        failed=failed,
        e2e_mean_s=measured(values.optional("e2e_mean_ms")),
        itl_mean_s=measured(values.optional("itl_mean_ms")),
        source=_source(values, source),
    )
    point = with_latencies(point, {"ttft": _latency(values, "ttft"), "tpot": _latency(values, "tpot")})
    rates = (
        StatedRate("req_s", values.optional("req_s"), completed, _ROUNDING_PER_S),
        StatedRate("output_tok_s", values.optional("output_tok_s"), output_tokens, _ROUNDING_PER_S),
        StatedRate("total_tok_s", values.optional("total_tok_s"), input_tokens + output_tokens, _ROUNDING_PER_S),
    )
    return Run(_subject(values), checked(point, rates))


def _latency(values: Fields, name: str) -> Latency:
    return Latency(*(in_seconds(values.optional(f"{name}_{part}_ms")) for part in ("mean", "p50", "p95", "p99")))


def _source(values: Fields, source: str) -> str:
    """The table's row, and the page that it is from."""
    return ", ".join(filter(None, (source, values.text("page"), values.text("section"))))


def _subject(values: Fields) -> Subject:
    engine = values.text("engine")
    return Subject(
        model=values.text("model"),
        gpu=values.text("gpu"),
        engine=engine,
        engine_version=_version_of(engine, values.text("engine_versions")),
        serve_command=values.text("serve_command"),
    )


def _version_of(engine: str, versions: str) -> str:
    """The engine's version in a text such as ``- vLLM: v0.11.0 - SGLang: v0.5.3``; empty where it is not there."""
    found = re.search(rf"{re.escape(engine)}\s*:?\s*v?(\d[\w.+-]*)", versions, re.IGNORECASE) if engine else None
    return found.group(1) if found else ""
