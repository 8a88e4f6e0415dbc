"""Whether a set of runs can tell the step-time model's coefficients apart, before and after they are run. Pure.

A run of D seconds says D = c0·steps + c_p·(prompt tokens) + c_s·(output tokens) + c_k·Σ O·(I + O/2). Many runs form a
matrix of four columns. A coefficient is identifiable as far as its column differs from every combination of the other
three: its *distinctness* is the sine of the angle between them, 1 where nothing else looks like it, 0 where it can be
traded for the others without any run noticing. The noise of the runs is blown up by 1/distinctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import NamedTuple

import numpy as np

from serving.capacity import EngineLimits, WorkloadMix
from serving.equations import equation
from serving.points import MeasuredPoint

COEFFICIENTS = ("base_s", "prompt_token_s", "sequence_s", "kv_token_s")
#: Below this, runs that are off by 1 % leave a coefficient uncertain by half of itself.
LEAST_DISTINCTNESS = 0.02

_ADVICE = {
    "base_s": "measure a lower load too (a lone request at a time)",
    "prompt_token_s": "measure mixes whose proportion of prompt to output differs more (prefill-heavy, decode-heavy)",
    "sequence_s": "measure a higher load too, on a decode-heavy mix",
    "kv_token_s": "measure longer contexts (raise the engine's --max-model-len, or measure long-context)",
}

Row = tuple[float, float, float, float]


class Identifiability(NamedTuple):
    """The condition number of the scaled matrix, and the distinctness of each coefficient in order."""

    condition: float
    distinctness: tuple[float, ...]

    @property
    def weak(self) -> tuple[str, ...]:
        """The coefficients that these runs cannot tell from the others."""
        return tuple(
            name for name, share in zip(COEFFICIENTS, self.distinctness, strict=True) if share < LEAST_DISTINCTNESS
        )

    @property
    def problem(self) -> str:
        """What is not identifiable, and what to measure besides; empty where everything is."""
        return "; ".join(f"{name} cannot be told from the other coefficients: {_ADVICE[name]}" for name in self.weak)


def identifiability(rows: Sequence[Row]) -> Identifiability:
    """How well these equations tell the four coefficients apart; each row is scaled so that every run counts alike."""
    matrix = np.asarray(rows, dtype=float).reshape(-1, len(COEFFICIENTS))
    if matrix.shape[0] < len(COEFFICIENTS) or not np.isfinite(matrix).all():
        return Identifiability(float("inf"), (0.0,) * len(COEFFICIENTS))
    largest = matrix.max(axis=0)
    scaled = matrix / np.where(largest > 0, largest, 1)
    lengths = scaled.sum(axis=1, keepdims=True)
    scaled = scaled / np.where(lengths > 0, lengths, 1)
    norms = np.linalg.norm(scaled, axis=0)
    scaled = scaled / np.where(norms > 0, norms, 1)
    return Identifiability(float(np.linalg.cond(scaled)), tuple(_distinctness(scaled, k) for k in range(len(norms))))


def measured_rows(points: Sequence[MeasuredPoint]) -> list[Row]:
    """What one busy second of each run held, as the fit sees it."""
    return [equation(point).linear for point in points]


def planned_rows(mixes: Sequence[WorkloadMix], limits: EngineLimits) -> list[Row]:
    """What the runs of these mixes will hold for each request: alone, and in the batches that a search passes."""
    return [_request_row(mix, batch) for mix in mixes for batch in _batches(mix, limits)]


def _batches(mix: WorkloadMix, limits: EngineLimits) -> tuple[float, ...]:
    """A lone request, and a half-full replica: what a search around the knee will see at least."""
    held = fsum(s.input_tokens + s.output_tokens / 2 for s in mix.shapes) / len(mix.shapes)
    full = max(2.0, min(limits.max_num_seqs, limits.kv_tokens / held) / 2)
    return (1.0, full)


def _request_row(mix: WorkloadMix, batch: float) -> Row:
    count = len(mix.shapes)
    outputs = mix.mean_output_tokens
    reads = fsum(s.output_tokens * (s.input_tokens + s.output_tokens / 2) for s in mix.shapes) / count
    return (outputs / batch, mix.mean_input_tokens, outputs, reads)


def _distinctness(columns: np.ndarray, index: int) -> float:
    others = np.delete(columns, index, axis=1)
    combination, *_ = np.linalg.lstsq(others, columns[:, index], rcond=None)
    return float(np.linalg.norm(columns[:, index] - others @ combination))
