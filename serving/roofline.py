"""The roofline of a step: between which bounds each coefficient of the step-time model must lie. Pure.

Data sheets give a floor to every coefficient: no engine reads weights or KV faster than the memory's bandwidth, nor
multiplies faster than the tensor cores. Engines reach a share of those peaks; how small a share is believable gives the
ceiling. With too few steady points for least squares alone, the fit is held between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from serving.capacity import StepTimeModel
from serving.gpus import GpuFacts, WeightDtype

#: How many times slower than the data sheet's peak an engine runs: likely, and at the most believable.
LIKELY_SLOWNESS = 2.0
MOST_SLOWNESS = 20.0
#: Scheduling, launching and sampling, of a step and of each sequence in it.
LIKELY_STEP_S = 3e-3
MOST_STEP_S = 30e-3
LIKELY_SEQUENCE_S = 20e-6
MOST_SEQUENCE_S = 500e-6


class Span(NamedTuple):
    """Least, most likely and greatest value of one coefficient, in seconds."""

    least: float
    likely: float
    most: float


class Roofline(msgspec.Struct, frozen=True):
    """The span of each coefficient, and what it was computed from."""

    base_s: Span
    prompt_token_s: Span
    sequence_s: Span
    kv_token_s: Span
    source: str

    @property
    def spans(self) -> tuple[Span, Span, Span, Span]:
        """In the order of ``StepTimeModel``."""
        return self.base_s, self.prompt_token_s, self.sequence_s, self.kv_token_s

    @property
    def likely(self) -> StepTimeModel:
        """The model with every coefficient at its most likely value."""
        return StepTimeModel(*(span.likely for span in self.spans))


class ModelWork(NamedTuple):
    """What a step does to a model: its parameters, those used for one token, bytes of each, KV bytes of one token.

    A dense model uses every parameter for each token. A mixture of experts multiplies with the active ones only, but a
    large batch reads them all.
    """

    parameters: float
    active_parameters: float
    bytes_per_parameter: float
    kv_bytes_per_token: float
    source: str


def roofline_of(gpu: GpuFacts, gpus: int, dtype: WeightDtype, model: ModelWork) -> Roofline:
    """The bounds of that model on so many of these GPUs. Raises ``ValueError`` where the GPU lacks that arithmetic."""
    if dtype not in gpu.flops:
        raise ValueError(f"{gpu.name} has no {dtype} arithmetic; it has {', '.join(gpu.flops)}")
    bytes_per_s, flops = gpu.memory_bytes_per_s * gpus, gpu.flops[dtype] * gpus
    weights_s = model.parameters * model.bytes_per_parameter / bytes_per_s
    active_s = model.active_parameters * model.bytes_per_parameter / bytes_per_s
    token_s = 2 * model.active_parameters / flops
    kv_s = model.kv_bytes_per_token / bytes_per_s
    return Roofline(
        base_s=Span(active_s, LIKELY_SLOWNESS * weights_s + LIKELY_STEP_S, MOST_SLOWNESS * weights_s + MOST_STEP_S),
        prompt_token_s=Span(token_s, LIKELY_SLOWNESS * token_s, MOST_SLOWNESS * token_s),
        sequence_s=Span(
            token_s, LIKELY_SLOWNESS * token_s + LIKELY_SEQUENCE_S, MOST_SLOWNESS * token_s + MOST_SEQUENCE_S
        ),
        kv_token_s=Span(kv_s, LIKELY_SLOWNESS * kv_s, MOST_SLOWNESS * kv_s),
        source=f"{gpus} × {gpu.name} ({gpu.source}), {dtype}; {model.source}",
    )
