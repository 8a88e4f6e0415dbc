"""What became of a load: one record per request, and the figures of a step computed from them.

*Throttled share* is refused input + output tokens over offered ones, first attempts only, in the measured window.
Refused requests have no usage, so shares count planned tokens throughout; goodput counts what the engine reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, fsum
from typing import Literal

import msgspec

from loadtests.schedule import PlannedRequest, Schedule, Window
from serving.capacity import Slo
from serving.stepsim import percentile

#: admitted: answered to the end. throttled: 429 with a valid Retry-After. cut: still unanswered when the load ended,
#: and closed by us. failed: anything else.
Fate = Literal["admitted", "throttled", "cut", "failed"]


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request as the client saw it; times in seconds from the start of the load.

    ``sent_s`` is when its bytes went to the socket, ``first_token_s`` when the first chunk with content came, and the
    token counts are the usage that the engine reported.
    """

    index: int
    fate: Fate
    sent_s: float
    end_s: float
    status: int = 0
    first_token_s: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    retry_after_s: float | None = None
    problem: str | None = None

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token."""
        later_tokens = self.output_tokens - 1
        return (self.end_s - (self.first_token_s or 0.0)) / later_tokens if later_tokens > 0 else 0.0


class LoadRun(msgspec.Struct, frozen=True):
    """The records of one load in order of the schedule, and the most requests that were in flight at once."""

    records: tuple[RequestRecord, ...]
    peak_in_flight: int


class Figures(msgspec.Struct, frozen=True):
    """A step's figures, over the requests scheduled in its measured window."""

    offered_rps: float
    offered_tokens_per_s: float
    throttled_share: float
    throttled_request_share: float
    goodput_tokens_per_s: float
    slo_met_share: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    tpot_p50_ms: float
    tpot_p95_ms: float
    errors: int
    schedule_lag_p99_ms: float
    peak_in_flight: int
    planned_input_error: float


def meets_slo(record: RequestRecord, planned: PlannedRequest, slo: Slo) -> bool | None:
    """Whether an admitted request met both bounds, counted from its scheduled time; None where it cannot be known.

    A request that was cut is judged only if it had already missed its first token's bound.
    """
    if record.fate == "cut":
        missed = record.first_token_s is None and record.end_s - planned.time_s > slo.ttft_s
        return False if missed else None
    if record.fate != "admitted" or record.first_token_s is None:
        return None
    return record.first_token_s - planned.time_s <= slo.ttft_s and record.tpot_s <= slo.tpot_s


def share(parts: Iterable[float], whole: Iterable[float]) -> float:
    """Sum of the parts over the sum of the whole; 0 where the whole is nothing."""
    total = fsum(whole)
    return fsum(parts) / total if total else 0.0


def figures(schedule: Schedule, run: LoadRun, slo: Slo) -> Figures:
    """The figures of a step. ``slo`` is already scaled by the slow-down."""
    window = schedule.window
    pairs = [(plan, run.records[plan.index]) for plan in schedule.measured]
    admitted = [(plan, record) for plan, record in pairs if record.fate == "admitted"]
    verdicts = [(record, meets_slo(record, plan, slo)) for plan, record in pairs]
    ttft_s = [record.first_token_s - plan.time_s for plan, record in pairs if record.first_token_s is not None]
    tpot_s = [record.tpot_s for _, record in admitted if record.output_tokens > 1]
    lags_s = [record.sent_s - plan.time_s for plan, record in zip(schedule.requests, run.records, strict=True)]
    return Figures(
        offered_rps=len(pairs) / window.length_s,
        offered_tokens_per_s=sum(plan.tokens for plan, _ in pairs) / window.length_s,
        throttled_share=share(
            (plan.tokens for plan, record in pairs if record.fate == "throttled"), (plan.tokens for plan, _ in pairs)
        ),
        throttled_request_share=share((record.fate == "throttled" for _, record in pairs), (1 for _ in pairs)),
        goodput_tokens_per_s=sum(r.input_tokens + r.output_tokens for r, met in verdicts if met) / window.length_s,
        slo_met_share=share((met is True for _, met in verdicts), (met is not None for _, met in verdicts)),
        ttft_p50_ms=percentile(ttft_s, 50) * 1000,
        ttft_p95_ms=percentile(ttft_s, 95) * 1000,
        tpot_p50_ms=percentile(tpot_s, 50) * 1000,
        tpot_p95_ms=percentile(tpot_s, 95) * 1000,
        errors=sum(record.fate == "failed" for record in run.records),
        schedule_lag_p99_ms=percentile(lags_s, 99) * 1000,
        peak_in_flight=run.peak_in_flight,
        planned_input_error=_planned_input_error(admitted),
    )


def tokens_per_s(requests: Iterable[PlannedRequest], window: Window, bin_s: float) -> tuple[float, ...]:
    """Planned tokens per second in each bin of scheduled time, from the start of the load to the window's end."""
    totals = [0.0] * ceil(window.end_s / bin_s)
    for request in requests:
        totals[int(request.time_s / bin_s)] += request.tokens
    return tuple(total / bin_s for total in totals)


def _planned_input_error(admitted: Sequence[tuple[PlannedRequest, RequestRecord]]) -> float:
    """How far the plan's prompt tokens are from the engine's count, as a share of the latter."""
    counted = sum(record.input_tokens for _, record in admitted)
    planned = sum(plan.input_tokens for plan, _ in admitted)
    return (planned - counted) / counted if counted else 0.0
