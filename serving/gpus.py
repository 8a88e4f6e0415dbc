"""What vendors state of their GPUs and of the models: the facts that estimates and plausibility checks start from."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

WeightDtype = Literal["bf16", "fp8", "mxfp4", "fp4"]
KvDtype = Literal["bf16", "fp8"]

#: Bytes per weight. MXFP4: half a byte and one byte of scale for 32 weights. FP4 as NVFP4: half a byte, and one FP8
#: scale for every 16 weights.
WEIGHT_BYTES: dict[WeightDtype, float] = {"bf16": 2.0, "fp8": 1.0, "mxfp4": 0.5 + 1 / 32, "fp4": 0.5 + 1 / 16}

#: Bytes of one element of a KV cache. ``bf16`` is what vLLM keeps unless told otherwise.
KV_ELEMENT_BYTES: dict[KvDtype, int] = {"bf16": 2, "fp8": 1}


class GpuFacts(msgspec.Struct, frozen=True):
    """One GPU: memory in bytes, memory bandwidth in bytes/s, and dense tensor-core arithmetic in FLOP/s.

    ``failure_domain_gpus`` are the GPUs that one fault of their common board or rack takes away at once, and
    ``power_w`` is the most that one of them draws, without its share of host, network and cooling.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: dict[WeightDtype, float]
    max_num_batched_tokens: int
    max_num_seqs: int
    failure_domain_gpus: int
    power_w: float
    source: str

    def flops_at(self, dtype: WeightDtype) -> float:
        """Arithmetic on weights of that type: as BF16 where the GPU has no tensor cores for it."""
        return self.flops.get(dtype, self.flops["bf16"])


