"""What the scenario claims, each judged from the figures. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from loadtests.prediction import Prediction
from loadtests.results import Figures

LEAST_THROTTLED_AT_FIRST = 0.50
MOST_THROTTLED_AT_LAST = 0.02
LEAST_THROTTLED_IN_CONTROL = 0.20
PREDICTION_TOLERANCE = 0.05
#: Above this throttled share the limits bind, so they can be judged as too low or too high.
LIMITS_BIND = 0.20
LEAST_GOODPUT = 0.85
LEAST_SLO_MET = 0.95
MOST_LAG_MS = 50.0
MOST_PROMPT_ERROR = 0.01


class Claim(msgspec.Struct, frozen=True):
    """One statement, whether it holds, and the numbers it was judged by."""

    name: str
    holds: bool
    detail: str


class StepResult(msgspec.Struct, frozen=True):
    """One load against one fleet. ``prediction`` is None where no limits were enforced."""

    title: str
    replicas: int
    capacity_tokens_per_s: float
    prediction: Prediction | None
    figures: Figures


def judge(steps: Sequence[StepResult], control: StepResult, limiter_off: StepResult) -> list[Claim]:
    """Every claim of the scenario, in the order of its story."""
    loads = [*steps, control]
    return [
        *_throttling(steps, control),
        *(claim for step in loads for claim in _prediction(step)),
        *(claim for step in loads if step.figures.throttled_share > LIMITS_BIND for claim in _calibration(step)),
        _breaks_without_limiter(limiter_off),
        *_validity([limiter_off, *loads]),
    ]


def _throttling(steps: Sequence[StepResult], control: StepResult) -> Iterator[Claim]:
    first, last = steps[0], steps[-1]
    share = first.figures.throttled_share
    yield Claim(
        f"{first.title}: the load is throttled",
        share >= LEAST_THROTTLED_AT_FIRST,
        f"{share:.3f} of the tokens refused, at least {LEAST_THROTTLED_AT_FIRST:.2f} expected",
    )
    for before, after in pairwise(steps):
        was, now = before.figures.throttled_share, after.figures.throttled_share
        yield Claim(f"{after.title}: throttling falls", now < was, f"{was:.3f} → {now:.3f}")
    share = last.figures.throttled_share
    yield Claim(
        f"{last.title}: throttling is gone",
        share <= MOST_THROTTLED_AT_LAST,
        f"{share:.3f} of the tokens refused, at most {MOST_THROTTLED_AT_LAST:.2f} expected",
    )
    share = control.figures.throttled_share
    yield Claim(
        f"{control.title}: the limiter still throttles",
        share >= LEAST_THROTTLED_IN_CONTROL,
        f"{share:.3f} of the tokens refused, at least {LEAST_THROTTLED_IN_CONTROL:.2f} expected",
    )


def _prediction(step: StepResult) -> Iterator[Claim]:
    if step.prediction is None:
        return
    foretold, seen = step.prediction.throttled_share, step.figures.throttled_share
    yield Claim(
        f"{step.title}: as predicted",
        abs(foretold - seen) <= PREDICTION_TOLERANCE,
        f"predicted {foretold:.3f}, observed {seen:.3f}, tolerance {PREDICTION_TOLERANCE:.2f}",
    )


def _calibration(step: StepResult) -> Iterator[Claim]:
    figures = step.figures
    ratio = figures.goodput_tokens_per_s / step.capacity_tokens_per_s
    yield Claim(
        f"{step.title}: limits are not too low",
        ratio >= LEAST_GOODPUT,
        f"goodput {figures.goodput_tokens_per_s:.0f} of {step.capacity_tokens_per_s:.0f} tokens/s, {ratio:.2f}",
    )
    yield Claim(
        f"{step.title}: limits are not too high",
        figures.slo_met_share >= LEAST_SLO_MET,
        f"{figures.slo_met_share:.3f} of the admitted requests met the SLO; "
        f"p95 TTFT {figures.ttft_p95_ms:.0f} ms, TPOT {figures.tpot_p95_ms:.0f} ms",
    )


def _breaks_without_limiter(limiter_off: StepResult) -> Claim:
    figures = limiter_off.figures
    return Claim(
        f"{limiter_off.title}: the SLO breaks",
        figures.slo_met_share < LEAST_SLO_MET,
        f"{figures.slo_met_share:.3f} of the requests met the SLO; "
        f"p95 TTFT {figures.ttft_p95_ms:.0f} ms, TPOT {figures.tpot_p95_ms:.0f} ms",
    )


def _validity(loads: Sequence[StepResult]) -> Iterator[Claim]:
    lag_ms = max(step.figures.schedule_lag_p99_ms for step in loads)
    peak = max(step.figures.peak_in_flight for step in loads)
    yield Claim(
        "the load was open-loop",
        lag_ms <= MOST_LAG_MS,
        f"worst p99 of the lag at the socket {lag_ms:.1f} ms, at most {MOST_LAG_MS:.0f} ms; {peak} in flight at peak",
    )
    prompt_error = max(abs(step.figures.planned_input_error) for step in loads)
    yield Claim(
        "prompts had their planned lengths",
        prompt_error <= MOST_PROMPT_ERROR,
        f"planned and counted prompt tokens differ by {prompt_error:.2%}",
    )
    errors = sum(step.figures.errors for step in loads)
    yield Claim("no unexpected errors", errors == 0, f"{errors} requests failed")
