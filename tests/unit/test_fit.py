from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from serving.capacity import StepTimeModel
from serving.equations import equation
from serving.fit import LEAST_STEADY, FitError, fit_profile, residual
from serving.gpus import GPUS, MODELS
from serving.points import MeasuredPoint
from serving.roofline import Roofline, roofline_of
from serving.solve import bounded_coefficients, mix_weights

MODEL = StepTimeModel(base_s=4e-3, prompt_token_s=2e-5, sequence_s=2.5e-5, kv_token_s=3e-8)
MIXES = {"chat": (1150, 210), "decode-heavy": (128, 1024), "prefill-heavy": (4096, 64), "long-context": (16384, 256)}


def point(mix: str, concurrency: int, model: StepTimeModel = MODEL, error: float = 0.0) -> MeasuredPoint:
    """A run of 1,000 requests that lasted what the model says, times 1 + error."""
    inputs, outputs = MIXES[mix]
    requests = 1000
    steps = requests * outputs / concurrency
    kv = requests * outputs * (inputs + outputs / 2)
    duration_s = (
        model.base_s * steps
        + model.prompt_token_s * requests * inputs
        + model.sequence_s * requests * outputs
        + model.kv_token_s * kv
    ) * (1 + error)
    return MeasuredPoint(
        mix=mix,
        concurrency=concurrency,
        duration_s=duration_s,
        requests=requests,
        input_tokens=requests * inputs,
        output_tokens=requests * outputs,
        steps=steps,
        kv_token_steps=kv,
    )


SWEEP = [(mix, concurrency) for mix in MIXES for concurrency in (1, 4, 16, 64)]
models = st.builds(
    StepTimeModel, st.floats(1e-3, 2e-2), st.floats(1e-6, 1e-4), st.floats(1e-6, 1e-4), st.floats(1e-9, 1e-7)
)


@settings(max_examples=30, deadline=None)
@given(models)
def test_exact_points_give_their_model_back(model: StepTimeModel) -> None:
    """Without noise the fit finds the coefficients that made the points, and no residual."""
    result = fit_profile([point(mix, c, model) for mix, c in SWEEP])
    found, fit = result.model, result.fit

    assert (result.form, result.provenance) == ("linear", "measured")
    for name in StepTimeModel.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(model, name), rel=1e-3)
    assert fit.residual_max < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.05, 0.05), min_size=len(SWEEP), max_size=len(SWEEP)))
def test_noise_shows_as_residuals_and_never_as_negative_times(errors: list[float]) -> None:
    """With up to 5 % of noise every coefficient stays physical and no point is missed by more than three times that."""
    result = fit_profile([point(mix, c, error=e) for (mix, c), e in zip(SWEEP, errors, strict=True)])
    found, fit = result.model, result.fit

    assert result.provenance == "measured"
    assert found.base_s > 0
    assert min(found.prompt_token_s, found.sequence_s, found.kv_token_s) >= 0
    assert fit.residual_median <= fit.residual_max < 0.15
    assert len(fit.points) == len(SWEEP)


def test_the_residual_is_the_error_of_the_token_rate() -> None:
    """A run that took a quarter longer than the model says was a fifth slower, so the model is 25 % too fast."""
    assert residual(MODEL, point("chat", 4, error=0.25)) == pytest.approx(0.25)


def test_too_few_mixes_are_no_measurement() -> None:
    """Three mixes do not determine four coefficients: the rest comes from proportions, and the reason says so."""
    result = fit_profile([point(mix, c) for mix, c in SWEEP if mix != "chat"])

    assert result.provenance == "estimated"
    assert result.reason.startswith("3 of at least 4 mixes were measured")


def test_without_a_decode_heavy_mix_there_is_no_measurement() -> None:
    """Without it decode cannot be told from prefill, whatever the number of mixes."""
    points = [point(mix, c) for mix, c in SWEEP if mix != "decode-heavy"]
    relabelled = [replace(p, mix="other") for p in points[:2]]
    result = fit_profile([*points, *relabelled])

    assert result.provenance == "estimated"
    assert result.reason.startswith("no mix is dominated by output")


