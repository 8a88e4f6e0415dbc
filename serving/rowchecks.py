"""What cannot be true of a benchmark's row: where its own numbers contradict each other, or physics. Pure.

Each check gives one sentence, what is wrong and how to mend it, or None. Factors near 1,000 are named as what they
mostly are: milliseconds in a column of seconds, or the reverse.
"""

from __future__ import annotations

from collections.abc import Callable

from serving.benchrows import BenchRow, points_of
from serving.gpus import GpuFacts, ModelFacts, WeightDtype

#: A rate may differ so much from its total ÷ duration: tools take the duration to the first or last byte.
RATE_TOLERANCE = 0.03
#: Rates are printed with two decimals.
PRINTED_STEP = 0.005
#: A mean may exceed its 99th percentile by this factor: a few outliers weigh on the mean alone.
MEAN_OVER_P99 = 2.0
#: Means and medians, times per token and gaps between tokens, agree within this factor or are in different units.
SAME_UNIT = 30.0
#: A life may exceed the run, and those in flight the most in flight, by this share: means are of unlike weights.
MEAN_SLACK = 1.05
#: Requests sent all at once make a run last no longer than so many of their mean lives: first come, first served gives
#: 2, and answers of very unlike lengths up to 2.9 in the published runs.
LONGEST_BURST_LIVES = 4.0
#: No engine gives one stream a token in less time; the fastest published are at some 1 ms.
LEAST_TOKEN_MS = 0.25
#: How far above the data sheet's peak arithmetic a rate is wrong beyond doubt; a prefix cache may save some of it.
MOST_OVER_PEAK = 2.0

ENGINES = ("vllm", "sglang", "tensorrt-llm")


def row_problem(row: BenchRow) -> str | None:
    """The first contradiction within the row; None where there is none."""
    return next((problem for check in CHECKS if (problem := check(row)) is not None), None)


def beyond_peak(row: BenchRow, gpu: GpuFacts, gpus: int, model: ModelFacts, dtype: WeightDtype) -> str | None:
    """Whether the tokens would need more arithmetic than the GPUs have."""
    tokens_per_s = (row.number("input_tokens") + row.number("output_tokens")) / row.number("duration_s")
    peak = gpu.flops_at(dtype) * gpus / (2 * model.active_parameters)
    if tokens_per_s <= MOST_OVER_PEAK * peak:
        return None
    return (
        f"{tokens_per_s:,.0f} tokens/s are {tokens_per_s / peak:.0f} times what {gpus} × {gpu.name} can multiply for "
        f"{model.name} ({peak:,.0f}): are duration_s, the tokens or the number of GPUs in serve_command right?"
    )


def _engine(row: BenchRow) -> str | None:
    ends_in = row.text["section"].rpartition(">")[2].strip().lower()
    if ends_in in ENGINES and ends_in != row.served.engine.lower():
        return f"section is of {ends_in}, engine says {row.served.engine}: correct engine and serve_command"
    return None


def _rates(row: BenchRow) -> str | None:
    totals = {
        "req_s": row.number("requests"),
        "output_tok_s": row.number("output_tokens"),
        "total_tok_s": row.number("input_tokens") + row.number("output_tokens"),
    }
    for column, total in totals.items():
        stated, reckoned = row.numbers[column], total / row.number("duration_s")
        if stated is not None and abs(stated - reckoned) > RATE_TOLERANCE * reckoned + PRINTED_STEP:
            return (
                f"{column} is {stated:g}, but the totals over duration_s give {reckoned:.4g}"
                f"{_unit_hint(stated / reckoned)}: correct one of them, or blank the rate"
            )
    return None


def _order(row: BenchRow) -> str | None:
    for name in ("ttft", "tpot"):
        mean, p50, p99 = (row.numbers[f"{name}_{which}_ms"] for which in ("mean", "p50", "p99"))
        if p50 is not None and p99 is not None and p50 > p99:
            return f"{name}_p50_ms is {p50:g}, above {name}_p99_ms of {p99:g}: are the columns swapped?"
        if mean is not None and p99 is not None and mean > MEAN_OVER_P99 * p99:
            return f"{name}_mean_ms is {mean:g}, far above {name}_p99_ms of {p99:g}{_unit_hint(mean / p99)}"
        if mean is not None and p50 is not None and not 1 / SAME_UNIT < mean / p50 < SAME_UNIT:
            return f"{name}_mean_ms is {mean:g} and {name}_p50_ms {p50:g}{_unit_hint(mean / p50)}: correct one of them"
    return None


def _token_times(row: BenchRow) -> str | None:
    tpot, itl = row.numbers["tpot_mean_ms"], row.numbers["itl_mean_ms"]
    if tpot is not None and itl is not None and not 1 / SAME_UNIT < tpot / itl < SAME_UNIT:
        return f"tpot_mean_ms is {tpot:g} and itl_mean_ms {itl:g}{_unit_hint(tpot / itl)}: correct one of them"
    for column in ("tpot_mean_ms", "tpot_p50_ms"):
        value = row.numbers[column]
        if value is not None and value < LEAST_TOKEN_MS:
            return (
                f"{column} is {value:g}, and no engine gives one stream a token each {LEAST_TOKEN_MS:g} ms: if it is "
                "in seconds, multiply by 1000; if tokens arrived in bunches, the client did not see their times"
            )
    return None


def _lives(row: BenchRow) -> str | None:
    (point,) = points_of([row])
    life_s, duration_s, most = point.life_s, point.duration_s, point.concurrency
    if life_s is None:
        return None
    if life_s > MEAN_SLACK * duration_s:
        return (
            f"the mean request took {life_s:.4g} s (TTFT + time per token × tokens) of a run of {duration_s:.4g} s"
            f"{_unit_hint(life_s / duration_s)}: correct duration_s or the latencies"
        )
    in_flight = point.requests * life_s / duration_s
    if most is not None and in_flight > MEAN_SLACK * most:
        return f"{in_flight:.0f} requests were in flight in the mean, but peak_concurrency is {most:g}: correct one"
    at_once = most is not None and point.requests > 1 and most >= 0.9 * point.requests
    if at_once and duration_s > LONGEST_BURST_LIVES * life_s:
        return (
            f"all requests were sent at once and took {life_s:.4g} s in the mean, yet the run lasted {duration_s:.4g} s"
            f"{_unit_hint(duration_s / life_s)}: the latencies do not cover the whole answers"
        )
    return None


def _peak(row: BenchRow) -> str | None:
    most, requests = row.numbers["peak_concurrency"], row.number("requests")
    if most is not None and most > requests:
        return f"peak_concurrency is {most:g} with {requests:g} requests: no more can be in flight than there are"
    return None


def _answers(row: BenchRow) -> str | None:
    if row.number("output_tokens") < row.number("requests"):
        return "fewer output_tokens than requests: an answer has one at least; are failed requests counted?"
    return None


def _unit_hint(ratio: float) -> str:
    """Names a factor that is about 1,000, either way."""
    factor = max(ratio, 1 / ratio)
    return " (a factor of about 1000: seconds in place of milliseconds?)" if 300 < factor < 3000 else ""


#: In the order in which they are told: what is most likely the cause comes first.
CHECKS: tuple[Callable[[BenchRow], str | None], ...] = (
    _engine,
    _answers,
    _peak,
    _rates,
    _order,
    _token_times,
    _lives,
)
