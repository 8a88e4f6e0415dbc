"""The latencies of a run, as points hold them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from serving.points import MeasuredPoint

Name = Literal["ttft", "tpot"]
PERCENTS = (50, 95, 99)


class Latency(NamedTuple):
    """One latency in seconds: its mean and percentiles, None where the file does not say."""

    mean_s: float | None = None
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None

    @property
    def is_measured(self) -> bool:
        """Tools write 0 throughout for what they did not measure, such as the TTFT of answers that do not stream."""
        return any(self)


def latency_of(values_s: Sequence[float]) -> Latency:
    """Of single measurements, with percentiles between them interpolated, as the tools do."""
    if not values_s:
        return Latency()
    return Latency(sum(values_s) / len(values_s), *(float(q) for q in np.percentile(values_s, PERCENTS)))


def in_seconds(milliseconds: float | None) -> float | None:
    """The same in seconds; None stays None."""
    return None if milliseconds is None else milliseconds / 1e3


def measured(milliseconds: float | None) -> float | None:
    """A mean in seconds; None also for 0, which stands for what a tool did not measure."""
    return milliseconds / 1e3 if milliseconds else None


def with_latencies(point: MeasuredPoint, latencies: Mapping[Name, Latency]) -> MeasuredPoint:
    """The point with these latencies where it has none of its own."""
    added: dict[str, float] = {}
    for name, latency in latencies.items():
        for part, value_s in zip(Latency._fields, latency, strict=True):
            field = f"{name}_{part}"
            if latency.is_measured and value_s is not None and getattr(point, field) is None:
                added[field] = value_s
    return msgspec.structs.replace(point, **added)
