"""What became of the requests of a measuring run, and the run as one measured point. Pure.

All moments are seconds since the run began. A request's tokens count by the share of their time that lies in the
window watched: its prompt between sending and first token, its output between first token and end. So the edges of a
window neither gain nor lose tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import NamedTuple

import msgspec

from serving.capacity import Slo
from serving.points import MeasuredPoint
from serving.stepsim import percentile


class Window(NamedTuple):
    """The part of a run that is watched."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


class RequestOutcome(msgspec.Struct, frozen=True, array_like=True):
    """One answered request: when it was due, sent, first and last heard of, and its tokens as the engine counts them.

    Latencies are from the moment it was due, so that a late sender hides nothing (coordinated omission).
    """

    scheduled_s: float
    sent_s: float
    first_token_s: float
    finish_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0

    @property
    def lag_s(self) -> float:
        """How late it was sent."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.scheduled_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token."""
        later = self.output_tokens - 1
        return (self.finish_s - self.first_token_s) / later if later > 0 else 0.0

    @property
    def e2e_s(self) -> float:
        """Time to the whole answer."""
        return self.finish_s - self.scheduled_s

    @property
    def kv_token_steps(self) -> float:
        """KV tokens read over the steps of its output."""
        return self.output_tokens * (self.input_tokens + self.output_tokens / 2)


class Load(NamedTuple):
    """What was asked of the engine in a run: the mix, and the rate of an open loop or the bound of a closed one."""

    mix: str
    offered_per_s: float | None = None
    concurrency: float | None = None
    source: str = ""


def summary(
    load: Load, outcomes: Sequence[RequestOutcome], window: Window, steps: float | None, turnaround_s: float
) -> MeasuredPoint:
    """The run as a point; latencies are of the requests due within the window.

    ``steps`` are the engine's in the window; where it does not count them, they are the time in which it worked over
    the mean time between two of an answer's tokens. ``turnaround_s`` is as in ``busy_s``.
    """
    due = watched(outcomes, window)
    shares = [
        (o, _share(o.scheduled_s, o.finish_s, window), _decoded(o, window), _prefilled(o, window)) for o in outcomes
    ]
    working_s = busy_s(outcomes, window, turnaround_s)
    counted = steps if steps is not None else _estimated_steps(outcomes, window, working_s)
    ttft, tpot = [o.ttft_s for o in due], [o.tpot_s for o in due if o.output_tokens > 1]
    return MeasuredPoint(
        mix=load.mix,
        requests=round(fsum(life for _, life, _, _ in shares)),
        duration_s=round(window.duration_s, 4),
        input_tokens=round(fsum(prefilled * o.input_tokens for o, _, _, prefilled in shares)),
        output_tokens=round(fsum(decoded * o.output_tokens for o, _, decoded, _ in shares)),
        cached_tokens=round(fsum(prefilled * o.cached_tokens for o, _, _, prefilled in shares)),
        concurrency=load.concurrency or float(most_in_flight(outcomes)),
        offered_per_s=load.offered_per_s,
        steps=None if counted is None else round(counted, 1),
        kv_token_steps=round(fsum(decoded * o.kv_token_steps for o, _, decoded, _ in shares)),
        ttft_mean_s=_mean(ttft),
        ttft_p50_s=_percentile(ttft, 50),
        ttft_p95_s=_percentile(ttft, 95),
        ttft_p99_s=_percentile(ttft, 99),
        tpot_mean_s=_mean(tpot),
        tpot_p50_s=_percentile(tpot, 50),
        tpot_p95_s=_percentile(tpot, 95),
        tpot_p99_s=_percentile(tpot, 99),
        e2e_mean_s=_mean([o.e2e_s for o in due]),
        source=load.source,
        busy_s=round(working_s, 4),
    )


def watched(outcomes: Sequence[RequestOutcome], window: Window) -> list[RequestOutcome]:
    """The requests due within the window, in that order."""
    return sorted((o for o in outcomes if window.start_s <= o.scheduled_s < window.end_s), key=lambda o: o.scheduled_s)


