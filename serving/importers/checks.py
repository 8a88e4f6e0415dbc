"""What cannot be true of a run, whichever tool wrote it: contradictions, other units, other denominators. Pure.

The bounds are wide: they let every honest run pass, of engines fast and slow, and catch errors by a factor of ten or
more (milliseconds for seconds is 1000) and rates that were divided by a number of GPUs. The 270 runs of
``serving/profiles/bench_serve_results.csv`` keep within a third of them, but for those that contradict themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from serving.importers.results import RunRefusedError
from serving.points import MeasuredPoint

#: By how much a stated rate may differ from its totals ÷ duration, beside its rounding.
RATE_TOLERANCE = 0.05
#: With more failures than this, what succeeded had a lighter load than the file says.
MOST_FAILED_SHARE = 0.01
#: No answer's first token, and no token of a stream in the mean, comes faster than this over HTTP.
LEAST_LATENCY_S = 1e-4
#: A request lives no longer than its run, beside rounding.
LONGEST_LIFE = 1.1
#: By how much the requests in flight by Little's law may exceed their bound; means of unlike weights are not exact.
MOST_IN_FLIGHT_SHARE = 2.0
#: A closed loop, or a burst, keeps its requests in flight; this share of them says that times are in another unit.
LEAST_IN_FLIGHT_SHARE = 0.01
#: TTFT holds a whole step, and TPOT is about one: far below it, the two are in unlike units.
LEAST_TTFT_IN_TPOTS = 0.05
#: TTFT + TPOT·(O − 1) is the life of a request; means over unlike answers leave it within this factor.
LIFE_FACTOR = 3.0

_UNITS = "are TTFT and TPOT in milliseconds, and the duration in seconds?"
_LATENCIES = ("ttft", "tpot")


class StatedRate(NamedTuple):
    """A rate as the file states it, and the total that it should be, both per run; ``digit`` is its last digit's worth.

    ``field`` is its name in the file.
    """

    field: str
    per_s: float | None
    total: float
    digit: float = 0.0


def checked(point: MeasuredPoint, rates: tuple[StatedRate, ...] = ()) -> MeasuredPoint:
    """The same point. Raises ``RunRefusedError`` with the first thing that cannot be true of it."""
    for problem in (*_of_counts(point), *_of_rates(point, rates), *_of_quantiles(point), *_of_times(point)):
        raise RunRefusedError(problem)
    return point


def check_succeeded(completed: int, failed: int) -> None:
    """Raise ``RunRefusedError`` for a run in which nothing succeeded, or too much failed."""
    if completed == 0:
        raise RunRefusedError(
            f"none of its {failed} requests succeeded, so it measured nothing; mend what failed, and run it again"
        )
    if failed > MOST_FAILED_SHARE * (completed + failed):
        raise RunRefusedError(
            f"{failed} of its {completed + failed} requests failed, so the rest had a lighter load than it says; "
            f"mend what made them fail and run it again"
        )


def _of_counts(point: MeasuredPoint) -> Iterator[str]:
    if point.duration_s <= 0:
        yield f"its duration is {point.duration_s:g} s, it must be above 0"
    if point.input_tokens < point.requests or point.output_tokens < point.requests:
        yield (
            f"its {point.requests} requests had {point.input_tokens} input and {point.output_tokens} output tokens; "
            f"each has at least one of both, and these must be totals, not means"
        )
    if point.cached_tokens > point.input_tokens:
        yield f"{point.cached_tokens} of its {point.input_tokens} input tokens were cached; cached ones are among them"


def _of_rates(point: MeasuredPoint, rates: tuple[StatedRate, ...]) -> Iterator[str]:
    for rate in rates:
        if rate.per_s is None:
            continue
        implied = rate.total / point.duration_s
        if abs(rate.per_s - implied) > max(RATE_TOLERANCE * implied, rate.digit):
            yield (
                f"{rate.field} is {rate.per_s:g}, but its total of {rate.total:g} in {point.duration_s:g} s makes "
                f"{implied:.4g} per second; {_guess(implied, rate.per_s)}"
            )


def _guess(implied: float, stated: float) -> str:
    factor = max(implied, stated) / min(implied, stated) if min(implied, stated) > 0 else 0.0
    if 900 <= factor <= 1100:
        return "the factor of 1000 looks like milliseconds where seconds belong, so give the duration in seconds"
    if 1.5 <= factor <= 1100 and abs(factor - round(factor)) <= RATE_TOLERANCE * factor:
        return (
            f"the factor of {factor:.0f} looks like a rate per GPU (disaggregated results divide input by prefill GPUs "
            f"and output by decode GPUs), so give totals of one whole replica"
        )
    return "the two are not of the same requests or the same time, so import the file as the tool wrote it"


def _of_quantiles(point: MeasuredPoint) -> Iterator[str]:
    for name in _LATENCIES:
        known = [(q, value) for q in (50, 95, 99) if (value := getattr(point, f"{name}_p{q}_s")) is not None]
        for q, value in known:
            if value == 0:
                yield f"the {q}th percentile of its {name.upper()} is 0, and no answer takes no time; {_UNITS}"
        for (low_q, low), (high_q, high) in pairwise(known):
            if low > high:
                yield (
                    f"{name.upper()} is {low:g} s at the {low_q}th percentile, above {high:g} s at the {high_q}th; "
                    f"are they exchanged?"
                )


def _of_times(point: MeasuredPoint) -> Iterator[str]:
    for name in _LATENCIES:
        mean_s = getattr(point, f"{name}_mean_s")
        if mean_s is not None and mean_s < LEAST_LATENCY_S:
            yield f"its mean {name.upper()} is {mean_s * 1e3:g} ms, which no server reaches; {_UNITS}"
    yield from _of_life(point)
    ttft_s = point.ttft_mean_s or point.ttft_p50_s
    tpot_s = point.tpot_mean_s or point.tpot_p50_s
    if ttft_s is None or tpot_s is None:
        return
    if ttft_s < LEAST_TTFT_IN_TPOTS * tpot_s:
        yield f"its TTFT of {ttft_s * 1e3:.3g} ms is far below its TPOT of {tpot_s * 1e3:.3g} ms; {_UNITS}"
    made_s = ttft_s + (point.itl_mean_s or tpot_s) * (point.mean_output_tokens - 1)
    life_s = point.e2e_mean_s
    if life_s is not None and not made_s / LIFE_FACTOR <= life_s <= made_s * LIFE_FACTOR:
        yield (
            f"its requests lived {life_s:.3g} s in the mean, but TTFT and TPOT make {made_s:.3g} s of "
            f"{point.mean_output_tokens:.0f} tokens; are all of them in the same unit?"
        )


def _of_life(point: MeasuredPoint) -> Iterator[str]:
    life_s, in_flight = point.life_s, point.in_flight
    if life_s is None or in_flight is None:
        return
    if life_s > LONGEST_LIFE * point.duration_s:
        yield f"its requests took {life_s:.3g} s in the mean, longer than the run of {point.duration_s:g} s; {_UNITS}"
    if point.concurrency is None:
        return
    if in_flight > MOST_IN_FLIGHT_SHARE * max(1.0, point.concurrency):
        yield (
            f"its latencies put {in_flight:.3g} requests in flight in the mean, above the "
            f"{point.concurrency:g} that it allowed; {_UNITS}"
        )
    if point.offered_per_s is None and in_flight < LEAST_IN_FLIGHT_SHARE * point.concurrency:
        yield (
            f"its latencies put {in_flight:.3g} requests in flight in the mean, of "
            f"{point.concurrency:g} that were sent together; {_UNITS}"
        )
