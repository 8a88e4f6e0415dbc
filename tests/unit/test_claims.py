"""The claims: each holds on a good run, and each fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from loadtests.claims import Claim, StepResult, judge
from loadtests.prediction import Prediction
from loadtests.results import Figures


def step(
    title: str, replicas: int, throttled: float, *, goodput: float = 0.97, predicted: float | None = 0.0
) -> StepResult:
    """A step that went well; ``goodput`` is of the capacity, 1000 tokens/s a replica."""
    capacity = 1000.0 * replicas
    foretold = throttled + (predicted or 0.0)
    prediction = None if predicted is None else Prediction(foretold, foretold, capacity, 1.0, {})
    figures = Figures(
        offered_rps=20,
        offered_tokens_per_s=3200,
        throttled_share=throttled,
        throttled_request_share=throttled * 0.7,
        goodput_tokens_per_s=goodput * capacity,
        slo_met_share=0.99,
        ttft_p50_ms=300,
        ttft_p95_ms=900,
        tpot_p50_ms=150,
        tpot_p95_ms=250,
        errors=0,
        schedule_lag_p99_ms=3,
        peak_in_flight=200,
        planned_input_error=0.0,
    )
    return StepResult(title, replicas, capacity, prediction, figures)


class Run(msgspec.Struct):
    """A whole run, to be spoilt."""

    one: StepResult
    two: StepResult
    four: StepResult
    control: StepResult
    off: StepResult

    def claims(self) -> list[Claim]:
        """Judge it."""
        return judge([self.one, self.two, self.four], self.control, self.off)

    def failing(self) -> list[str]:
        """Names of the claims that do not hold."""
        return [claim.name for claim in self.claims() if not claim.holds]


def good_run() -> Run:
    """The figures that the recipe promises."""
    off = step("off", 1, 0.0, predicted=None)
    return Run(
        one=step("1", 1, 0.70),
        two=step("2", 2, 0.39),
        four=step("4", 4, 0.002, goodput=0.8),
        control=step("4 doubled", 4, 0.38),
        off=msgspec.structs.replace(off, figures=msgspec.structs.replace(off.figures, slo_met_share=0.1)),
    )


def with_figures(result: StepResult, **changes: float) -> StepResult:
    """The same step with other figures."""
    return msgspec.structs.replace(result, figures=msgspec.structs.replace(result.figures, **changes))


def test_a_good_run_holds_every_claim() -> None:
    """The recipe's own figures pass, and limits are judged only where they bind (not at 4 replicas)."""
    run = good_run()

    assert run.failing() == []
    names = [claim.name for claim in run.claims()]
    assert "4: limits are not too low" not in names
    assert "4 doubled: limits are not too low" in names


def spoil_first(run: Run) -> None:
    run.one = with_figures(step("1", 1, 0.49), slo_met_share=0.99)


def spoil_order(run: Run) -> None:
    run.two = step("2", 2, 0.70)


def spoil_last(run: Run) -> None:
    run.four = step("4", 4, 0.021)


def spoil_control(run: Run) -> None:
    run.control = step("4 doubled", 4, 0.19)


def spoil_prediction(run: Run) -> None:
    run.two = step("2", 2, 0.39, predicted=-0.051)


def spoil_goodput(run: Run) -> None:
    run.one = step("1", 1, 0.70, goodput=0.84)


def spoil_slo(run: Run) -> None:
    run.two = with_figures(run.two, slo_met_share=0.94)


def spoil_off(run: Run) -> None:
    run.off = with_figures(run.off, slo_met_share=0.96)


def spoil_lag(run: Run) -> None:
    run.off = with_figures(run.off, schedule_lag_p99_ms=51)


def spoil_prompts(run: Run) -> None:
    run.four = with_figures(run.four, planned_input_error=-0.02)


def spoil_errors(run: Run) -> None:
    run.control = with_figures(run.control, errors=1)


@pytest.mark.parametrize(
    ("spoil", "failing"),
    [
        (spoil_first, "1: the load is throttled"),
        (spoil_order, "2: throttling falls"),
        (spoil_last, "4: throttling is gone"),
        (spoil_control, "4 doubled: the limiter still throttles"),
        (spoil_prediction, "2: as predicted"),
        (spoil_goodput, "1: limits are not too low"),
        (spoil_slo, "2: limits are not too high"),
        (spoil_off, "off: the SLO breaks"),
        (spoil_lag, "the load was open-loop"),
        (spoil_prompts, "prompts had their planned lengths"),
        (spoil_errors, "no unexpected errors"),
    ],
)
def test_each_claim_fails_alone(spoil: Callable[[Run], None], failing: str) -> None:
    """Spoiling one figure breaks exactly the claim about it."""
    run = good_run()
    spoil(run)

    assert run.failing() == [failing]


def test_the_detail_has_the_numbers() -> None:
    """A claim says what was seen and what was asked, so that a failure needs no second run."""
    details = {claim.name: claim.detail for claim in good_run().claims()}

    assert details["2: as predicted"] == "predicted 0.390, observed 0.390, tolerance 0.05"
    assert "0.700 of the tokens refused, at least 0.50" in details["1: the load is throttled"]
