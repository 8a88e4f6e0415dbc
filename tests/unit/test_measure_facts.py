from __future__ import annotations

from typing import Any

import msgspec
import pytest

from serving.capacity import EngineLimits, RequestShape, WorkloadMix
from serving.enginefacts import EngineReport, FactsError, Stated, cache_labels, settled_facts
from serving.identify import identifiability, planned_rows
from serving.measure import fitting_mixes

CACHE = {"num_gpu_blocks": "1000", "block_size": "16", "gpu_memory_utilization": "0.9", "cache_dtype": "auto"}
REPORT = EngineReport("llama", 8192, "0.32.0", CACHE, fingerprint="vllm-0.32.0-3a95e869")
STATED = Stated(gpu="H200", dtype="bf16", max_num_seqs=256, max_num_batched_tokens=8192)


def server_info(**changes: Any) -> dict[str, Any]:
    """The parts of vLLM's answer that are read, as an H200 gives them."""
    config: dict[str, Any] = {
        "model_config": {"dtype": "torch.bfloat16", "quantization": None},
        "scheduler_config": {"max_num_seqs": 1024, "max_num_batched_tokens": 16384},
        "parallel_config": {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 1},
        "device_config": {"device": "cuda"},
        "load_config": {"load_format": "dummy"},
    }
    config |= changes
    return {"vllm_config": config, "system_env": {"nvidia_gpu_models": "GPU 0: NVIDIA H200\nGPU 1: NVIDIA H200"}}


def test_the_engine_tells_everything_in_development_mode() -> None:
    """Nothing needs to be stated, and each fact names its source."""
    facts = settled_facts(msgspec.structs.replace(REPORT, server_info=server_info()), Stated())

    assert (facts.gpu, facts.gpus, facts.dtype, facts.parallelism) == ("H200", 2, "bfloat16", "tp2")
    assert (facts.max_num_seqs, facts.max_num_batched_tokens, facts.kv_tokens) == (1024, 16384, 16000)
    assert all("(/server_info)" in source for source in facts.sources)
    assert "load_format=dummy (/server_info)" in facts.extras
    assert "gpu_memory_utilization=0.9 (/metrics)" in facts.extras


def test_what_it_does_not_tell_is_stated_and_marked() -> None:
    """The operator's word is never taken for the engine's; the fingerprint tells that nothing is parallel."""
    facts = settled_facts(REPORT, STATED)

    assert "max_num_seqs=256 (stated by the operator)" in facts.sources
    assert "parallelism=tp1 (the fingerprint of its answers, which names no parallelism)" in facts.sources
    assert (facts.gpu, facts.gpus, facts.max_model_len, facts.block_size) == ("H200", 1, 8192, 16)


@pytest.mark.parametrize("missing", ["gpu", "dtype", "max_num_seqs", "max_num_batched_tokens"])
def test_what_nobody_tells_is_asked_for(missing: str) -> None:
    """Nothing is guessed: the message names the fact, its option, and how the engine would tell."""
    option = "--" + missing.replace("_", "-")
    with pytest.raises(FactsError, match=rf"tell its {missing}: .*VLLM_SERVER_DEV_MODE=1.* {option}"):
        settled_facts(REPORT, msgspec.structs.replace(STATED, **{missing: None}))


def test_a_contradiction_is_refused() -> None:
    """The engine knows better, so an option that says otherwise is a mistake somewhere."""
    told = msgspec.structs.replace(REPORT, server_info=server_info())
    with pytest.raises(FactsError, match=r"--max-num-seqs says 256, but by /server_info it is 1024; leave the option"):
        settled_facts(told, Stated(max_num_seqs=256))
    with pytest.raises(FactsError, match="--gpu says H100, but by /server_info it is H200"):
        settled_facts(told, Stated(gpu="H100"))
    assert settled_facts(told, Stated(gpu="h200", max_num_seqs=1024)).gpu == "H200"


