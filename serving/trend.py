"""Whether a run is steady: its start-up cut off, no trend left, and no queue that grows for ever. Pure.

Three rules, over samples of a quantity in time. MSER-5 (White, 1997) says where the start-up ends: at the cut that
makes the mean of the rest surest. A t-test of the slope over batch means says whether what is left still drifts;
batches, since neighbouring samples are alike and would make every wander look significant. And a run is over-saturated
where concurrency *and* time to first token both rise significantly, as GuideLLM decides it: either alone also rises by
chance, or while long answers fill the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isinf, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

#: How sure a slope must be; the test is repeated while a run lasts, so it is stricter than the usual 0.95.
CONFIDENCE = 0.99
#: A drift of less than this share of the mean, from one end to the other, is none that matters.
MATERIAL_RISE = 0.25
#: Batches of a trend test, and the samples that the fewest of them need.
_BATCHES = 12
_LEAST_BATCHES = 6
#: MSER-5 averages so many samples at a time.
_MSER_BATCH = 5


class Sample(NamedTuple):
    """A value and when it was seen, in seconds."""

    time_s: float
    value: float


class Trend(NamedTuple):
    """A line through batch means: its rise over the span as a share of the mean, and the slope's t value."""

    rise: float
    t: float
    batches: int

    @property
    def is_significant(self) -> bool:
        """Whether the slope is not chance, and large enough to matter."""
        return abs(self.rise) >= MATERIAL_RISE and abs(self.t) >= student_t(CONFIDENCE, self.batches - 2)


def trend(samples: Sequence[Sample]) -> Trend | None:
    """The trend of samples in order of time; None where there are too few to tell."""
    batches = min(_BATCHES, len(samples) // 2)
    if batches < _LEAST_BATCHES:
        return None
    groups = [np.asarray(group) for group in np.array_split(np.asarray(samples, dtype=float), batches)]
    times, values = np.array([group.mean(axis=0) for group in groups]).T
    level = float(values.mean())
    centred = times - times.mean()
    spread = float(centred @ centred)
    if spread == 0 or level <= 0:
        return Trend(0.0, 0.0, batches)
    slope = float(centred @ values) / spread
    left = values - level - slope * centred
    error = sqrt(float(left @ left) / (batches - 2) / spread)
    t = slope / error if error > 0 else (inf if slope > 0 else -inf if slope < 0 else 0.0)
    return Trend(slope * (samples[-1].time_s - samples[0].time_s) / level, t, batches)


def is_rising(samples: Sequence[Sample]) -> bool:
    """Whether the samples rise, significantly and by an amount that matters."""
    found = trend(samples)
    return found is not None and found.is_significant and found.rise > 0


def is_over_saturated(concurrency: Sequence[Sample], ttft_s: Sequence[Sample]) -> bool:
    """Whether requests come faster than they are served: concurrency and time to first token both rise."""
    return is_rising(concurrency) and is_rising(ttft_s)


def drift(concurrency: Sequence[Sample]) -> str:
    """Why a run with these requests in flight is not steady; empty where it is."""
    found = trend(concurrency)
    if found is None:
        return f"{len(concurrency)} samples are too few to see whether it is steady; raise --point-s"
    if not found.is_significant:
        return ""
    return f"requests in flight still {'rose' if found.rise > 0 else 'fell'} by {abs(found.rise):.0%} while watched"


def start_up_s(samples: Sequence[Sample]) -> float:
    """When the start-up ends, by MSER-5; at most half of the samples are cut off.

    Raises ``ValueError`` for no samples.
    """
    if not samples:
        raise ValueError("no samples, so no start-up to find")
    count = len(samples) // _MSER_BATCH
    if count < 4:
        return samples[0].time_s
    values = np.array([s.value for s in samples[: count * _MSER_BATCH]]).reshape(count, _MSER_BATCH).mean(axis=1)
    left = np.arange(count, 0, -1)
    sums, squares = np.cumsum(values[::-1])[::-1], np.cumsum(values[::-1] ** 2)[::-1]
    errors = (squares - sums**2 / left) / left**2
    cut = int(np.argmin(errors[: count // 2 + 1]))
    return samples[cut * _MSER_BATCH].time_s


def student_t(probability: float, degrees: float) -> float:
    """The two-sided quantile of Student's t (Abramowitz and Stegun 26.7.5), within 1 % from 4 degrees on."""
    z = NormalDist().inv_cdf((1 + probability) / 2)
    if isinf(degrees):
        return z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
