"""What vendors state of their GPUs and of the models: the facts that estimated profiles start from."""

from __future__ import annotations

from typing import Literal

import msgspec

WeightDtype = Literal["bf16", "fp8", "fp4"]

#: Bytes per weight. FP4 as NVFP4: half a byte, and one FP8 scale for every 16 weights.
WEIGHT_BYTES: dict[WeightDtype, float] = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5 + 1 / 16}

#: Keys and values are kept in FP8 beside quantized weights (vLLM: ``--kv-cache-dtype fp8``), as the anchors' are.
KV_BYTES = 1


class GpuFacts(msgspec.Struct, frozen=True):
    """One GPU: memory in bytes, memory bandwidth in bytes/s, and dense tensor-core arithmetic in FLOP/s."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: dict[WeightDtype, float]
    max_num_batched_tokens: int
    source: str


class ModelFacts(msgspec.Struct, frozen=True):
    """One decoder-only transformer with grouped-query attention."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    source: str

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * KV_BYTES


# max_num_batched_tokens is what vLLM 0.32 chooses by itself for its API server on such a GPU (engine/arg_utils.py).
# Data sheets give arithmetic with 2:4 sparsity; dense is half of it.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuFacts(
            name="H100",
            memory_bytes=80e9,
            memory_bytes_per_s=3.35e12,
            flops={"bf16": 0.9895e15, "fp8": 1.979e15},
            max_num_batched_tokens=8192,
            source="NVIDIA H100 Tensor Core GPU data sheet, SXM column",
        ),
        GpuFacts(
            name="H200",
            memory_bytes=141e9,
            memory_bytes_per_s=4.8e12,
            flops={"bf16": 0.9895e15, "fp8": 1.979e15},
            max_num_batched_tokens=8192,
            source="NVIDIA H200 Tensor Core GPU data sheet, SXM column",
        ),
        GpuFacts(
            name="B200",
            memory_bytes=180e9,
            memory_bytes_per_s=8e12,
            flops={"bf16": 2.25e15, "fp8": 4.5e15, "fp4": 9e15},
            max_num_batched_tokens=16384,
            source="NVIDIA DGX B200 data sheet, an eighth of the system",
        ),
        GpuFacts(
            name="GB200",
            memory_bytes=186e9,
            memory_bytes_per_s=8e12,
            flops={"bf16": 2.5e15, "fp8": 5e15, "fp4": 10e15},
            max_num_batched_tokens=16384,
            source="NVIDIA GB200 NVL72 data sheet, half of a Grace Blackwell superchip",
        ),
    )
}

MODELS = {
    model.name: model
    for model in (
        ModelFacts(
            name="llama-3.1-8b",
            parameters=8.03e9,
            layers=32,
            kv_heads=8,
            head_dim=128,
            max_model_len=131072,
            source="meta-llama/Llama-3.1-8B-Instruct, config.json",
        ),
        ModelFacts(
            name="llama-3.1-70b",
            parameters=70.6e9,
            layers=80,
            kv_heads=8,
            head_dim=128,
            max_model_len=131072,
            source="meta-llama/Llama-3.1-70B-Instruct, config.json",
        ),
    )
}