def test_a_step_never_takes_nothing() -> None:
    """Where least squares would give an empty step no duration, bounds give it one, and the fit is an estimate."""
    free = StepTimeModel(0.0, 2e-5, 2.5e-5, 3e-8)
    result = fit_profile([point(mix, c, free, error=-0.03 * (c == 1)) for mix, c in SWEEP])

    assert result.model.base_s > 0
    assert result.provenance == "estimated"
    assert "empty step" in result.reason


def test_points_without_steps_are_named() -> None:
    """A point in which nothing ran is named by its mix and concurrency."""
    empty = replace(point("chat", 1), steps=0.0)

    with pytest.raises(FitError, match="without duration or steps: chat at concurrency 1"):
        fit_profile([empty, *(point(mix, c) for mix, c in SWEEP)])


def test_a_missing_scipy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitting is an extra; without it the message says what to install."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)

    with pytest.raises(FitError, match=r"pip install 'penstock\[measure\]'"):
        fit_profile([point(mix, c) for mix, c in SWEEP])


def steady(mix: str, concurrency: int, model: StepTimeModel = MODEL) -> MeasuredPoint:
    """A closed loop of 1,000 requests seen by its clients alone: no steps counted, a step lasts its time per token."""
    counted = point(mix, concurrency, model)
    assert counted.steps is not None
    step_s = counted.duration_s / counted.steps
    return replace(
        counted,
        steps=None,
        kv_token_steps=None,
        ttft_mean_s=step_s,
        tpot_mean_s=step_s,
        itl_mean_s=step_s,
    )


def burst(inputs: int, outputs: int, requests: int, model: StepTimeModel, facts: Roofline) -> MeasuredPoint:
    """Requests sent all at once, that last what the model says of a full batch."""
    resident = facts.batch.resident(inputs + outputs / 2, requests)
    steps = requests * outputs / resident + requests * inputs / facts.batch.max_num_batched_tokens
    duration_s = (
        model.base_s * steps
        + model.prompt_token_s * requests * inputs
        + model.sequence_s * requests * outputs
        + model.kv_token_s * requests * outputs * (inputs + outputs / 2)
    )
    return MeasuredPoint(
        mix=f"{inputs}/{outputs}",
        requests=requests,
        duration_s=duration_s,
        input_tokens=requests * inputs,
        output_tokens=requests * outputs,
        concurrency=requests,
        ttft_mean_s=duration_s * 0.4,
        tpot_mean_s=duration_s * 0.1 / outputs,
    )


FACTS = roofline_of(GPUS["H100"], 1, MODELS["llama-3.1-8b"], "bf16")
LIKELY = StepTimeModel(*(span.likely for span in FACTS.spans[:4]))
BURSTS = [(200, 200, 1000), (4000, 200, 500), (2000, 100, 500), (128, 4, 1000), (1000, 2000, 100)]
COEFFICIENTS = StepTimeModel.__struct_fields__


@settings(max_examples=30, deadline=None)
@given(models)
def test_steady_runs_without_counted_steps_give_their_model_back(model: StepTimeModel) -> None:
    """The gaps that clients see stand in for counted steps: the fit is linear, measured, and finds the coefficients."""
    result = fit_profile([steady(mix, c, model) for mix, c in SWEEP])

    assert (result.form, result.provenance, result.surface) == ("linear", "measured", None)
    assert len(result.steady) == len(SWEEP)
    for name in COEFFICIENTS:
        assert getattr(result.model, name) == pytest.approx(getattr(model, name), rel=1e-3)
    assert result.fit.loo_error_max is not None
    assert result.fit.loo_error_max < 1e-2


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.lists(st.floats(-0.04, 0.04), min_size=len(SWEEP), max_size=len(SWEEP)))
def test_a_slower_clock_scales_the_coefficients_and_nothing_else(factor: float, errors: list[float]) -> None:
    """A device so many times slower has so many times larger coefficients, the same form and the same errors."""
    points = [point(mix, c, error=e) for (mix, c), e in zip(SWEEP, errors, strict=True)]
    slowed = [replace(p, duration_s=p.duration_s * factor) for p in points]
    once, again = fit_profile(points), fit_profile(slowed)

    assert again.form == once.form
    assert again.fit.loo_error_median == pytest.approx(once.fit.loo_error_median, abs=2e-3)
    for name in COEFFICIENTS:
        expected = getattr(once.model, name) * factor
        assert getattr(again.model, name) == pytest.approx(expected, rel=1e-3, abs=1e-6 * factor * MODEL.base_s)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(len(SWEEP))))
