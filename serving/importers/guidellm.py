"""GuideLLM's JSON report (0.8, document version 2): one run for each benchmark of its profile. Pure.

Three things differ from ``vllm bench serve``. Its ``time_per_output_token_ms`` is the whole latency ÷ output tokens,
the first included; what others call TPOT, (latency − TTFT) ÷ (O − 1), is its ``inter_token_latency_ms``, in which a
request weighs by its tokens. A report holds all requests unless ``sample_size`` cut them; with all of them, prompt
tokens found in a cache are known. And a benchmark that ends by time leaves ``incomplete`` requests, which do not
count.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from serving.importers.checks import check_succeeded, checked
from serving.importers.fields import Fields
from serving.importers.latency import Latency, in_seconds, measured, with_latencies
from serving.importers.results import Run, RunRefusedError, Subject, mix_name
from serving.pointchecks import StatedRate
from serving.points import MeasuredPoint

TOOL = "GuideLLM"
#: The report document that GuideLLM 0.8 writes.
DOCUMENT_VERSION = 2
#: Strategies that keep a number of requests in flight; the others send at a rate.
_CLOSED_LOOPS = frozenset({"synchronous", "concurrent"})
_RATED = frozenset({"constant", "poisson", "async"})


def benchmarks_of(report: Fields) -> Sequence[Fields]:
    """The report's benchmarks. Raises ``RunRefusedError`` for another document version."""
    version = report.child("metadata").count("version")
    if version != DOCUMENT_VERSION:
        raise RunRefusedError(
            f"its metadata.version is {version}, GuideLLM 0.8 writes {DOCUMENT_VERSION}; run it again with GuideLLM 0.8"
        )
    return report.children("benchmarks")


def tool_version_of(report: Fields) -> str:
    """GuideLLM's own version."""
    return report.child("metadata").text("guidellm_version")


def date_of(benchmark: Fields) -> str:
    """The day of its start, UTC, in ISO form; empty where it does not say."""
    try:
        return datetime.fromtimestamp(benchmark.number("start_time"), UTC).date().isoformat()
    except (RunRefusedError, ValueError, OverflowError, OSError):
        return ""


def run_of(benchmark: Fields, source: str) -> Run:
    """One benchmark as a run. Raises ``RunRefusedError``."""
    metrics, config = benchmark.child("metrics"), benchmark.child("config")
    totals = metrics.child("request_totals")
    completed, failed = totals.count("successful"), totals.optional_count("errored")
    check_succeeded(completed, failed)
    input_tokens, output_tokens = _total(metrics, "prompt_token_count"), _total(metrics, "output_token_count")
    strategy = config.child("strategy")
    point = MeasuredPoint(
        mix=mix_name(input_tokens / completed, output_tokens / completed),
        requests=completed,
        duration_s=benchmark.positive("duration"),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=_concurrency(strategy, metrics),
        offered_per_s=strategy.optional("rate") if strategy.text("type_") in _RATED else None,
        cached_tokens=_cached_tokens(benchmark, completed),
        failed=failed,
        e2e_mean_s=_successful(metrics, "request_latency").optional("mean"),
        itl_mean_s=measured(_successful(metrics, "inter_token_latency_ms").optional("mean")),
        source=f"{source}, {strategy.text('type_')}",
    )
    ttft, tpot = (
        _latency(_successful(metrics, f"{name}_ms")) for name in ("time_to_first_token", "inter_token_latency")
    )
    point = with_latencies(point, {"ttft": ttft, "tpot": tpot})
    rates = (
        _rate(metrics, "requests_per_second", completed),
        _rate(metrics, "prompt_tokens_per_second", input_tokens),
        _rate(metrics, "output_tokens_per_second", output_tokens),
    )
    return Run(Subject(model=config.child("backend").text("model")), checked(point, rates))


def _successful(metrics: Fields, name: str) -> Fields:
    return metrics.child(name).child("successful")


def _total(metrics: Fields, name: str) -> int:
    return _successful(metrics, name).count("total_sum")


def _rate(metrics: Fields, name: str, total: float) -> StatedRate:
    return StatedRate(f"metrics.{name}.successful.mean", _successful(metrics, name).optional("mean"), total)


def _concurrency(strategy: Fields, metrics: Fields) -> float | None:
    """The bound of a closed loop; else the most that were in flight, since a rate's bound is a mere safety."""
    if strategy.text("type_") in _CLOSED_LOOPS and "max_concurrency" in strategy:
        return strategy.positive("max_concurrency")
    return metrics.child("request_concurrency").child("total").optional("max") or None


def _latency(milliseconds: Fields) -> Latency:
    if milliseconds.optional_count("count") == 0:
        return Latency()
    percentiles = milliseconds.child("percentiles")
    return Latency(
        in_seconds(milliseconds.optional("mean")), *(in_seconds(percentiles.optional(p)) for p in ("p50", "p95", "p99"))
    )


def _cached_tokens(benchmark: Fields, completed: int) -> int:
    """Prompt tokens that a prefix cache had; 0 where the report left requests out."""
    if "requests" not in benchmark:
        return 0
    requests = benchmark.child("requests")
    listed = requests.children("successful") if "successful" in requests else ()
    if len(listed) != completed:
        return 0
    return sum(request.child("input_metrics").optional_count("cached_tokens") for request in listed)
