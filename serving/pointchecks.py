"""What cannot be true of one benchmark run, whoever tells it: its numbers contradict each other, or physics. Pure.

The one set of rules for rows of tables (``rowchecks``), files of tools (``importers.checks``) and points of profiles
(``plausible``), which differ only in what they make of a problem. The bounds are wide: they let every honest run pass,
of engines fast and slow, and catch errors by a factor of ten or more (milliseconds for seconds is 1000), and rates that
were divided by a number of GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

from serving.gpus import GpuFacts, ModelFacts, WeightDtype
from serving.points import MeasuredPoint
from serving.steady_points import BURST_SHARE

#: By how much a stated rate may differ from its total ÷ duration, beside its rounding: tools take the duration to the
#: first byte or to the last.
RATE_TOLERANCE = 0.03
#: No answer's first token comes faster than this over HTTP.
LEAST_TTFT_S = 1e-4
#: No engine gives one stream a token in less time; the fastest published are at some 1 ms.
LEAST_TOKEN_S = 0.25e-3
#: A mean may exceed its 99th percentile by this factor: a few outliers weigh on the mean alone.
MEAN_OVER_P99 = 2.0
#: Means and medians, times per token and gaps between tokens, agree within this factor or are in different units.
SAME_UNIT = 30.0
#: A request lives no longer than its run, beside rounding.
LONGEST_LIFE = 1.1
#: By how much the requests in flight by Little's law may exceed their bound; means of unlike weights are not exact.
MOST_IN_FLIGHT_SHARE = 2.0
#: A closed loop keeps its requests in flight; this share of them says that times are in another unit.
LEAST_IN_FLIGHT_SHARE = 0.01
#: Requests sent all at once make a run last no longer than so many of their mean lives: first come, first served gives
#: 2, and answers of very unlike lengths up to 2.9 in the published runs.
LONGEST_BURST_LIVES = 4.0
#: TTFT holds a whole step, and TPOT is about one: far below it, the two are in unlike units.
LEAST_TTFT_IN_TPOTS = 0.05
#: TTFT + TPOT·(O − 1) is the life of a request; means over unlike answers leave it within this factor.
LIFE_FACTOR = 3.0
#: A rate beyond the peak arithmetic by more than this is an error, not a fast engine.
MOST_OVER_PEAK = 2.0

_UNITS = "are TTFT, TPOT and the duration in their units (milliseconds, seconds)?"
_LATENCIES = ("ttft", "tpot")


class StatedRate(NamedTuple):
    """A rate as its source states it, and the total that it should be, both per run; ``digit`` is its rounding.

    ``field`` is its name in the source.
    """

    field: str
    per_s: float | None
    total: float
    digit: float = 0.0


def point_problems(point: MeasuredPoint, rates: tuple[StatedRate, ...] = ()) -> Iterator[str]:
    """What is impossible in the point, each with how to mend it, the likeliest cause first."""
    broken = tuple(_of_numbers(point))
    yield from broken
    if broken or not point.requests or not point.duration_s:
        return
    yield from _of_rates(point, rates)
    for name in _LATENCIES:
        yield from _of_latency(point, name)
    yield from _of_life(point)
    yield from _of_token_times(point)
    yield from _of_load(point)


def beyond_peak(
    point: MeasuredPoint, gpu: GpuFacts, gpus: int, model: ModelFacts, dtype: WeightDtype | None = None
) -> str | None:
    """Whether the uncached tokens would need more arithmetic than the GPUs have, in that type or in their fastest."""
    flops = max(gpu.flops.values()) if dtype is None else gpu.flops_at(dtype)
    tokens_per_s = (point.input_tokens - point.cached_tokens + point.output_tokens) / point.duration_s
    peak = flops * gpus / (2 * model.active_parameters)
    if tokens_per_s <= MOST_OVER_PEAK * peak:
        return None
    return (
        f"{tokens_per_s:,.0f} tokens/s are {tokens_per_s / peak:.0f} times what {gpus} × {gpu.name} can multiply for "
        f"{model.name} ({peak:,.0f}): are the duration, the tokens and the number of GPUs right, and were prompts "
        f"cached?"
    )


def _of_numbers(point: MeasuredPoint) -> Iterator[str]:
    for field in MeasuredPoint.__struct_fields__:
        value = getattr(point, field)
        if isinstance(value, int | float) and not (isfinite(value) and value >= 0):
            yield f"{field} is {value}, it must be zero or a positive number"
    if point.duration_s == 0:
        yield "its duration is 0 s, it must be above 0"
    if min(point.input_tokens, point.output_tokens) < point.requests:
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
        if abs(rate.per_s - implied) > RATE_TOLERANCE * implied + rate.digit:
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
    return "the two are not of the same requests or the same time, so take both as the benchmark itself wrote them"


def _of_latency(point: MeasuredPoint, name: str) -> Iterator[str]:
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
    mean_s, p50_s, p99_s = (getattr(point, f"{name}_{which}_s") for which in ("mean", "p50", "p99"))
    if not mean_s:
        return
    if p99_s and mean_s > MEAN_OVER_P99 * p99_s:
        yield f"its mean {name.upper()} of {mean_s:g} s is far above its 99th percentile of {p99_s:g} s; {_UNITS}"
    if p50_s and not 1 / SAME_UNIT < mean_s / p50_s < SAME_UNIT:
        yield f"its mean {name.upper()} is {mean_s:g} s and the median {p50_s:g} s; {_UNITS}"


def _of_token_times(point: MeasuredPoint) -> Iterator[str]:
    for field, least_s in (
        ("ttft_mean_s", LEAST_TTFT_S),
        ("tpot_mean_s", LEAST_TOKEN_S),
        ("tpot_p50_s", LEAST_TOKEN_S),
    ):
        value_s = getattr(point, field)
        if value_s is not None and value_s < least_s:
            yield (
                f"{field} is {value_s * 1e3:.3g} ms, which no server reaches; {_UNITS} If tokens arrived in bunches, "
                f"the client did not see their times"
            )
    ttft_s = point.ttft_mean_s or point.ttft_p50_s
    tpot_s = point.tpot_mean_s or point.tpot_p50_s
    if tpot_s and point.itl_mean_s and not 1 / SAME_UNIT < tpot_s / point.itl_mean_s < SAME_UNIT:
        yield f"its mean TPOT is {tpot_s * 1e3:.3g} ms and its mean ITL {point.itl_mean_s * 1e3:.3g} ms; {_UNITS}"
    if ttft_s and tpot_s and ttft_s < LEAST_TTFT_IN_TPOTS * tpot_s:
        yield f"its TTFT of {ttft_s * 1e3:.3g} ms is far below its TPOT of {tpot_s * 1e3:.3g} ms; {_UNITS}"


def _of_life(point: MeasuredPoint) -> Iterator[str]:
    life_s = point.life_s
    if life_s is not None and life_s > LONGEST_LIFE * point.duration_s:
        yield f"its requests took {life_s:.3g} s in the mean, longer than the run of {point.duration_s:g} s; {_UNITS}"
    ttft_s = point.ttft_mean_s or point.ttft_p50_s
    token_s = point.itl_mean_s or point.tpot_mean_s or point.tpot_p50_s
    if point.e2e_mean_s is None or ttft_s is None or token_s is None:
        return
    made_s = ttft_s + token_s * (point.mean_output_tokens - 1)
    if not made_s / LIFE_FACTOR <= point.e2e_mean_s <= made_s * LIFE_FACTOR:
        yield (
            f"its requests lived {point.e2e_mean_s:.3g} s in the mean, but TTFT and TPOT make {made_s:.3g} s of "
            f"{point.mean_output_tokens:.0f} tokens; are all of them in the same unit?"
        )


def _of_load(point: MeasuredPoint) -> Iterator[str]:
    """Little's law against what was allowed or sent at once."""
    in_flight, most = point.in_flight, point.concurrency
    if in_flight is None or most is None:
        return
    seen = f"its latencies put {in_flight:.3g} requests in flight in the mean"
    if in_flight > MOST_IN_FLIGHT_SHARE * max(1.0, most):
        yield f"{seen}, above the {most:g} that it allowed; {_UNITS}"
    if point.offered_per_s is not None:
        return
    is_burst = point.requests > 1 and most >= BURST_SHARE * point.requests
    if in_flight < LEAST_IN_FLIGHT_SHARE * most or (is_burst and in_flight * LONGEST_BURST_LIVES < point.requests):
        yield f"{seen}, of {most:g} that were sent together; {_UNITS} Or the latencies are not of whole answers"
