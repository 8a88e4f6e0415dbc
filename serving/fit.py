"""From measured points to the step-time model that explains them best, and how well it does. Pure.

Each point gives one equation (``equations``), divided by its busy seconds so that it counts by its relative error.
What is fitted (``laws``) depends on what the points can tell:

- **linear**: least squares with coefficients that are not negative, on at least 7 steady points of at least 4 mixes,
  one of them dominated by output; with less, coefficients cannot be told apart (GPU servers measured with too few mixes
  gave negative rates).
- **bounded**: fewer steady points, so that every point is used, the coefficients are held within the roofline of GPU
  and model, and drawn towards its proportions. Its provenance is ``estimated``.
- **surface**: either of them, where it misses a point by more than 10 %: the linear model, times measured factors
  interpolated over (KV use, context).

How well the fit predicts what it has not seen is its leave-one-mix-out error (``leftout``).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from statistics import median

import msgspec

from serving.capacity import StepTimeModel
from serving.equations import UNKNOWN_BATCH, equation, is_open_loop
from serving.laws import Law, bounded_fitter, linear_law_with_surface
from serving.leftout import LeftOut, left_out_errors
from serving.points import MeasuredPoint
from serving.profile import ContextRange, Fit, ModelForm, ProvenanceKind
from serving.roofline import BatchBounds, Roofline, typical_roofline
from serving.solve import FitError
from serving.steady_points import steady_points
from serving.surface import Surface

__all__ = ["FitError", "FitResult", "fit_profile", "residual"]

LEAST_MIXES = 4
#: A mix is dominated by output where it emits at least this many tokens for each it reads.
DECODE_HEAVY_RATIO = 2.0
#: With fewer steady points than this, least squares alone is not trusted.
LEAST_STEADY = 7


class FitResult(msgspec.Struct, frozen=True):
    """A step-time model, how well it holds, and how far it is to be trusted.

    ``provenance`` is ``measured`` where the model stands on enough steady points, else ``estimated``. ``steady`` are
    those points. ``reason`` says in one sentence why the form is what it is. ``surface`` is set for that form only.
    ``linear_miss`` is the worst error of the linear fit by itself, whatever the form.
    """

    model: StepTimeModel
    fit: Fit
    form: ModelForm
    provenance: ProvenanceKind
    steady: tuple[MeasuredPoint, ...]
    reason: str
    surface: Surface | None = None
    linear_miss: float = 0.0


def fit_profile(points: Sequence[MeasuredPoint], facts: Roofline | None = None) -> FitResult:
    """The best model that the points and the facts allow.

    Without ``facts`` a fit that needs bounds takes the proportions of a typical model on a typical GPU, and their
    common speed from the points. Raises ``FitError`` for points that make no sense.
    """
    check_points(points)
    steady, unsteady = steady_points(points)
    shortage = _shortage(steady)
    if shortage is None:
        law = linear_law_with_surface([equation(point) for point in steady])
        if law.model.base_s > 0:
            return _determined(steady, law, len(unsteady))
        shortage = "the points give an empty step no duration, lower concurrencies would"
    return _bounded(points, steady, facts or typical_roofline(), shortage)


def residual(
    model: StepTimeModel, point: MeasuredPoint, batch: BatchBounds = UNKNOWN_BATCH, surface: Surface | None = None
) -> float:
    """By how much the model's token rate exceeds the measured one at that point, as a share of it."""
    return Law(model, surface).error(equation(point, batch))


def check_points(points: Sequence[MeasuredPoint]) -> None:
    """Raise ``FitError`` where there is no point, or one that nothing can be reckoned from, naming it."""
    if not points:
        raise FitError("there is no point to fit")
    for point in points:
        where = f"{point.mix} at concurrency {point.concurrency:g}" if point.concurrency else point.mix
        amounts = (point.duration_s, point.input_tokens, point.output_tokens, point.requests)
        if not all(isfinite(amount) for amount in amounts):
            raise FitError(f"a point that is not a number: {where}")
        steps = 1.0 if point.steps is None else point.steps
        if not isfinite(steps) or min(steps, point.duration_s) <= 0:
            raise FitError(f"points without duration or steps: {where}")
        if point.busy_s is not None and not 0 < point.busy_s < inf:
            raise FitError(f"busy_s is {point.busy_s}, it must be a positive number of seconds: {where}")
        if min(point.requests, point.output_tokens) <= 0 or not 0 <= point.cached_tokens <= point.input_tokens:
            raise FitError(f"a point without requests or output, or with more cached tokens than it read: {where}")


def _determined(steady: tuple[MeasuredPoint, ...], law: Law, unsteady: int) -> FitResult:
    form: ModelForm = "linear" if law.surface is None else "surface"
    fit = _fit(steady, law, UNKNOWN_BATCH, form, left_out_errors(steady, UNKNOWN_BATCH, linear_law_with_surface))
    reason = f"{len(steady)} steady points determine the coefficients{_missed(law)}"
    if unsteady:
        reason += f"; {unsteady} unsteady ones are left out"
    return FitResult(law.model, fit, form, "measured", steady, reason, law.surface, law.linear_miss)


def _bounded(
    points: Sequence[MeasuredPoint], steady: tuple[MeasuredPoint, ...], facts: Roofline, shortage: str
) -> FitResult:
    fitter = bounded_fitter(facts)
    law = fitter([equation(point, facts.batch) for point in points])
    form: ModelForm = "bounded" if law.surface is None else "surface"
    # A steady open loop lasts as long as its arrivals do, of which an envelope of rates knows nothing.
    loaded = [point for point in points if not is_open_loop(point)] or points
    left_out = left_out_errors(loaded, facts.batch, fitter)
    fit = _fit(points, law, facts.batch, form, left_out)
    reason = f"{shortage}: bounded by the roofline of {facts.source}{_missed(law)}"
    return FitResult(law.model, fit, form, "estimated", steady, reason, law.surface, law.linear_miss)


def _fit(
    points: Sequence[MeasuredPoint], law: Law, batch: BatchBounds, form: ModelForm, left_out: LeftOut | None
) -> Fit:
    errors = sorted(abs(law.error(equation(point, batch))) for point in points)
    contexts = [point.context_tokens for point in points]
    return Fit(
        points=tuple(points),
        residual_median=round(median(errors), 4),
        residual_max=round(errors[-1], 4),
        model_form=form,
        loo_error_median=None if left_out is None else _rounded(left_out.median),
        loo_error_max=None if left_out is None else _rounded(left_out.most),
        two_rate_error_median=None if left_out is None else _rounded(left_out.two_rate_median),
        context=ContextRange(min(contexts), max(contexts)),
    )


def _rounded(error: float | None) -> float | None:
    return None if error is None else round(error, 4)


def _missed(law: Law) -> str:
    return "" if law.surface is None else f"; the linear model misses a point by {law.linear_miss:.0%}, hence a surface"


def _shortage(steady: Sequence[MeasuredPoint]) -> str | None:
    """Why least squares alone is not enough; None where it is."""
    if len(steady) < LEAST_STEADY:
        return f"{len(steady)} of {LEAST_STEADY} steady points"
    return _mix_shortage(steady)


def _mix_shortage(points: Sequence[MeasuredPoint]) -> str | None:
    mixes = {point.mix for point in points}
    if len(mixes) < LEAST_MIXES:
        return f"{len(mixes)} of at least {LEAST_MIXES} mixes were measured"
    if not any(point.output_tokens >= DECODE_HEAVY_RATIO * point.input_tokens for point in points):
        return "no mix is dominated by output, so decode and prefill cannot be told apart"
    return None