def test_the_order_of_points_does_not_matter(order: list[int]) -> None:
    """The same points in another order give the same model."""
    points = [steady(mix, c) for mix, c in SWEEP]
    shuffled = fit_profile([points[i] for i in order]).model

    for name in COEFFICIENTS:
        assert getattr(shuffled, name) == pytest.approx(getattr(MODEL, name), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.3, 0.3), min_size=len(BURSTS), max_size=len(BURSTS)))
def test_few_steady_points_are_held_to_the_roofline_and_called_estimated(errors: list[float]) -> None:
    """Whatever the noise, every coefficient stays within its bounds, and the result never passes for a measurement."""
    points = [
        replace(run, duration_s=run.duration_s * (1 + error))
        for shape, error in zip(BURSTS, errors, strict=True)
        for run in [burst(*shape, LIKELY, FACTS)]
    ]
    result = fit_profile(points, FACTS)

    assert result.provenance == "estimated"
    assert result.form in ("bounded", "surface")
    assert result.steady == ()
    for name, span in zip(COEFFICIENTS, FACTS.spans, strict=False):
        assert span.least * (1 - 1e-9) <= getattr(result.model, name) <= span.most * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.8, 4))
def test_bursts_tell_how_much_slower_than_the_roofline_a_server_is(slowness: float) -> None:
    """A server in the likely proportions and slower by a factor is found to be slower by that factor."""
    result = fit_profile([burst(*shape, LIKELY.slowed(slowness), FACTS) for shape in BURSTS], FACTS)

    assert result.form == "bounded"
    assert result.model.prompt_token_s == pytest.approx(LIKELY.prompt_token_s * slowness, rel=0.1)
    assert result.fit.residual_max < 0.05
    assert result.fit.loo_error_median is not None
    assert result.fit.loo_error_median < 0.1


def test_without_facts_the_points_alone_tell_the_speed() -> None:
    """Of an unknown model only the proportions of a typical one are used: a server 50 times slower is still fitted."""
    result = fit_profile([burst(*shape, LIKELY.slowed(50), FACTS) for shape in BURSTS])

    assert result.provenance == "estimated"
    assert "unknown" in result.reason
    assert result.fit.residual_max < 0.05


def test_a_line_that_misses_by_more_than_a_tenth_gets_a_surface() -> None:
    """Where long contexts take half as long again, the line says so and the surface gives each measured place back."""
    points = [
        replace(p, duration_s=p.duration_s * (1.5 if p.mix == "long-context" and p.concurrency == 64 else 1))
        for p in (point(mix, c) for mix, c in SWEEP)
    ]
    result = fit_profile(points)

    assert result.form == result.fit.model_form == "surface"
    assert result.linear_miss > 0.10
    assert f"the linear model misses a point by {result.linear_miss:.0%}" in result.reason
    assert result.fit.residual_max < 1e-3
    assert result.surface is not None
    assert len(result.surface.points) == len(SWEEP)
    for each, place in zip(points, result.surface.points, strict=True):
        assert 1 / (1 + residual(result.model, each)) == pytest.approx(1 / place.factor, rel=1e-6)


def test_the_miss_that_is_told_is_that_of_the_line_which_called_for_a_surface() -> None:
    """Under bounds the line is fitted once without attention; what is told is how far that one is off."""
    slow = [
        burst(i, o, n, replace(LIKELY, prompt_token_s=LIKELY.prompt_token_s * i / 500), FACTS) for i, o, n in BURSTS
    ]
    result = fit_profile(slow, FACTS)
    rows = [equation(run, FACTS.batch) for run in slow]
    line = bounded_coefficients(
        [row.linear for row in rows], mix_weights([row.mix for row in rows]), FACTS.spans[:4], speed_known=True
    )

    assert result.form == "surface"
    assert result.linear_miss == pytest.approx(
        max(abs(residual(StepTimeModel(*line), run, FACTS.batch)) for run in slow)
    )


