from __future__ import annotations

import pytest

from serving.gpus import GPUS, MODELS
from serving.roofline import roofline_of, typical_roofline


@pytest.mark.parametrize("gpu", sorted(GPUS))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_span_is_ordered_and_positive(gpu: str, model: str) -> None:
    """Whatever the GPU and the model, least ≤ likely ≤ most, and only attention over prompts may be nothing."""
    roofline = roofline_of(GPUS[gpu], 8, MODELS[model], MODELS[model].weight_dtype)

    for span in roofline.spans:
        assert 0 < span.least <= span.likely <= span.most
    assert roofline.batch.kv_tokens >= 1


def test_the_floors_are_the_data_sheets() -> None:
    """An H100 cannot stream 8.03 G weights of 2 bytes at more than 3.35 TB/s, nor multiply beyond 989.5 TFLOP/s."""
    roofline = roofline_of(GPUS["H100"], 1, MODELS["llama-3.1-8b"], "bf16")

    assert roofline.base_s.least == pytest.approx(2 * 8.03e9 / 3.35e12)
    assert roofline.prompt_token_s.least == pytest.approx(2 * 8.03e9 / 0.9895e15)


def test_twice_the_gpus_halve_the_floors() -> None:
    """Tensor parallelism divides what each GPU streams, multiplies and reads."""
    one, two = (roofline_of(GPUS["H100"], n, MODELS["llama-3.1-8b"], "bf16") for n in (1, 2))

    for at_one, at_two in zip(one.spans, two.spans, strict=True):
        if at_one.least > 0.05 * at_one.likely:
            assert at_two.least == pytest.approx(at_one.least / 2)


def test_a_mixture_of_experts_may_stream_its_active_weights_only() -> None:
    """A small batch meets few experts: the floor of a step is that of the active weights."""
    model = MODELS["qwen3-235b-a22b"]
    roofline = roofline_of(GPUS["H200"], 8, model, "bf16")

    assert roofline.base_s.least < roofline.base_s.likely * 2 * model.active_parameters / model.parameters


def test_a_batch_is_bounded_by_slots_by_kv_and_by_what_is_sent() -> None:
    """Whichever is scarcest bounds the sequences of a batch; one always runs."""
    batch = roofline_of(GPUS["H100"], 1, MODELS["llama-3.1-8b"], "bf16").batch

    assert batch.resident(context_tokens=100, in_flight=5000) == batch.max_num_seqs
    assert batch.resident(context_tokens=100, in_flight=7) == 7
    assert batch.resident(context_tokens=100_000, in_flight=500) == pytest.approx(batch.kv_tokens / 100_000)
    assert batch.resident(context_tokens=1e9, in_flight=500) == 1


def test_an_unknown_model_gives_proportions_without_a_speed() -> None:
    """Bounds so wide that only the proportions are left, and marked as such."""
    roofline = typical_roofline()

    assert not roofline.scaled
    assert all(span.most / span.least >= 1e8 for span in roofline.spans)


def test_fp8_keys_and_values_halve_what_a_step_reads_and_double_the_cache() -> None:
    """A server that was told to keep them so reads half of the bytes, and has room for twice the tokens."""
    wide, narrow = (roofline_of(GPUS["H100"], 1, MODELS["qwen3-8b"], "bf16", kv) for kv in ("bf16", "fp8"))

    assert narrow.kv_token_s.likely == pytest.approx(wide.kv_token_s.likely / 2)
    assert narrow.batch.kv_tokens == pytest.approx(wide.batch.kv_tokens * 2)
    assert narrow.base_s == wide.base_s


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_the_slots_of_a_batch_are_the_gpus(gpu: str) -> None:
    """What vLLM chooses on a GPU stands once, in that GPU's facts."""
    assert roofline_of(GPUS[gpu], 1, MODELS["qwen3-8b"], "bf16").batch.max_num_seqs == GPUS[gpu].max_num_seqs
