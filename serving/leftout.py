"""How well a fit predicts mixes it has not seen, beside the plain envelope of two rates. Pure.

Each mix is left out in turn, the rest is fitted anew, and the token rate of the runs left out is predicted. The plain
envelope, in/P_in + out/P_out = 1, is what capacity is commonly reckoned by. It is fitted by least squares of relative
errors, on the same runs, with the same mixes left out, so that the two errors compare.

A prediction uses only what is known of a run beforehand (``unseen``). Of an open loop below saturation that leaves no
token rate to predict: its error is one of the step time, and with such runs there is no envelope to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec

from serving.equations import Equation, equation, is_open_loop
from serving.laws import Fitter, rate_error
from serving.points import MeasuredPoint
from serving.roofline import BatchBounds
from serving.solve import nonnegative_coefficients
from serving.unseen import unseen_error

#: With fewer mixes, what is left does not determine two rates.
LEAST_MIXES = 3


class LeftOut(msgspec.Struct, frozen=True):
    """Sizes of the relative errors at the runs left out: of the fit, and of the envelope's token rates.

    ``two_rate_median`` is None where a run was an open loop, whose token rate is that of its arrivals.
    """

    median: float
    most: float
    two_rate_median: float | None


def left_out_errors(points: Sequence[MeasuredPoint], batch: BatchBounds, fitter: Fitter) -> LeftOut | None:
    """The errors with each mix left out in turn; None where there are too few mixes."""
    mixes = sorted({point.mix for point in points})
    if len(mixes) < LEAST_MIXES:
        return None
    errors, two_rate_errors = [], []
    for mix in mixes:
        kept = [equation(point, batch) for point in points if point.mix != mix]
        left_out = [point for point in points if point.mix == mix]
        law, rates = fitter(kept), nonnegative_coefficients([_tokens(each) for each in kept])
        errors += [abs(unseen_error(law, point, batch)) for point in left_out]
        two_rate_errors += [abs(_two_rate_error(rates, equation(point, batch))) for point in left_out]
    comparable = not any(map(is_open_loop, points))
    return LeftOut(median(errors), max(errors), median(two_rate_errors) if comparable else None)


def _two_rate_error(rates: Sequence[float], held: Equation) -> float:
    return rate_error(sum(rate * tokens for rate, tokens in zip(rates, _tokens(held), strict=True)))


def _tokens(held: Equation) -> tuple[float, float]:
    return held.prompt_tokens, held.output_tokens
