"""How well a fit predicts mixes it has not seen, beside the plain envelope of two rates. Pure.

Each mix is left out in turn, the rest is fitted anew, and the token rate of the runs left out is predicted. The plain
envelope, in/P_in + out/P_out = 1, is what capacity is commonly reckoned by. It is fitted by least squares of relative
errors, on the same runs, with the same mixes left out, so that the two errors compare.

A prediction uses only what is known of a run beforehand: its lengths, how many requests it has and how many are in
flight. Where the steps of a run were derived from its latencies, its batch is what was in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec

from serving.equations import Equation
from serving.laws import Fitter, rate_error
from serving.solve import nonnegative_coefficients

#: With fewer mixes, what is left does not determine two rates.
LEAST_MIXES = 3


class LeftOut(msgspec.Struct, frozen=True):
    """Sizes of the relative errors of predicted token rates at the runs left out: of the fit, and of the envelope."""

    median: float
    most: float
    two_rate_median: float


def left_out_errors(held: Sequence[Equation], fitter: Fitter) -> LeftOut | None:
    """The errors with each mix left out in turn; None where there are too few mixes."""
    mixes = sorted({each.mix for each in held})
    if len(mixes) < LEAST_MIXES:
        return None
    errors, two_rate_errors = [], []
    for mix in mixes:
        kept = [each for each in held if each.mix != mix]
        left_out = [each for each in held if each.mix == mix]
        law, rates = fitter(kept), nonnegative_coefficients([_tokens(each) for each in kept])
        errors += [abs(law.error(each)) for each in left_out]
        two_rate_errors += [abs(_two_rate_error(rates, each)) for each in left_out]
    return LeftOut(median(errors), max(errors), median(two_rate_errors))


def _two_rate_error(rates: Sequence[float], held: Equation) -> float:
    return rate_error(sum(rate * tokens for rate, tokens in zip(rates, _tokens(held), strict=True)))


def _tokens(held: Equation) -> tuple[float, float]:
    return held.prompt_tokens, held.output_tokens