def test_unsteady_points_are_left_out_of_a_measured_fit() -> None:
    """A burst among enough steady runs changes nothing, and the reason says that it was left out."""
    runs = [steady(mix, c) for mix, c in SWEEP]
    with_burst = fit_profile([*runs, burst(200, 200, 1000, MODEL.slowed(9), FACTS)])

    assert with_burst.model == fit_profile(runs).model
    assert "1 unsteady" in with_burst.reason
    assert with_burst.fit.points == tuple(runs)


def test_one_steady_point_fewer_is_no_measurement() -> None:
    """Seven steady points are enough, six are not."""
    runs = [steady(mix, c) for mix, c in SWEEP]

    assert fit_profile(runs[:: len(runs) // LEAST_STEADY][:LEAST_STEADY]).provenance == "measured"
    assert fit_profile(runs[::3][: LEAST_STEADY - 1]).provenance == "estimated"


def test_the_measured_range_of_contexts_is_told() -> None:
    """The least and the greatest mean context (input + half the output) of the points stand on the fit."""
    measured = fit_profile([steady(mix, c) for mix, c in SWEEP]).fit.context

    assert measured is not None
    assert (measured.least_tokens, measured.most_tokens) == (128 + 512, 16384 + 128)


def test_the_step_time_model_predicts_unseen_mixes_better_than_two_rates() -> None:
    """Of a server that follows the model, an envelope of two rates misses what it has not seen by far more."""
    fit = fit_profile([steady(mix, c) for mix, c in SWEEP]).fit

    assert fit.loo_error_median is not None
    assert fit.two_rate_error_median is not None
    assert fit.loo_error_median < fit.two_rate_error_median / 10


def test_two_rates_are_not_compared_where_arrivals_set_the_rate() -> None:
    """Runs at a rate last as long as their arrivals: the fit is judged by step times, the envelope not at all."""
    fit = fit_profile([replace(steady(mix, c), offered_per_s=1.0) for mix, c in SWEEP]).fit

    assert fit.loo_error_median is not None
    assert fit.two_rate_error_median is None


def test_steady_closed_loops_count_among_the_loaded_runs_of_a_bounded_fit() -> None:
    """Only open loops last as long as their arrivals; a closed loop of another mix is a third one to leave out."""
    bursts = [burst(*shape, LIKELY, FACTS) for shape in BURSTS[:2]]
    loop = steady("chat", 16, LIKELY)
    rated = replace(loop, offered_per_s=loop.requests / loop.duration_s)

    assert fit_profile([*bursts, loop], FACTS).fit.loo_error_median is not None
    assert fit_profile([*bursts, rated], FACTS).fit.loo_error_median is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"duration_s": float("nan")}, "not a number"),
        ({"duration_s": float("inf")}, "not a number"),
        ({"duration_s": -1.0}, "without duration"),
        ({"busy_s": 0.0}, "busy_s is 0.0"),
        ({"steps": -1.0}, "without duration or steps"),
        ({"requests": 0}, "without requests"),
        ({"output_tokens": -5}, "without requests or output"),
        ({"cached_tokens": 10**9}, "more cached tokens"),
    ],
)
def test_points_that_make_no_sense_are_refused(wrong: dict[str, float], message: str) -> None:
    """Nothing is fitted to NaN, to negative amounts or to more cached tokens than were read."""
    runs = [point(mix, c) for mix, c in SWEEP]

    with pytest.raises(FitError, match=message):
        fit_profile([replace(runs[0], **wrong), *runs[1:]])


def test_no_point_at_all_is_refused() -> None:
    """An empty list is an error, not an empty fit."""
    with pytest.raises(FitError, match="no point"):
        fit_profile([])


def test_a_coefficient_that_the_rows_do_not_tell_follows_the_others() -> None:
    """With prompts alone measured, twice as slow as likely, the rest is taken to be about twice as slow too."""
    spans = FACTS.spans[:4]
    rows = [(0.0, 1 / (2 * spans[1].likely), 0.0, 0.0)]
    found = bounded_coefficients(rows, [1.0], spans, speed_known=True)

    for value, span in zip(found, spans, strict=True):
        assert value == pytest.approx(2 * span.likely, rel=0.1)
