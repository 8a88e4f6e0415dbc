"""From measured points to the step-time model that explains them best, and how well it does.

Over a steady run of D seconds, all of them spent in steps, the model says

    D = c0·(steps) + c_p·(prompt tokens) + c_s·(output tokens) + c_k·Σ O·(I + O/2)

One such equation for each point, divided by its D so that every point counts by its relative error, is solved for
coefficients that are not negative. The points must differ in their proportions, or the coefficients cannot be told
apart: at least four mixes, one of them dominated by output (GPU servers measured with too few gave negative rates).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec
import numpy as np

from serving.capacity import StepTimeModel
from serving.points import MeasuredPoint
from serving.profile import Fit, ModelForm, ProvenanceKind
from serving.roofline import Roofline
from serving.steady_points import steady_points
from serving.surface import Surface

LEAST_MIXES = 4
#: With fewer steady points than this, least squares alone is not trusted.
LEAST_STEADY = 7
#: A mix is dominated by output where it emits at least this many tokens for each it reads.
DECODE_HEAVY_RATIO = 2.0


class FitResult(msgspec.Struct, frozen=True):
    """A step-time model, how well it holds, and how far it is to be trusted.

    ``provenance`` is ``measured`` where the model stands on enough steady points, else ``estimated``. ``steady`` are
    those points. ``reason`` says in one sentence why the form is what it is. ``surface`` is set for that form only.
    """

    model: StepTimeModel
    fit: Fit
    form: ModelForm
    provenance: ProvenanceKind
    steady: tuple[MeasuredPoint, ...]
    reason: str
    surface: Surface | None = None


class FitError(ValueError):
    """These points do not determine a step-time model; the message says what is missing."""


def fit_step_time(points: Sequence[MeasuredPoint]) -> tuple[StepTimeModel, Fit]:
    """The non-negative least-squares model of the points, and its residuals. Raises ``FitError``."""
    _check_points(points)
    rows = np.array([_equation(point) for point in points])
    scale = rows.max(axis=0)
    coefficients = _nnls(rows / scale, np.ones(len(points))) / scale
    model = StepTimeModel(*(float(value) for value in coefficients))
    if model.base_s == 0:
        raise FitError("the points give an empty step no duration; measure lower concurrencies too")
    errors = sorted(abs(residual(model, point)) for point in points)
    return model, Fit(tuple(points), residual_median=round(median(errors), 4), residual_max=round(errors[-1], 4))


def fit_profile(points: Sequence[MeasuredPoint], facts: Roofline | None = None) -> FitResult:
    """The best model that the points and the facts allow. Raises ``FitError`` for senseless input."""
    steady, _ = steady_points(points)
    model, fit = fit_step_time(points)
    why = f"{len(steady)} of {len(points)} points are steady" + ("" if facts is None else f"; {facts.source}")
    return FitResult(model, fit, "linear", "measured" if len(steady) >= LEAST_STEADY else "estimated", steady, why)


def residual(model: StepTimeModel, point: MeasuredPoint) -> float:
    """By how much the model's token rate exceeds the measured one at that point, as a share of it."""
    coefficients = (model.base_s, model.prompt_token_s, model.sequence_s, model.kv_token_s)
    predicted = sum(c * x for c, x in zip(coefficients, _equation(point), strict=True))
    return 1 / predicted - 1


def _equation(point: MeasuredPoint) -> tuple[float, float, float, float]:
    """What one second of the run held: steps, prompt tokens, output tokens, KV tokens read."""
    duration_s = point.duration_s
    return (
        (point.steps or 0.0) / duration_s,
        point.input_tokens / duration_s,
        point.output_tokens / duration_s,
        (point.kv_token_steps or 0.0) / duration_s,
    )


def _check_points(points: Sequence[MeasuredPoint]) -> None:
    mixes = {point.mix for point in points}
    if len(mixes) < LEAST_MIXES:
        raise FitError(f"{len(mixes)} mixes were measured, a fit needs at least {LEAST_MIXES}")
    if not any(point.output_tokens >= DECODE_HEAVY_RATIO * point.input_tokens for point in points):
        raise FitError("no mix is dominated by output, so decode and prefill cannot be told apart")
    empty = [f"{p.mix} at concurrency {p.concurrency:g}" for p in points if min(p.steps or 0, p.duration_s) <= 0]
    if empty:
        raise FitError(f"points without duration or steps: {', '.join(empty)}")


def _nnls(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    try:
        from scipy.optimize import nnls  # noqa: PLC0415 - only the extra "measure" installs SciPy
    except ImportError as error:
        raise FitError("fitting needs SciPy: pip install 'penstock[measure]'") from error
    solution, _ = nnls(rows, target)
    return np.asarray(solution)
