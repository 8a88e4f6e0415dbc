"""Named workload mixes: what the requests of a pool look like, as samples of (input, output) token counts.

``chat`` is real traffic: the Azure LLM inference trace of 2023, conversation service (attribution in
``mixes/README.md``). The other three are grids around a typical shape. They stretch the step-time model in three more
directions, so that a fit over all four can tell its coefficients apart.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from itertools import pairwise

from serving.capacity import RequestShape, WorkloadMix

TRACE_FILE = "azure_llm_2023_conversation.csv"
CHAT_SAMPLE_SIZE = 1000
_INPUT_STRATA = 40

#: Mean input and output tokens of the synthetic mixes; each length spreads evenly over ±50 % of its mean.
SYNTHETIC_MEANS = {
    "decode-heavy": (128, 1024),
    "prefill-heavy": (4096, 64),
    "long-context": (16384, 256),
}
MIX_NAMES = ("chat", *SYNTHETIC_MEANS)
_GRID_POINTS = 10


class UnknownMixError(ValueError):
    """No mix has this name; the message lists those there are."""


def load_mix(name: str, scale: float = 1.0, cached_share: float = 0.0) -> WorkloadMix:
    """The mix of that name with every length multiplied by ``scale``, rounded, and at least 1.

    ``cached_share`` of every prompt, rounded down, is found in the prefix cache. Raises ``UnknownMixError``, and
    ``ValueError`` for a scale that is not positive or a share outside [0, 1).
    """
    if name not in MIX_NAMES:
        raise UnknownMixError(f"no workload mix {name!r}; there are {', '.join(MIX_NAMES)}")
    lengths = _chat_lengths() if name == "chat" else _grid_lengths(*SYNTHETIC_MEANS[name])
    return _cached(WorkloadMix(name, _shapes(lengths, scale)), cached_share)


def trace_shapes(scale: float = 1.0) -> tuple[RequestShape, ...]:
    """Every request of the conversation trace, in order of arrival, lengths scaled as in ``load_mix``."""
    return _shapes(_trace_lengths(), scale)


def _cached(mix: WorkloadMix, share: float) -> WorkloadMix:
    if not 0 <= share < 1:
        raise ValueError(f"the cached share of a mix is {share}, it must be at least 0 and below 1")
    shapes = (RequestShape(s.input_tokens, s.output_tokens, int(s.input_tokens * share)) for s in mix.shapes)
    return WorkloadMix(mix.name, tuple(shapes)) if share else mix


def _shapes(lengths: tuple[tuple[int, int], ...], scale: float) -> tuple[RequestShape, ...]:
    if not 0 < scale < float("inf"):
        raise ValueError(f"the scale of a mix is {scale}, it must be a positive number")
    return tuple(RequestShape(max(1, round(i * scale)), max(1, round(o * scale))) for i, o in lengths)


@cache
def _trace_lengths() -> tuple[tuple[int, int], ...]:
    text = (files("serving") / "mixes" / TRACE_FILE).read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple((int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows)


@cache
def _chat_lengths() -> tuple[tuple[int, int], ...]:
    """A systematic sample of the trace: ordered by input stratum, then by output, taken at equal distances.

    Unlike random draws it reproduces the marginal quantiles and the joint distribution without a seed.
    """
    by_input = sorted(_trace_lengths())
    count = len(by_input)
    bounds = [round(k * count / _INPUT_STRATA) for k in range(_INPUT_STRATA + 1)]
    strata = [sorted(by_input[a:b], key=lambda pair: pair[1]) for a, b in pairwise(bounds)]
    ordered = [pair for stratum in strata for pair in stratum]
    distance = count / CHAT_SAMPLE_SIZE
    return tuple(ordered[int((k + 0.5) * distance)] for k in range(CHAT_SAMPLE_SIZE))


@cache
def _grid_lengths(mean_input: int, mean_output: int) -> tuple[tuple[int, int], ...]:
    factors = [0.5 + (k + 0.5) / _GRID_POINTS for k in range(_GRID_POINTS)]
    return tuple((round(mean_input * a), round(mean_output * b)) for a in factors for b in factors)