def overlapping(outcomes: Sequence[RequestOutcome], window: Window) -> list[RequestOutcome]:
    """The requests that were open at some time in the window, in the order in which they were due."""
    return sorted(
        (o for o in outcomes if o.scheduled_s < window.end_s and o.finish_s >= window.start_s),
        key=lambda o: o.scheduled_s,
    )


def slo_load(outcomes: Sequence[RequestOutcome], slo: Slo) -> float:
    """The SLO's percentiles over their bounds, the worse of the two: at most 1 where the SLO is met."""
    ttft = percentile([o.ttft_s for o in outcomes], slo.percentile)
    tpot = percentile([o.tpot_s for o in outcomes if o.output_tokens > 1], slo.percentile)
    return max(ttft / slo.ttft_s, tpot / slo.tpot_s)


def output_slices(outcomes: Sequence[RequestOutcome], window: Window, slices: int) -> list[float]:
    """Output tokens a second in equal slices of the window, an answer's tokens spread evenly over its decoding."""
    width_s = window.duration_s / slices
    edges = [Window(window.start_s + k * width_s, window.start_s + (k + 1) * width_s) for k in range(slices)]
    return [fsum(_decoded(o, edge) * o.output_tokens for o in outcomes) / width_s for edge in edges]


def spells(outcomes: Sequence[RequestOutcome], window: Window) -> list[Window]:
    """The parts of the window in which at least one request was in flight, in order."""
    found: list[Window] = []
    for outcome in sorted(outcomes, key=lambda o: o.sent_s):
        start_s, end_s = max(outcome.sent_s, window.start_s), min(outcome.finish_s, window.end_s)
        if end_s <= start_s:
            continue
        if found and start_s <= found[-1].end_s:
            found[-1] = Window(found[-1].start_s, max(found[-1].end_s, end_s))
        else:
            found.append(Window(start_s, end_s))
    return found


def busy_s(outcomes: Sequence[RequestOutcome], window: Window, turnaround_s: float) -> float:
    """The seconds of the window in which the engine worked.

    Its spells, less ``turnaround_s`` for each: what a lone request is on its way to the engine and back, while nothing
    is computed.
    """
    return fsum(max(0.0, spell.duration_s - turnaround_s) for spell in spells(outcomes, window))


def most_in_flight(outcomes: Sequence[RequestOutcome]) -> int:
    """The most requests that were open at once."""
    changes = sorted([(o.sent_s, 1) for o in outcomes] + [(o.finish_s, -1) for o in outcomes])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _prefilled(outcome: RequestOutcome, window: Window) -> float:
    return _share(outcome.sent_s, outcome.first_token_s, window)


def _decoded(outcome: RequestOutcome, window: Window) -> float:
    return _share(outcome.first_token_s, outcome.finish_s, window)


def _share(start_s: float, end_s: float, window: Window) -> float:
    """The share of a stretch of time that lies in the window; a single moment is in it or not."""
    if end_s <= start_s:
        return float(window.start_s <= start_s < window.end_s)
    return max(0.0, min(end_s, window.end_s) - max(start_s, window.start_s)) / (end_s - start_s)


def _estimated_steps(outcomes: Sequence[RequestOutcome], window: Window, working_s: float) -> float | None:
    decoding = [(o, _decoded(o, window)) for o in outcomes if o.output_tokens > 1]
    tokens = fsum(share * (o.output_tokens - 1) for o, share in decoding)
    if tokens == 0:
        return None
    step_s = fsum(share * (o.finish_s - o.first_token_s) for o, share in decoding) / tokens
    return working_s / step_s if step_s > 0 else None


def _mean(values: Sequence[float]) -> float | None:
    return round(fsum(values) / len(values), 6) if values else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return round(percentile(values, percent), 6) if values else None
