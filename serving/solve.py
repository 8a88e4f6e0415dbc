"""Least squares for step times: non-negative, and bounded with a pull towards known proportions. Pure; needs SciPy.

Every equation says that the modelled seconds for one measured second are 1, so all errors are relative ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from serving.roofline import Span

#: How strongly each coefficient is drawn to the proportions of the roofline, beside one equation of weight 1 for each
#: mix; leave-one-mix-out errors are flat between 0.2 and 0.5.
PROPORTION_PULL = 0.3
#: How strongly the whole is drawn to the roofline's likely speed: hardly, since one point tells it better.
SPEED_PULL = 0.05


class FitError(ValueError):
    """These points do not determine a step-time model; the message says what is missing."""


class MissingSolverError(FitError):
    """SciPy is not installed; the message says which extra brings it."""


def check_solver() -> None:
    """Raise ``MissingSolverError`` where SciPy is missing: sooner than a fit would, which may come after hours."""
    nonnegative_coefficients([[1.0]])


def nonnegative_coefficients(rows: Sequence[Sequence[float]]) -> list[float]:
    """Coefficients ≥ 0 that bring each row's sum of products nearest to 1."""
    try:
        from scipy.optimize import nnls  # noqa: PLC0415 - only the extra "measure" installs SciPy
    except ImportError as error:
        raise MissingSolverError("fitting needs SciPy: pip install 'penstock[measure]'") from error
    matrix = np.array(rows, dtype=float)
    scale = np.where(matrix.max(axis=0) > 0, matrix.max(axis=0), 1.0)
    solution, _ = nnls(matrix / scale, np.ones(len(rows)))
    return [float(value) for value in solution / scale]


def bounded_coefficients(
    rows: Sequence[Sequence[float]], weights: Sequence[float], spans: Sequence[Span], *, speed_known: bool
) -> list[float]:
    """Coefficients within their spans, near the likely proportions, that bring each row's sum nearest to 1.

    With z = coefficient ÷ likely value and a common slowness η, it minimises

        Σ weight²·(row·c − 1)² + PROPORTION_PULL²·Σ(z − η)² + SPEED_PULL²·(η − 1)²

    so that a coefficient of which the rows say nothing follows the others. ``speed_known`` is false where the spans
    give proportions only: then η is free.
    """
    try:
        from scipy.optimize import lsq_linear  # noqa: PLC0415 - only the extra "measure" installs SciPy
    except ImportError as error:
        raise MissingSolverError("fitting needs SciPy: pip install 'penstock[measure]'") from error
    likely = np.array([span.likely for span in spans])
    weight = np.array(weights)
    measured = np.array(rows, dtype=float) * likely
    # Of an unknown speed, the mean row gives the unit, so that the pull means the same at every speed.
    unit = 1.0 if speed_known else float(np.average(1 / measured.sum(axis=1), weights=weight**2))
    count = len(spans)
    pull = np.hstack([PROPORTION_PULL * np.eye(count), np.full((count, 1), -PROPORTION_PULL)])
    speed = np.append(np.zeros(count), SPEED_PULL)
    matrix = np.vstack([np.column_stack([measured * unit * weight[:, None], np.zeros(len(weight))]), pull, speed])
    target = np.concatenate([weight, np.zeros(count), [SPEED_PULL]])
    least = np.array([span.least for span in spans]) / likely / unit
    most = np.array([span.most for span in spans]) / likely / unit
    found = lsq_linear(matrix, target, bounds=(np.append(least, least.min()), np.append(most, most.max())))
    return [float(value) for value in found.x[:count] * likely * unit]


def mix_weights(mixes: Sequence[str]) -> list[float]:
    """The weight of each equation, such that every mix counts as one, however often it was run."""
    return [1 / sqrt(mixes.count(mix)) for mix in mixes]
