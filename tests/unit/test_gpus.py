from __future__ import annotations

import pytest

from serving.gpus import GPUS, KV_ELEMENT_BYTES, MODELS, WEIGHT_BYTES, GpuFacts, ModelFacts, find_gpu, find_model

every_gpu = pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)


def test_the_missions_gpus_and_a100_are_there() -> None:
    """Every GPU type that a profile is shipped for has facts."""
    assert set(GPUS) == {"A100", "H100", "H200", "B200", "GB200"}


@every_gpu
def test_every_gpu_says_where_its_facts_are_from(gpu: GpuFacts) -> None:
    """A fact without a source is a guess; and each is of the size that such a fact has."""
    assert "NVIDIA" in gpu.source
    assert gpu.failure_domain_gpus in (8, 72)
    assert 300 <= gpu.power_w <= 1500
    assert 40e9 <= gpu.memory_bytes <= 300e9
    assert 1e12 <= gpu.memory_bytes_per_s <= 10e12
    assert 1e14 <= gpu.flops["bf16"] <= 5e15


@every_gpu
def test_smaller_weights_are_never_multiplied_slower(gpu: GpuFacts) -> None:
    """Without tensor cores for a type, its weights are multiplied as BF16."""
    rates = [gpu.flops_at(dtype) for dtype in ("bf16", "fp8", "fp4")]

    assert rates[0] == gpu.flops["bf16"]
    assert min(rates) == rates[0]
    assert GPUS["A100"].flops_at("fp8") == GPUS["A100"].flops["bf16"]


def test_the_rack_is_one_failure_domain() -> None:
    """Boards of eight share a host; the 72 GPUs of an NVL72 share their switches."""
    assert GPUS["GB200"].failure_domain_gpus == 72
    assert {GPUS[name].failure_domain_gpus for name in ("A100", "H100", "H200", "B200")} == {8}


@every_model
def test_every_model_says_where_its_facts_are_from(model: ModelFacts) -> None:
    """A config that anybody can look up, and numbers that fit together."""
    assert "/" in model.source.split(",")[0]
    assert 0 < model.active_parameters <= model.parameters
    assert 0 < model.attention_layers <= model.layers
    assert model.weight_dtype in WEIGHT_BYTES


@pytest.mark.parametrize(
    ("name", "kilobytes_in_bf16"),
    [
        ("llama-3.1-8b", 128.0),  # 2 × 32 layers × 8 heads × 128 × 2 bytes
        ("llama-3.1-70b", 320.0),
        ("qwen3-32b", 256.0),
        ("deepseek-r1", 68.625),  # 61 layers × (512 + 64) × 2 bytes: one latent for keys and values together
        ("gpt-oss-20b", 24.0),  # 12 of its 24 layers keep the whole context
    ],
)
def test_keys_and_values_of_a_token_by_hand(name: str, kilobytes_in_bf16: float) -> None:
    """What one token leaves in the cache is what its config gives by arithmetic."""
    assert MODELS[name].kv_elements_per_token * KV_ELEMENT_BYTES["bf16"] == kilobytes_in_bf16 * 1024


def test_a_published_checkpoint_weighs_what_its_publisher_says() -> None:
    """gpt-oss keeps some layers in BF16, so its weights are more than its parameters × MXFP4."""
    model = MODELS["gpt-oss-120b"]

    assert model.weight_bytes("mxfp4") == model.checkpoint_bytes
    assert model.weight_bytes("mxfp4") > model.parameters * WEIGHT_BYTES["mxfp4"]
    assert model.weight_bytes("bf16") == 2 * model.parameters


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100", "H100"),
        ("h200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200-SXM-180GB", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("CPU", None),
        ("H100 and H200", None),
        ("", None),
    ],
)
def test_a_gpu_is_found_by_what_its_driver_calls_it(name: str, found: str | None) -> None:
    """Another card of the same name has other facts, and gets none."""
    facts = find_gpu(name)

    assert (facts.name if facts else None) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "qwen3-235b-a22b"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("Qwen/Qwen3-32B-AWQ", "qwen3-32b"),
        ("tiny-llama", None),
        ("deepseek-v3.2", None),
    ],
)
def test_a_model_is_found_by_its_repositorys_name(name: str, found: str | None) -> None:
    """Precision and date in the name do not change the architecture."""
    facts = find_model(name)

    assert (facts.name if facts else None) == found
