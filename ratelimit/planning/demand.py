"""What callers ask for: declared per tier, shaped in time by a trace, or replayed from records. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from random import Random

import msgspec

from serving.capacity import RequestShape, WorkloadMix

#: Rates are constant within a bin. Shorter ones would take the chance in one site's trace for a property of the load.
LEAST_BIN_S = 60.0
#: Longer replays have longer bins.
MOST_BINS = 2_000
#: Shapes kept of one kind of callers: a fair sample of them.
SHAPES_KEPT = 500
#: Keys of one tier told apart; the others, with the fewest requests, are taken together as alike.
KEYS_KEPT = 500
#: Keys and requests that one replay may have.
MOST_KEYS = 1_000_000
MOST_RECORDS = 20_000_000
#: More than all of mankind could ask for; beyond it, and below its inverse, numbers would end.
MOST_REQUESTS_PER_S = 1e15


class DemandError(ValueError):
    """A demand that cannot be planned for; the message says what is wrong and how to mend it."""


class CallerDemand(msgspec.Struct, frozen=True):
    """``keys`` keys of a tier that ask alike: together ``requests_per_s`` in the mean, of ``mix``.

    ``course`` is the rate in each bin as a share of the mean; ``peak`` the highest of them that is planned for.
    """

    tier: str
    keys: int
    requests_per_s: float
    mix: WorkloadMix
    peak: float = 1.0
    course: tuple[float, ...] = (1.0,)

    def times(self, factor: float) -> CallerDemand:
        """The same callers, asking that many times as often."""
        return msgspec.structs.replace(self, requests_per_s=self.requests_per_s * factor)


class Demand(msgspec.Struct, frozen=True):
    """Everything asked of one model. ``bin_s`` is 0 where every rate lasts (declared), else the length of a bin."""

    callers: tuple[CallerDemand, ...]
    source: str
    bin_s: float = 0.0

    def times(self, factor: float) -> Demand:
        """The same demand, so many times as often. Raises ``DemandError`` for a factor that is none."""
        if not (isfinite(factor) and factor > 0):
            raise DemandError(f"the demand times {factor} is none; give a number above 0")
        if not 1 / MOST_REQUESTS_PER_S <= factor * self.requests_per_s <= MOST_REQUESTS_PER_S:
            raise DemandError(
                f"the demand times {factor:g} is {factor * self.requests_per_s:,.4g} requests/s, which is none; "
                "give a number nearer to 1"
            )
        return msgspec.structs.replace(self, callers=tuple(each.times(factor) for each in self.callers))

    @property
    def requests_per_s(self) -> float:
        """The mean of all callers together."""
        return sum(each.requests_per_s for each in self.callers)

    def keys(self) -> dict[str, int]:
        """Active keys of each tier."""
        found: dict[str, int] = {}
        for each in self.callers:
            found[each.tier] = found.get(each.tier, 0) + each.keys
        return found


class Asked(msgspec.Struct, frozen=True):
    """One recorded request: when (seconds), by whom, and its lengths; ``cached_tokens`` are part of the input."""

    time_s: float
    tier: str
    key: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0


class _Seen:
    """What one key asked for, so far."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.shapes: list[RequestShape] = []

    def add(self, asked: Asked, rng: Random) -> None:
        self.times_s.append(asked.time_s)
        shape = RequestShape(asked.input_tokens, asked.output_tokens, asked.cached_tokens)
        if len(self.shapes) < SHAPES_KEPT:
            self.shapes.append(shape)
        elif (place := rng.randrange(len(self.times_s))) < SHAPES_KEPT:
            self.shapes[place] = shape


def replayed(requests: Iterable[Asked], source: str) -> Demand:
    """The demand that was recorded: each key's own rates and shapes; the smallest keys of a tier taken together.

    Raises ``DemandError`` where nothing was recorded, or more than can be kept.
    """
    by_key: dict[tuple[str, str], _Seen] = {}
    rng = Random(0)  # noqa: S311 - a fair sample, not security
    for count, asked in enumerate(requests, start=1):
        if count > MOST_RECORDS:
            raise DemandError(f"{source} has more than {MOST_RECORDS:,} requests; replay a part of it")
        seen = by_key.get((asked.tier, asked.key))
        if seen is None:
            if len(by_key) >= MOST_KEYS:
                raise DemandError(f"{source} has more than {MOST_KEYS:,} keys; replay a part of it")
            seen = by_key[asked.tier, asked.key] = _Seen()
        seen.add(asked, rng)
    if not by_key:
        raise DemandError(f"{source} has no requests; give one that covers some traffic")
    start_s = min(min(seen.times_s) for seen in by_key.values())
    bins, bin_s = _bins(max(max(seen.times_s) for seen in by_key.values()) - start_s)
    callers = []
    for tier in sorted({tier for tier, _ in by_key}):
        keys = [seen for (of, _), seen in by_key.items() if of == tier]
        keys.sort(key=lambda seen: -len(seen.times_s))
        apart, together = keys[:KEYS_KEPT], keys[KEYS_KEPT:]
        groups = [[seen] for seen in apart] + ([together] if together else [])
        callers += [_callers(tier, group, start_s, bins, bin_s) for group in groups]
    return Demand(tuple(callers), source, bin_s)


def _callers(tier: str, keys: Sequence[_Seen], start_s: float, bins: int, bin_s: float) -> CallerDemand:
    times_s = [time_s for seen in keys for time_s in seen.times_s]
    course = course_of(times_s, start_s, bins, bin_s)
    shapes = [shape for seen in keys for shape in seen.shapes]
    return CallerDemand(
        tier=tier,
        keys=len(keys),
        requests_per_s=len(times_s) / (bins * bin_s),
        mix=WorkloadMix(f"replayed {tier}", tuple(shapes[:: max(1, len(shapes) // SHAPES_KEPT)])),
        peak=max(course),
        course=course,
    )


def shaped(callers: Sequence[CallerDemand], times_s: Sequence[float], source: str) -> Demand:
    """Declared callers, their mean rates spread over time as those of a trace are."""
    if not times_s:
        raise DemandError(f"{source} has no requests; give a trace that covers some traffic")
    start_s = min(times_s)
    bins, bin_s = _bins(max(times_s) - start_s)
    course = course_of(times_s, start_s, bins, bin_s)
    peak = max(course)
    spread = tuple(msgspec.structs.replace(each, course=course, peak=peak) for each in callers)
    return Demand(spread, source, bin_s)


def course_of(times_s: Sequence[float], start_s: float, bins: int, bin_s: float) -> tuple[float, ...]:
    """The rate in each bin as a share of the mean rate."""
    counts = [0] * bins
    for time_s in times_s:
        counts[min(int((time_s - start_s) / bin_s), bins - 1)] += 1
    mean = len(times_s) / bins
    return tuple(count / mean for count in counts)


def _bins(duration_s: float) -> tuple[int, float]:
    """How many bins, and how long: whole ones, so that the last is not cut short by more than its length."""
    if not isfinite(duration_s):
        raise DemandError("a time of the records is not a finite number; mend or leave out that line")
    bin_s = max(LEAST_BIN_S, duration_s / MOST_BINS)
    return max(1, round(duration_s / bin_s)), bin_s
