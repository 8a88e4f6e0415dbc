"""How sure a measured figure is: confidence intervals by batches, since neighbouring requests are alike. Pure, seeded.

Requests in order of arrival are cut into batches; a percentile's interval comes from drawing whole batches with
replacement (a block bootstrap), a rate's from the means of equal slices of time and Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, sqrt
from statistics import fmean, stdev

import msgspec
import numpy as np

from serving.trend import student_t

CONFIDENCE = 0.95
REPLICATES = 400
BATCHES = 20
_LEAST_BATCH = 2


class Interval(msgspec.Struct, frozen=True):
    """A figure, and the interval that holds the true one with 95 % confidence; None where there is too little data."""

    value: float
    low: float | None = None
    high: float | None = None


def resampled(count: int, seed: int, replicates: int = REPLICATES) -> Iterator[np.ndarray]:
    """Indices of ``count`` requests in order of arrival, drawn in whole batches, once for each replicate."""
    batches = np.array_split(np.arange(count), max(1, min(BATCHES, count // _LEAST_BATCH)))
    rng = np.random.default_rng(seed)
    for _ in range(replicates):
        yield np.concatenate([batches[k] for k in rng.integers(len(batches), size=len(batches))])


def percentile_of(values: np.ndarray, percent: float) -> float:
    """The smallest value that at least ``percent`` percent do not exceed, as ``stepsim.percentile``; 0 for none."""
    if not len(values):
        return 0.0
    rank = max(0, ceil(len(values) * percent / 100 - 1e-9) - 1)
    return float(np.partition(values, rank)[rank])


def interval(values: Sequence[float], statistic: Callable[[np.ndarray], float], seed: int) -> Interval:
    """A statistic of values in order of arrival, with its bootstrap interval."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2 * _LEAST_BATCH:
        return Interval(statistic(array))
    drawn = [statistic(array[indices]) for indices in resampled(len(array), seed)]
    return Interval(statistic(array), *_middle(drawn))


def mean_interval(slices: Sequence[float]) -> Interval:
    """The mean of equal slices of time, with the interval of batch means. Raises ``ValueError`` for no slices."""
    if not slices:
        raise ValueError("no slices, so no mean")
    mean = fmean(slices)
    if len(slices) < 3:
        return Interval(mean)
    half = student_t(CONFIDENCE, len(slices) - 1) * stdev(slices) / sqrt(len(slices))
    return Interval(mean, max(0.0, mean - half), mean + half)


def middle_interval(value: float, drawn: Sequence[float]) -> Interval:
    """A figure with the middle 95 % of what its replicates gave."""
    return Interval(value, *_middle(drawn)) if drawn else Interval(value)


def _middle(drawn: Sequence[float]) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)