def test_parallelism_is_read_from_the_fingerprint() -> None:
    """Degrees above one are named there; an operator who states GPUs alone means tensor parallelism."""
    tp4 = msgspec.structs.replace(REPORT, fingerprint="vllm-0.32.0-tp4-3a95e869")
    silent = msgspec.structs.replace(REPORT, fingerprint="")

    assert (settled_facts(tp4, STATED).gpus, settled_facts(tp4, STATED).parallelism) == (4, "tp4")
    assert settled_facts(silent, msgspec.structs.replace(STATED, gpus=2)).parallelism == "tp2"
    with pytest.raises(FactsError, match="does not tell its gpus"):
        settled_facts(silent, STATED)
    with pytest.raises(FactsError, match="--gpus says 2, but by the fingerprint of its answers it is 4"):
        settled_facts(tp4, msgspec.structs.replace(STATED, gpus=2))


def test_data_parallel_engines_are_several_replicas() -> None:
    """One profile cannot say what each does."""
    with pytest.raises(FactsError, match="2 data-parallel engines"):
        settled_facts(msgspec.structs.replace(REPORT, fingerprint="vllm-0.32.0-dp2-3a95e869"), STATED)


@pytest.mark.parametrize(
    "changes",
    [
        {"device_config": {"device": "cpu"}},
        {"parallel_config": {"distributed_executor_backend": "serving.engine.virtual_gpu.VirtualGpuExecutor"}},
    ],
)
def test_a_machines_gpus_are_not_those_of_an_engine_that_uses_none(changes: dict[str, Any]) -> None:
    """A CPU or virtual engine beside an H200 is no H200."""
    told = msgspec.structs.replace(REPORT, server_info=server_info(**changes))
    assert settled_facts(told, Stated(gpu="virtual")).gpu == "virtual"


def test_nvidia_smi_stands_in_where_nobody_tells() -> None:
    """And is named as the source."""
    local = msgspec.structs.replace(REPORT, local_gpus=("NVIDIA H100 80GB HBM3",))
    facts = settled_facts(local, msgspec.structs.replace(STATED, gpu=None))
    assert facts.gpu == "H100"
    assert "gpu=H100 (nvidia-smi on this machine)" in facts.sources


@pytest.mark.parametrize(
    ("change", "missing"), [({"cache_config": {}}, "vllm:cache_config_info"), ({"max_model_len": 0}, "max_model_len")]
)
def test_a_server_that_is_no_vllm_is_refused(change: dict[str, Any], missing: str) -> None:
    """What is missing is named."""
    with pytest.raises(FactsError, match=f"does not report .*{missing}"):
        settled_facts(msgspec.structs.replace(REPORT, **change), STATED)


def test_labels_that_say_nothing_are_left_out() -> None:
    """VLLM writes None for what it has not decided."""
    assert cache_labels({"block_size": "16", "num_gpu_blocks": "None", "engine": "0"}) == {"block_size": "16"}


@pytest.mark.parametrize("context", [256, 4096, 131_072])
def test_the_four_mixes_tell_all_coefficients_apart(context: int) -> None:
    """At any context, before anything is run."""
    limits = EngineLimits(256, 8192, 400_000, context)
    found = identifiability(planned_rows(fitting_mixes(limits), limits))

    assert found.problem == ""
    assert found.condition < 100


def test_a_coefficient_that_cannot_be_told_apart_is_named() -> None:
    """One shape at many loads cannot tell prompts from output; equal loads cannot tell steps from sequences."""
    limits = EngineLimits(256, 8192, 400_000, 4096)
    one = identifiability(planned_rows([WorkloadMix("one", (RequestShape(100, 100),))] * 4, limits))
    assert {"prompt_token_s", "sequence_s", "kv_token_s"} <= set(one.weak)
    assert "prefill-heavy" in one.problem

    alone = identifiability([(o, i, o, o * (i + o / 2)) for i, o in ((10, 90), (500, 50), (2000, 9), (300, 600))])
    assert {"base_s", "sequence_s"} <= set(alone.weak)
    assert identifiability([(1, 1, 1, 1)]).condition == float("inf")
