"""``vllm bench serve --save-result``, plain, ``--save-detailed`` and ``--append-result``. Pure.

The tool states latencies in milliseconds and tells nothing of a prefix cache: two runs with the same ``--seed`` against
one server send the same prompts, and the second finds them cached. Its ``max_concurrent_requests`` counts whole seconds
and may exceed ``--max-concurrency``, which is the truer bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from math import fsum

import msgspec

from serving.importers.checks import check_succeeded, checked
from serving.importers.fields import Fields, numbers_of
from serving.importers.latency import Latency, in_seconds, latency_of, measured, with_latencies
from serving.importers.results import Run, RunRefusedError, Subject, mix_name
from serving.pointchecks import StatedRate
from serving.points import MeasuredPoint

TOOL = "vllm bench serve"
#: What such a result always has.
SIGNATURE = frozenset({"completed", "duration", "request_throughput", "total_input_tokens"})
_DETAILED = ("input_lens", "output_lens", "ttfts", "itls", "errors")
#: By how much the requests listed may differ from the totals.
DETAILS_AGREE = 0.01


class _Details:
    """What ``--save-detailed`` adds of each request that succeeded."""

    def __init__(self, result: Fields) -> None:
        inputs, outputs, ttfts = (result.numbers(key) for key in ("input_lens", "output_lens", "ttfts"))
        itls, errors = result.list("itls"), result.list("errors")
        if len({len(inputs), len(outputs), len(ttfts), len(itls), len(errors)}) != 1:
            raise RunRefusedError("its lists of requests are of unlike lengths; import the file as the tool wrote it")
        # vLLM writes no output for a request that failed, and its error.
        answered = [number for number, tokens in enumerate(outputs) if tokens > 0 and not errors[number]]
        self.inputs = [inputs[number] for number in answered]
        self.outputs = [outputs[number] for number in answered]
        self.ttfts_s = [ttfts[number] for number in answered]
        self.decodes_s = [fsum(numbers_of(itls[number], f"itls[{number}]")) for number in answered]

    @property
    def kv_token_steps(self) -> float:
        """Sum of O·(I + O/2)."""
        return fsum(o * (i + o / 2) for i, o in zip(self.inputs, self.outputs, strict=True))

    @property
    def tpots_s(self) -> Sequence[float]:
        """Of the answers with more than one token."""
        return [took / (o - 1) for took, o in zip(self.decodes_s, self.outputs, strict=True) if o > 1]

    def check(self, point: MeasuredPoint) -> None:
        """Raise ``RunRefusedError`` where they are not the requests that the totals are of."""
        listed = len(self.inputs), fsum(self.inputs), fsum(self.outputs)
        totals = point.requests, point.input_tokens, point.output_tokens
        if any(abs(one - total) > DETAILS_AGREE * total for one, total in zip(listed, totals, strict=True)):
            raise RunRefusedError(
                f"it lists {listed[0]} answers of {listed[1]:g} input and {listed[2]:g} output tokens, and totals "
                f"{totals[0]}, {totals[1]} and {totals[2]}; import the file as the tool wrote it"
            )


def run_of(result: Fields, source: str) -> Run:
    """One result as a run. Raises ``RunRefusedError``."""
    if "total_output_tokens" not in result:
        raise RunRefusedError("it has no total_output_tokens: a pooling run; measure a generating endpoint instead")
    completed, failed = result.count("completed"), result.optional_count("failed")
    check_succeeded(completed, failed)
    input_tokens, output_tokens = result.count("total_input_tokens"), result.count("total_output_tokens")
    point = MeasuredPoint(
        mix=mix_name(input_tokens / completed, output_tokens / completed),
        requests=completed,
        duration_s=result.positive("duration"),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=result.optional("max_concurrency") or result.optional("max_concurrent_requests") or None,
        offered_per_s=_offered_per_s(result),
        failed=failed,
        e2e_mean_s=measured(result.optional("mean_e2el_ms")),
        itl_mean_s=measured(result.optional("mean_itl_ms")),
        source=source,
    )
    point = with_latencies(point, {"ttft": _latency(result, "ttft"), "tpot": _latency(result, "tpot")})
    rates = (
        StatedRate("request_throughput", result.optional("request_throughput"), completed),
        StatedRate("output_throughput", result.optional("output_throughput"), output_tokens),
        StatedRate("total_token_throughput", result.optional("total_token_throughput"), input_tokens + output_tokens),
    )
    subject = Subject(
        model=result.text("model_id"), gpu=result.text("gpu"), engine_version=result.text("engine_version")
    )
    return Run(subject, checked(_with_details(point, result), rates))


def date_of(result: Fields) -> str:
    """The day of the run in ISO form; empty where it does not say."""
    try:
        return datetime.strptime(result.text("date"), "%Y%m%d-%H%M%S").date().isoformat()  # noqa: DTZ007 - only a day
    except ValueError:
        return ""


def _latency(result: Fields, name: str) -> Latency:
    median = result.optional(f"median_{name}_ms")
    return Latency(
        mean_s=in_seconds(result.optional(f"mean_{name}_ms")),
        p50_s=in_seconds(result.optional(f"p50_{name}_ms") if median is None else median),
        p95_s=in_seconds(result.optional(f"p95_{name}_ms")),
        p99_s=in_seconds(result.optional(f"p99_{name}_ms")),
    )


def _offered_per_s(result: Fields) -> float | None:
    """The request rate; None where all were sent at once ("inf"), or in a closed loop."""
    return None if result.text("request_rate") == "inf" else result.optional("request_rate") or None


def _with_details(point: MeasuredPoint, result: Fields) -> MeasuredPoint:
    if not all(key in result for key in _DETAILED):
        return point
    details = _Details(result)
    details.check(point)
    point = msgspec.structs.replace(
        point,
        kv_token_steps=details.kv_token_steps,
        e2e_mean_s=point.e2e_mean_s or (fsum(details.ttfts_s) + fsum(details.decodes_s)) / point.requests,
    )
    return with_latencies(point, {"ttft": latency_of(details.ttfts_s), "tpot": latency_of(details.tpots_s)})
