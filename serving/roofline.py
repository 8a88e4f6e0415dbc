"""The roofline of a step: between which bounds each coefficient of the step-time model must lie. Pure.

Data sheets give a floor to every coefficient: no engine reads weights or KV faster than the memory's bandwidth, nor
multiplies faster than the tensor cores. Engines reach a share of those peaks. With too few steady points for least
squares alone, the fit is held within the bounds and drawn towards the likely proportions between the coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from serving.gpus import GPUS, MODELS, GpuFacts, KvDtype, ModelFacts, WeightDtype

#: What stands in for a GPU or a model without facts.
TYPICAL_GPU = "H100"
TYPICAL_MODEL = "llama-3.1-8b"
#: How many times slower than the data sheets' peaks an engine runs: streaming weights, multiplying, reading KV.
LIKELY_STREAM_SLOWNESS = 1.3
LIKELY_MULTIPLY_SLOWNESS = 2.0
LIKELY_READ_SLOWNESS = 1.5
#: Bounds of each coefficient as shares of its likely value. The lower one never undercuts the data sheet.
LEAST_SHARE = 0.05
MOST_SHARE = 30.0
#: Launching and scheduling a step, and what a sequence costs the engine and its API server in each step (detokenizing
#: and sending a chunk: some 100 µs of CPU, shared out by overlap): likely values, from which the points may lead away.
LIKELY_STEP_S = 2e-3
LIKELY_SEQUENCE_S = 100e-6
#: One all-reduce over NVLink; two for each layer of a split model.
ALL_REDUCE_S = 10e-6
#: Query heads for each KV head: attention over a prompt multiplies for each of them.
QUERY_GROUP = 8
#: Share of a GPU's memory that vLLM takes by default, and what activations and CUDA graphs take of that.
MEMORY_UTILIZATION = 0.9
ACTIVATION_BYTES = 4e9


class Span(NamedTuple):
    """Least, most likely and greatest value of one coefficient, in seconds."""

    least: float
    likely: float
    most: float


class BatchBounds(msgspec.Struct, frozen=True):
    """What bounds a batch of the engine that was measured: scheduler slots, tokens of a step, KV-cache tokens."""

    max_num_seqs: float
    max_num_batched_tokens: float
    kv_tokens: float

    def resident(self, context_tokens: float, in_flight: float) -> float:
        """Sequences in a full batch of that mean context, with so many requests in flight."""
        return max(1.0, min(in_flight, self.max_num_seqs, self.kv_tokens / context_tokens))


class Roofline(msgspec.Struct, frozen=True):
    """The span of each coefficient, and ``source``, of what it is: the facts and their sources are in ``gpus``.

    ``prompt_context_s`` is what attention adds to a prompt token for each token of the context before it. ``scaled`` is
    false where the facts give proportions only, and how fast the whole is must come from the points.
    """

    base_s: Span
    prompt_token_s: Span
    sequence_s: Span
    kv_token_s: Span
    prompt_context_s: Span
    batch: BatchBounds
    source: str
    scaled: bool = True

    @property
    def spans(self) -> tuple[Span, ...]:
        """In the order of ``StepTimeModel``, then the attention over prompts."""
        return self.base_s, self.prompt_token_s, self.sequence_s, self.kv_token_s, self.prompt_context_s


def roofline_of(
    gpu: GpuFacts, gpus: int, model: ModelFacts, dtype: WeightDtype, kv_dtype: KvDtype = "bf16"
) -> Roofline:
    """The bounds of that model on so many of these GPUs, with weights and KV of those types; vLLM keeps KV in BF16.

    A mixture of experts multiplies with its active weights only; a large batch streams all of them, a small one the
    active ones, which is the floor.
    """
    bytes_per_s, flops = gpu.memory_bytes_per_s * gpus, gpu.flops_at(dtype) * gpus
    weights_s = model.weight_bytes(dtype) / bytes_per_s
    token_s = 2 * model.active_parameters / flops
    kv_s = model.kv_bytes_per_token(kv_dtype) / bytes_per_s
    # FP8 keys and values would halve what is read: the floor allows for a server that was told to keep them so.
    fp8_kv_s = model.kv_bytes_per_token("fp8") / bytes_per_s
    # A multiply-add for each element of the keys and values, and for each query head that shares it.
    attention_flops = 2 * QUERY_GROUP * model.kv_elements_per_token
    return Roofline(
        base_s=_span(
            weights_s * model.active_parameters / model.parameters,
            LIKELY_STREAM_SLOWNESS * weights_s + LIKELY_STEP_S + all_reduces_s(model, gpus),
        ),
        prompt_token_s=_span(token_s, LIKELY_MULTIPLY_SLOWNESS * token_s),
        sequence_s=_span(token_s, LIKELY_MULTIPLY_SLOWNESS * token_s + LIKELY_SEQUENCE_S),
        kv_token_s=_span(fp8_kv_s, LIKELY_READ_SLOWNESS * kv_s),
        prompt_context_s=_span(0.0, LIKELY_MULTIPLY_SLOWNESS * attention_flops / flops),
        batch=BatchBounds(
            gpu.max_num_seqs,
            gpu.max_num_batched_tokens,
            max(1.0, kv_cache_bytes(gpu, gpus, model, dtype) / model.kv_bytes_per_token(kv_dtype)),
        ),
        source=f"{model.name} in {dtype} on {gpus} × {gpu.name}",
    )


def typical_roofline(gpu: GpuFacts | None = None, gpus: int = 1) -> Roofline:
    """Where facts of model or GPU are unknown: the proportions of typical ones, whose speed the points must tell."""
    gpu = gpu or GPUS[TYPICAL_GPU]
    known = roofline_of(gpu, gpus, MODELS[TYPICAL_MODEL], "bf16")
    return msgspec.structs.replace(
        known,
        base_s=_loose(known.base_s),
        prompt_token_s=_loose(known.prompt_token_s),
        sequence_s=_loose(known.sequence_s),
        kv_token_s=_loose(known.kv_token_s),
        prompt_context_s=_loose(known.prompt_context_s),
        source=f"{TYPICAL_MODEL} on {gpus} × {gpu.name}, in proportion only since facts of GPU or model are unknown",
        scaled=False,
    )


def all_reduces_s(model: ModelFacts, gpus: int) -> float:
    """What a split model waits for in a step; nothing on one GPU."""
    return 2 * model.layers * ALL_REDUCE_S if gpus > 1 else 0.0


def kv_cache_bytes(gpu: GpuFacts, gpus: int, model: ModelFacts, dtype: WeightDtype) -> float:
    """What vLLM leaves of the GPUs' memory for keys and values; negative where the weights do not fit."""
    return (gpu.memory_bytes * MEMORY_UTILIZATION - ACTIVATION_BYTES) * gpus - model.weight_bytes(dtype)


def _span(least_s: float, likely_s: float) -> Span:
    return Span(max(least_s, LEAST_SHARE * likely_s), likely_s, MOST_SHARE * likely_s)


def _loose(span: Span) -> Span:
    return Span(span.likely / 1e4, span.likely, span.likely * 1e4)
