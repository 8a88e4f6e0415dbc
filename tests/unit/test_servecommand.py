from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.benchgroups import context_of, server_facts, server_roofline
from serving.benchrows import ServedAs
from serving.servecommand import UnknownDtypeError, parse_command


@pytest.mark.parametrize(
    ("command", "checkpoint"),
    [
        ("vllm serve Qwen/Qwen3-32B -tp 2", "Qwen/Qwen3-32B"),
        ("VLLM_USE_V1=1 /usr/bin/vllm serve Qwen/Qwen3-32B", "Qwen/Qwen3-32B"),
        ("vllm serve 'Qwen/Qwen3-32B' --quantization fp8", "Qwen/Qwen3-32B"),
        ("vllm serve \\\n  Qwen/Qwen3-32B", "Qwen/Qwen3-32B"),
        ("python3 -m sglang.launch_server --model-path=Qwen/Qwen3-8B --tp 8", "Qwen/Qwen3-8B"),
        ("python3 -m sglang.launch_server --speculative-draft-model-path a/b --model Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("trtllm-serve /workspace/DeepSeek-R1-0528 --tp_size 8", "/workspace/DeepSeek-R1-0528"),
        ("trtllm-serve serve Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("vllm serve --host 0.0.0.0", ""),
        ("vllm serve", ""),
        ("", ""),
    ],
)
def test_the_checkpoint_is_what_is_served(command: str, checkpoint: str) -> None:
    """The positional argument or --model, and never a draft model or the host."""
    assert parse_command(command).checkpoint == checkpoint


@pytest.mark.parametrize(
    ("command", "gpus"),
    [
        ("vllm serve m --tp 8", 8),
        ("vllm serve m --tp=8", 8),
        ("vllm serve m -tp 8", 8),
        ("vllm serve m --tensor-parallel-size 8", 8),
        ("vllm serve m --moe-dense-tp-size 1 --tp-size 8", 8),
        ("vllm serve m --ep-size 4", 1),
        ("vllm serve m -tp 2 -tp 4", 4),
        ("vllm serve m -tp many", 1),
        ("vllm serve m --note '--tp 8'", 1),
    ],
)
def test_gpus_are_told_by_whole_options(command: str, gpus: int) -> None:
    """An option that ends like another is another; the last of several counts."""
    assert parse_command(command).gpus == gpus


@pytest.mark.parametrize(
    ("command", "context"),
    [
        ("vllm serve m --max-model-len 32768", 32768),
        ("vllm serve m --max_model_len=32k", 32000),
        ("vllm serve m --max-model-len 32K", 32768),
        ("sglang serve m --context-length=40960", 40960),
        ("trtllm-serve m --max_seq_len 40960", 40960),
        ("vllm serve m --max-model-len -1", None),
        ("vllm serve m --max-model-len auto", None),
        ("vllm serve m", None),
    ],
)
def test_a_context_is_read_as_the_engines_read_it(command: str, context: int | None) -> None:
    """With the suffixes of vLLM, and none where the engine is left to choose."""
    assert parse_command(command).max_model_len == context


@pytest.mark.parametrize(
    ("command", "dtype"),
    [
        ("vllm serve Qwen/Qwen3-32B-FP8", "fp8"),
        ("vllm serve Qwen/Qwen3-32B", None),
        ("vllm serve Qwen/Qwen3-32B --kv-cache-dtype fp8", None),
        ("vllm serve Qwen/Qwen3-32B --quantization fp8", "fp8"),
        ("vllm serve Qwen/Qwen3-32B -q modelopt_fp4", "fp4"),
        ("vllm serve Qwen/Qwen3-32B --dtype bfloat16", None),
        ("vllm serve RedHatAI/Qwen3-8B-FP8-dynamic --quantization compressed-tensors", "fp8"),
        ("vllm serve nvidia/Some-NVFP4", "fp4"),
    ],
)
def test_the_weights_type_is_told_by_the_checkpoint_or_its_quantization(command: str, dtype: str | None) -> None:
    """By nothing else: the type of keys and values is none of weights."""
    assert parse_command(command).weight_dtype == dtype


@pytest.mark.parametrize(
    "command",
    [
        "vllm serve Qwen/Qwen3-32B-AWQ",
        "vllm serve Qwen/Qwen3-32B-GPTQ-Int4",
        "vllm serve Qwen/Qwen3-32B --quantization awq_marlin",
        "vllm serve Qwen/Qwen3-32B --quantization compressed-tensors",
        "vllm serve Qwen/Qwen3-32B --dtype float32",
    ],
)
def test_weights_of_another_type_have_no_facts(command: str) -> None:
    """Their bytes are not known, so neither are bounds; the model is taken for an unknown one."""
    with pytest.raises(UnknownDtypeError):
        _ = parse_command(command).weight_dtype

    assert server_facts(ServedAs("qwen3-32b", "h100", "vllm", command)).model is None


@pytest.mark.parametrize(
    ("model", "command", "known"),
    [
        ("deepseek-r1", "vllm serve deepseek-ai/DeepSeek-R1-0528 -tp 8", "deepseek-r1"),
        ("deepseek", "vllm serve deepseek-ai/DeepSeek-R1-0528 -tp 8", "deepseek-r1"),
        ("deepseek-r1", "trtllm-serve /workspace/DeepSeek-R1-0528 --tp_size 8", "deepseek-r1"),
        ("deepseek-r1", "vllm serve deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", None),
        ("deepseek", "vllm serve deepseek-ai/DeepSeek-R1-Distill-Llama-70B -tp 4", None),
        ("deepseek-r1", "vllm serve deepseek-ai/DeepSeek-R1-Distill-Llama-70B -tp 4", None),
        ("qwen3-8b", "vllm serve /models/current", "qwen3-8b"),
        ("qwen3-8b", "", "qwen3-8b"),
        ("Qwen/Qwen3-8B-AWQ", "", None),
        ("qwen3-8b", "vllm serve Qwen/Qwen3-14B", "qwen3-14b"),
    ],
)
def test_facts_are_of_the_model_that_was_served(model: str, command: str, known: str | None) -> None:
    """A distilled model has its own size, not that of the one whose name it carries."""
    facts = server_facts(ServedAs(model, "h200", "vllm", command))

    assert (facts.model.name if facts.model else None) == known


def test_fp8_keys_and_values_leave_the_weights_in_bf16() -> None:
    """``--kv-cache-dtype fp8`` is of the cache alone: the weights' time stays, the cache holds twice the tokens."""
    plain, narrow = (
        ServedAs("qwen3-32b", "h200", "vllm", f"vllm serve Qwen/Qwen3-32B{more}")
        for more in ("", " --kv-cache-dtype fp8")
    )
    (_, wide), (facts, half) = ((f := server_facts(s), server_roofline(s, f)) for s in (plain, narrow))

    assert (facts.dtype, facts.kv_dtype) == ("bf16", "fp8")
    assert half.base_s == wide.base_s
    assert half.batch.kv_tokens == pytest.approx(2 * wide.batch.kv_tokens)


def test_the_context_is_the_commands_and_else_the_models() -> None:
    """One rule for the bounds of a fit, for imported profiles and for shipped ones."""
    stated = ServedAs("qwen3-8b", "h100", "sglang", "sglang serve Qwen/Qwen3-8B --context-length 1234")
    unstated = ServedAs("qwen3-8b", "h100", "vllm", "")
    unknown = ServedAs("mystery", "h100", "vllm", "")

    assert [context_of(each, server_facts(each)) for each in (stated, unstated, unknown)] == [1234, 40960, None]


@given(st.text(max_size=60) | st.text("-=vlmserv tp1'\"\\", max_size=40))
def test_any_text_is_taken_apart(text: str) -> None:
    """Unbalanced quotes and nonsense are no error: they say nothing of the server."""
    command = parse_command(text)

    assert command.gpus >= 1
    assert command.max_model_len is None or command.max_model_len > 0
