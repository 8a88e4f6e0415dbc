"""A finished run as it is kept: the point, its requests, and what the run was. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from serving.outcomes import RequestOutcome
from serving.points import MeasuredPoint
from serving.run_verdict import State

Kind = Literal["anchor", "open"]


class PointRun(msgspec.Struct, frozen=True):
    """One run: the point, the requests that were open in its window, and what it was."""

    point: MeasuredPoint
    state: State
    why: str
    outcomes: tuple[RequestOutcome, ...]
    window_s: tuple[float, float]
    lag_p99_s: float


class Record(msgspec.Struct, frozen=True, tag="point"):
    """One finished run: an anchor at a concurrency, or an open loop at a rate."""

    kind: Kind
    mix: str
    level: float
    run: PointRun