class ModelFacts(msgspec.Struct, frozen=True):
    """One decoder-only transformer.

    ``active_parameters`` are those that one token meets (fewer than ``parameters`` in a mixture of experts).
    ``attention_layers`` are the layers whose keys and values grow with the whole context: not those with a sliding
    window or a fixed state. Multi-head latent attention keeps ``latent_kv_width`` elements a token and layer in place
    of keys and values for each head; elsewhere it is 0. ``checkpoint_bytes`` is what the weights take in
    ``weight_dtype`` where the publisher says so, since quantized checkpoints keep some layers in BF16.
    """

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    source: str
    active_parameters: float
    attention_layers: int
    weight_dtype: WeightDtype = "bf16"
    latent_kv_width: int = 0
    checkpoint_bytes: float | None = None

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token leaves in the KV cache, over all layers that keep the whole context."""
        return self.attention_layers * (self.latent_kv_width or 2 * self.kv_heads * self.head_dim)

    def kv_bytes_per_token(self, dtype: KvDtype) -> int:
        """Keys and values of one token over all layers, kept in that type."""
        return self.kv_elements_per_token * KV_ELEMENT_BYTES[dtype]

    def weight_bytes(self, dtype: WeightDtype) -> float:
        """All weights in that type."""
        if dtype == self.weight_dtype and self.checkpoint_bytes is not None:
            return self.checkpoint_bytes
        return self.parameters * WEIGHT_BYTES[dtype]


# The max_num_… are what vLLM 0.32 chooses by itself for its API server on such a GPU (engine/arg_utils.py).
# Data sheets give arithmetic with 2:4 sparsity; dense is half of it. A failure domain is the board of eight GPUs that
# share NVSwitches and a host (NVIDIA HGX and DGX), or the rack of 72 that share NVLink switches (GB200 NVL72).
GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuFacts(
            name="A100",
            memory_bytes=80e9,
            memory_bytes_per_s=2.039e12,
            flops={"bf16": 0.312e15},
            max_num_batched_tokens=2048,
            max_num_seqs=256,
            failure_domain_gpus=8,
            power_w=400,
            source="NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM column",
        ),
        GpuFacts(
            name="H100",
            memory_bytes=80e9,
            memory_bytes_per_s=3.35e12,
            flops={"bf16": 0.9895e15, "fp8": 1.979e15},
            max_num_batched_tokens=8192,
            max_num_seqs=1024,
            failure_domain_gpus=8,
            power_w=700,
            source="NVIDIA H100 Tensor Core GPU data sheet, SXM column",
        ),
        GpuFacts(
            name="H200",
            memory_bytes=141e9,
            memory_bytes_per_s=4.8e12,
            flops={"bf16": 0.9895e15, "fp8": 1.979e15},
            max_num_batched_tokens=8192,
            max_num_seqs=1024,
            failure_domain_gpus=8,
            power_w=700,
            source="NVIDIA H200 Tensor Core GPU data sheet, SXM column",
        ),
        GpuFacts(
            name="B200",
            memory_bytes=180e9,
            memory_bytes_per_s=8e12,
            flops={"bf16": 2.25e15, "fp8": 4.5e15, "fp4": 9e15},
            max_num_batched_tokens=16384,
            max_num_seqs=1024,
            failure_domain_gpus=8,
            power_w=1000,
            source="NVIDIA DGX B200 data sheet, an eighth of the system",
        ),
        GpuFacts(
            name="GB200",
            memory_bytes=186e9,
            memory_bytes_per_s=8e12,
            flops={"bf16": 2.5e15, "fp8": 5e15, "fp4": 10e15},
            max_num_batched_tokens=16384,
            max_num_seqs=1024,
            failure_domain_gpus=72,
            power_w=1200,
            source="NVIDIA GB200 NVL72 data sheet, half of a Grace Blackwell superchip",
        ),
    )
}

# DeepSeek-V3.2 is left out: its sparse attention reads a fixed number of tokens, which no KV term here describes.
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
            active_parameters=8.03e9,
            attention_layers=32,
        ),
        ModelFacts(
            name="llama-3.1-70b",
            parameters=70.6e9,
            layers=80,
            kv_heads=8,
            head_dim=128,
            max_model_len=131072,
            source="meta-llama/Llama-3.1-70B-Instruct, config.json",
            active_parameters=70.6e9,
            attention_layers=80,
        ),
        ModelFacts(
            name="qwen3-8b",
            parameters=8.2e9,
            layers=36,
            kv_heads=8,
            head_dim=128,
            max_model_len=40960,
            source="Qwen/Qwen3-8B, model card and config.json",
            active_parameters=8.2e9,
            attention_layers=36,
        ),
        ModelFacts(
            name="qwen3-14b",
            parameters=14.8e9,
            layers=40,
            kv_heads=8,
            head_dim=128,
            max_model_len=40960,
            source="Qwen/Qwen3-14B, model card and config.json",
            active_parameters=14.8e9,
            attention_layers=40,
        ),
        ModelFacts(
            name="qwen3-32b",
            parameters=32.8e9,
            layers=64,
            kv_heads=8,
            head_dim=128,
            max_model_len=40960,
            source="Qwen/Qwen3-32B, model card and config.json",
            active_parameters=32.8e9,
            attention_layers=64,
        ),
        ModelFacts(
            name="qwen3-235b-a22b",
            parameters=235e9,
            layers=94,
            kv_heads=4,
            head_dim=128,
            max_model_len=262144,
            source="Qwen/Qwen3-235B-A22B-Instruct-2507, model card and config.json",
            active_parameters=22e9,
            attention_layers=94,
        ),
        ModelFacts(
            name="gpt-oss-20b",
            parameters=20.9e9,
            layers=24,
            kv_heads=8,
            head_dim=64,
            max_model_len=131072,
            source="openai/gpt-oss-20b, model card and config.json; every other layer has a window of 128",
            active_parameters=3.6e9,
            attention_layers=12,
            weight_dtype="mxfp4",
            checkpoint_bytes=12.8 * 2**30,
        ),
        ModelFacts(
            name="gpt-oss-120b",
            parameters=116.8e9,
            layers=36,
            kv_heads=8,
            head_dim=64,
            max_model_len=131072,
            source="openai/gpt-oss-120b, model card and config.json; every other layer has a window of 128",
            active_parameters=5.1e9,
            attention_layers=18,
            weight_dtype="mxfp4",
            checkpoint_bytes=60.8 * 2**30,
        ),
        ModelFacts(
            name="glm-4.5-air",
            parameters=106e9,
            layers=46,
            kv_heads=8,
            head_dim=128,
            max_model_len=131072,
            source="zai-org/GLM-4.5-Air, model card and config.json",
            active_parameters=12e9,
            attention_layers=46,
        ),
        ModelFacts(
            name="glm-4.6",
            parameters=355e9,
            layers=92,
            kv_heads=8,
            head_dim=128,
            max_model_len=202752,
            source="zai-org/GLM-4.6, model card and config.json",
            active_parameters=32e9,
            attention_layers=92,
        ),
        ModelFacts(
            name="deepseek-r1",
            parameters=671e9,
            layers=61,
            kv_heads=128,
            head_dim=128,
            max_model_len=163840,
            source="deepseek-ai/DeepSeek-R1-0528, model card and config.json: kv_lora_rank 512, qk_rope_head_dim 64",
            active_parameters=37e9,
            attention_layers=61,
            weight_dtype="fp8",
            latent_kv_width=576,
        ),
        ModelFacts(
            name="qwen3.5-35b-a3b",
            parameters=35e9,
            layers=40,
            kv_heads=2,
            head_dim=256,
            max_model_len=262144,
            source="Qwen/Qwen3.5-35B-A3B, model card: three of four layers are Gated DeltaNet, of a fixed state",
            active_parameters=3e9,
            attention_layers=10,
        ),
    )
}


def find_gpu(name: str) -> GpuFacts | None:
    """The facts of a GPU by its short name or by what its driver calls it; None for one without facts here.

    ``NVIDIA H100 80GB HBM3`` is the H100 above. PCIe cards and NVL pairs are other GPUs of the same name.
    """
    words = re.split(r"[^A-Z0-9]+", name.upper())
    if {"PCIE", "NVL", "40GB"} & set(words):
        return None
    found = [GPUS[word] for word in words if word in GPUS]
    return found[0] if len(found) == 1 else None


def find_model(name: str) -> ModelFacts | None:
    """The facts of a model by its name or by its repository's, as in ``Qwen/Qwen3-32B-FP8``; None for any other."""
    short = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    return MODELS.get(re.sub(r"-(instruct|fp8|awq|nvfp4|fp4|bf16|w4a16|\d{4})\b", "", short))
