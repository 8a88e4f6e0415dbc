"""AIPerf's ``profile_export_aiperf.json`` (schema 1): one run. Pure.

Every metric states its unit, which is heeded. Its ``inter_token_latency`` is (latency − TTFT) ÷ (O − 1) of each
request, what others call TPOT; ``inter_chunk_latency`` is the gap between chunks. Tokens are as its
tokenizer counts them.
"""

from __future__ import annotations

from collections.abc import Mapping

from serving.importers.checks import check_succeeded, checked
from serving.importers.fields import Fields
from serving.importers.latency import Latency, with_latencies
from serving.importers.results import Run, RunRefusedError, Subject, mix_name
from serving.pointchecks import StatedRate
from serving.points import MeasuredPoint

TOOL = "AIPerf"
#: The major version of the export's schema that is read here.
SCHEMA_MAJOR = "1"

_SECONDS: Mapping[str, float] = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def run_of(export: Fields, source: str) -> Run:
    """The export as a run. Raises ``RunRefusedError``."""
    _check_whole(export)
    completed, failed = _total(export, "request_count", 0), _total(export, "error_request_count", 0)
    check_succeeded(completed, failed)
    input_tokens, output_tokens = _total(export, "total_isl"), _total(export, "total_osl")
    phase = _profiling_phase(export)
    point = MeasuredPoint(
        mix=mix_name(input_tokens / completed, output_tokens / completed),
        requests=completed,
        duration_s=_mean_s(export, "benchmark_duration") or 0.0,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=_concurrency(phase, export),
        offered_per_s=None if phase is None else phase.optional("rate"),
        cached_tokens=_total(export, "total_usage_prompt_cache_read_tokens", 0),
        failed=failed,
        e2e_mean_s=_mean_s(export, "request_latency"),
        itl_mean_s=_mean_s(export, "inter_chunk_latency"),
        source=source,
    )
    latencies = _latency(export, "time_to_first_token"), _latency(export, "inter_token_latency")
    point = with_latencies(point, {"ttft": latencies[0], "tpot": latencies[1]})
    rates = (
        _rate(export, "request_throughput", completed),
        _rate(export, "input_token_throughput", input_tokens),
        _rate(export, "output_token_throughput", output_tokens),
    )
    return Run(Subject(model=_model(export)), checked(point, rates))


def date_of(export: Fields) -> str:
    """The day of its start in ISO form; empty where it does not say."""
    day = export.text("start_time")[:10]
    return day if len(day) == 10 and day.replace("-", "").isdigit() else ""


def _check_whole(export: Fields) -> None:
    schema = export.text("schema_version")
    if schema.partition(".")[0] != SCHEMA_MAJOR:
        raise RunRefusedError(
            f"its schema_version is {schema!r}; use an AIPerf that writes {SCHEMA_MAJOR}, such as 0.13"
        )
    if "request_count" not in export and "error_request_count" not in export:
        raise RunRefusedError("request_count is missing; import profile_export_aiperf.json as AIPerf wrote it")
    if export.is_true("was_cancelled"):
        raise RunRefusedError("it was cancelled, so its rates are of an unfinished run; run it again to its end")


def _total(export: Fields, name: str, default: int | None = None) -> int:
    if default is not None and name not in export:
        return default
    return export.child(name).count("avg")


def _scale(metric: Fields, name: str) -> float:
    unit = metric.text("unit")
    if unit not in _SECONDS:
        raise RunRefusedError(f"{name}.unit is {unit!r}, not one of {', '.join(_SECONDS)}; use AIPerf's own export")
    return _SECONDS[unit]


def _mean_s(export: Fields, name: str) -> float | None:
    if name not in export:
        return None
    metric = export.child(name)
    return metric.number("avg") * _scale(metric, name) or None


def _latency(export: Fields, name: str) -> Latency:
    if name not in export:
        return Latency()
    metric = export.child(name)
    scale = _scale(metric, name)
    values = (metric.optional(key) for key in ("avg", "p50", "p95", "p99"))
    return Latency(*(None if value is None else value * scale for value in values))


def _rate(export: Fields, name: str, total: float) -> StatedRate:
    return StatedRate(name, export.child(name).optional("avg") if name in export else None, total)


def _profiling_phase(export: Fields) -> Fields | None:
    if "input_config" not in export or "phases" not in export.child("input_config"):
        return None
    phases = export.child("input_config").children("phases")
    return next((phase for phase in phases if phase.text("kind") == "profiling"), None)


def _concurrency(phase: Fields | None, export: Fields) -> float | None:
    """The bound of a closed loop, or the most that were in flight."""
    if phase is not None and "concurrency" in phase and "rate" not in phase:
        return phase.positive("concurrency")
    return export.child("effective_concurrency").optional("max") or None if "effective_concurrency" in export else None


def _model(export: Fields) -> str:
    if "input_config" not in export or "models" not in export.child("input_config"):
        return ""
    models = export.child("input_config").child("models").children("items")
    return models[0].text("name") if models else ""
