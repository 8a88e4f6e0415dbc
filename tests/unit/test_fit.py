from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from serving.capacity import StepTimeModel
from serving.fit import FitError, fit_step_time, residual
from serving.points import MeasuredPoint

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
    found, fit = fit_step_time([point(mix, c, model) for mix, c in SWEEP])

    for name in StepTimeModel.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(model, name), rel=1e-3)
    assert fit.residual_max < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.05, 0.05), min_size=len(SWEEP), max_size=len(SWEEP)))
def test_noise_shows_as_residuals_and_never_as_negative_times(errors: list[float]) -> None:
    """With up to 5 % of noise every coefficient stays physical and no point is missed by more than three times that."""
    found, fit = fit_step_time([point(mix, c, error=e) for (mix, c), e in zip(SWEEP, errors, strict=True)])

    assert found.base_s > 0
    assert min(found.prompt_token_s, found.sequence_s, found.kv_token_s) >= 0
    assert fit.residual_median <= fit.residual_max < 0.15
    assert len(fit.points) == len(SWEEP)


def test_the_residual_is_the_error_of_the_token_rate() -> None:
    """A run that took a quarter longer than the model says was a fifth slower, so the model is 25 % too fast."""
    assert residual(MODEL, point("chat", 4, error=0.25)) == pytest.approx(0.25)


def test_too_few_mixes_are_refused() -> None:
    """Three mixes do not determine four coefficients."""
    with pytest.raises(FitError, match="3 mixes were measured, a fit needs at least 4"):
        fit_step_time([point(mix, c) for mix, c in SWEEP if mix != "chat"])


def test_a_decode_heavy_mix_is_required() -> None:
    """Without it decode cannot be told from prefill, whatever the number of mixes."""
    points = [point(mix, c) for mix, c in SWEEP if mix != "decode-heavy"]
    relabelled = [replace(p, mix="other") for p in points[:2]]

    with pytest.raises(FitError, match="no mix is dominated by output"):
        fit_step_time([*points, *relabelled])


def test_points_without_steps_are_named() -> None:
    """A point in which nothing ran is named by its mix and concurrency."""
    empty = replace(point("chat", 1), steps=0.0)

    with pytest.raises(FitError, match="without duration or steps: chat at concurrency 1"):
        fit_step_time([empty, *(point(mix, c) for mix, c in SWEEP)])


def test_a_missing_scipy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitting is an extra; without it the message says what to install."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)

    with pytest.raises(FitError, match=r"pip install 'penstock\[measure\]'"):
        fit_step_time([point(mix, c) for mix, c in SWEEP])
