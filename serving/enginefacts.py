"""What an engine says of itself, and what its operator must add: each fact with where it is from. Pure.

vLLM tells its version (``/version``), its model and context (``/v1/models``), its KV blocks, their size and its share
of GPU memory (``vllm:cache_config_info`` in ``/metrics``), and its parallelism in the fingerprint of every answer.
With ``VLLM_SERVER_DEV_MODE=1``, ``/server_info`` tells the rest. What nobody says is asked of the operator, never
guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import msgspec

#: How a fact that the engine does not tell is marked.
STATED = "stated by the operator"
_SERVER_INFO, _METRICS, _FINGERPRINT = "/server_info", "/metrics", "the fingerprint of its answers"
#: vLLM's fingerprint where nothing is parallel, unless an option hides it: so it only stands in for silence.
_SINGLE = re.compile(r"vllm-\S+-[0-9a-f]{8}")
_DEV_MODE = "start vLLM with VLLM_SERVER_DEV_MODE=1, so that it tells, or state"
#: Options by the fact that they state.
_OPTIONS = {
    "gpu": "--gpu",
    "gpus": "--gpus",
    "dtype": "--dtype",
    "parallelism": "--parallelism",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
}


class FactsError(ValueError):
    """What the engine and its operator say is not enough, or contradicts itself; the message says what to do."""


class Fact(NamedTuple):
    """A value and who says it."""

    value: Any
    source: str


class Stated(msgspec.Struct, frozen=True):
    """What the operator states, where the engine does not tell. None is nothing stated."""

    gpu: str | None = None
    gpus: int | None = None
    dtype: str | None = None
    parallelism: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


class Counters(NamedTuple):
    """Counters since the engine started, at a moment on the monotonic clock; None where it does not count."""

    time_s: float
    steps: float | None
    prefix_hit_tokens: float | None
    open_requests: float | None


class EngineReport(msgspec.Struct, frozen=True):
    """Everything that an engine answered when asked about itself; empty where it did not answer.

    ``cache_config`` holds the labels of ``vllm:cache_config_info``, ``server_info`` the whole of that answer in JSON.
    ``local_gpus`` are the names that nvidia-smi lists, where the engine runs on this machine.
    """

    model: str
    max_model_len: int
    version: str = ""
    cache_config: Mapping[str, str] = {}
    server_info: Mapping[str, Any] = {}
    fingerprint: str = ""
    local_gpus: tuple[str, ...] = ()


class EngineFacts(msgspec.Struct, frozen=True):
    """What is known of the engine, for a profile and its provenance; ``sources`` says of each who told it."""

    model: str
    engine_version: str
    max_model_len: int
    kv_tokens: int
    block_size: int
    gpu: str
    gpus: int
    dtype: str
    parallelism: str
    max_num_seqs: int
    max_num_batched_tokens: int
    extras: tuple[str, ...]
    sources: tuple[str, ...]


def settled_facts(report: EngineReport, stated: Stated) -> EngineFacts:
    """The engine's word where it has one, else the operator's. Raises ``FactsError`` for what neither says."""
    told = {**_from_fingerprint(report), **_from_server_info(report)}
    if not stated.gpu and "gpu" not in told and report.local_gpus:
        told["gpu"] = Fact(_gpu_label(report.local_gpus[0]), "nvidia-smi on this machine")
    if stated.gpus and not stated.parallelism and "parallelism" not in told:
        told["parallelism"] = Fact(f"tp{stated.gpus}", STATED)
    if _SINGLE.fullmatch(report.fingerprint):
        for name, alone in (("gpus", 1), ("parallelism", "tp1")):
            if name not in told and getattr(stated, name) is None:
                told[name] = Fact(alone, f"{_FINGERPRINT}, which names no parallelism")
    facts = {name: _settled(name, told.get(name), getattr(stated, name)) for name in _OPTIONS}
    blocks, block_size = (int(report.cache_config.get(key, "") or 0) for key in ("num_gpu_blocks", "block_size"))
    missing = "max_model_len in /v1/models" if not report.max_model_len else ""
    if not blocks or not block_size:
        missing = "num_gpu_blocks and block_size (vllm:cache_config_info) in /metrics"
    if missing:
        raise FactsError(f"the server does not report {missing}; point penstock measure at vLLM itself")
    return EngineFacts(
        model=report.model,
        engine_version=report.version or "unknown",
        max_model_len=report.max_model_len,
        kv_tokens=blocks * block_size,
        block_size=block_size,
        **{name: fact.value for name, fact in facts.items()},
        extras=_extras(report),
        sources=tuple(f"{name}={fact.value} ({fact.source})" for name, fact in facts.items()),
    )


def cache_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels of ``vllm:cache_config_info`` that a profile can use."""
    kept = ("num_gpu_blocks", "block_size", "gpu_memory_utilization", "cache_dtype", "enable_prefix_caching")
    return {key: labels[key] for key in kept if labels.get(key) not in {None, "None"}}


def _settled(name: str, told: Fact | None, stated: Any) -> Fact:
    if told is None:
        if stated is None:
            raise FactsError(f"the engine does not tell its {name}: {_DEV_MODE} {_OPTIONS[name]}")
        return Fact(stated, STATED)
    if stated is not None and not _agree(name, told.value, stated):
        raise FactsError(
            f"{_OPTIONS[name]} says {stated}, but by {told.source} it is {told.value}; leave the option out"
        )
    return told


def _agree(name: str, told: Any, stated: Any) -> bool:
    if name in {"gpu", "dtype"}:
        return str(stated).casefold() in str(told).casefold() or str(told).casefold() in str(stated).casefold()
    return bool(told == stated)


def _from_fingerprint(report: EngineReport) -> dict[str, Fact]:
    """Degrees above one, in ``vllm-<version>-tp2-<hash>``; their absence proves nothing, for the form is an option."""
    degrees = re.findall(r"-(tp|pp|dp)(\d+)(?=-)", report.fingerprint)
    return _parallel({kind: int(count) for kind, count in degrees}, _FINGERPRINT) if degrees else {}


def _from_server_info(report: EngineReport) -> dict[str, Fact]:
    config = report.server_info.get("vllm_config")
    if not isinstance(config, dict):
        return {}
    model, scheduler, parallel = (config.get(f"{part}_config") or {} for part in ("model", "scheduler", "parallel"))
    degrees = {
        "tp": parallel.get("tensor_parallel_size", 1),
        "pp": parallel.get("pipeline_parallel_size", 1),
        "dp": parallel.get("data_parallel_size", 1),
    }
    told = _parallel(degrees, _SERVER_INFO)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if scheduler.get(name):
            told[name] = Fact(int(scheduler[name]), _SERVER_INFO)
    if model.get("dtype"):
        weights = model.get("quantization") or str(model["dtype"]).removeprefix("torch.")
        told["dtype"] = Fact(weights, _SERVER_INFO)
    return told | _gpu_of(report, config)


def _gpu_of(report: EngineReport, config: Mapping[str, Any]) -> dict[str, Fact]:
    """The GPU that the engine sees; nothing where it runs on a CPU or a virtual GPU, whatever else the machine has."""
    device = str((config.get("device_config") or {}).get("device") or "")
    executor = str((config.get("parallel_config") or {}).get("distributed_executor_backend") or "")
    models = str((report.server_info.get("system_env") or {}).get("nvidia_gpu_models") or "")
    names = [line.split(": ", 1)[-1].strip() for line in models.splitlines() if line.strip()]
    if "cpu" in device or "virtual_gpu" in executor or not names:
        return {}
    return {"gpu": Fact(_gpu_label(names[0]), _SERVER_INFO)}


def _gpu_label(name: str) -> str:
    """H200 for "NVIDIA H200"; the name as it is where it has no such token."""
    found = re.search(r"\b(GB\d{3}|[A-Z]{1,2}\d{1,4}[A-Z]?)\b", name)
    return found.group(1) if found else name


def _parallel(degrees: Mapping[str, int], source: str) -> dict[str, Fact]:
    if degrees.get("dp", 1) > 1:
        raise FactsError(
            f"by {source} this server spreads over {degrees['dp']} data-parallel engines, which are as many replicas; "
            "measure one (start vLLM without --data-parallel-size)"
        )
    used = [f"{kind}{degree}" for kind, degree in degrees.items() if degree > 1]
    return {
        "gpus": Fact(prod(degrees.values()), source),
        "parallelism": Fact("-".join(used) or "tp1", source),
    }


def _extras(report: EngineReport) -> tuple[str, ...]:
    """What else is worth having in a provenance, each as ``name=value (source)``."""
    labels = report.cache_config
    found = [
        f"{name}={labels[key]} ({_METRICS})"
        for name, key in (("gpu_memory_utilization", "gpu_memory_utilization"), ("kv_cache_dtype", "cache_dtype"))
        if key in labels
    ]
    config = report.server_info.get("vllm_config")
    if isinstance(config, dict):
        load_format = (config.get("load_config") or {}).get("load_format")
        found += [f"load_format={load_format} ({_SERVER_INFO})"] if load_format else []
        found += [f"speculative decoding is on ({_SERVER_INFO})"] if config.get("speculative_config") else []
    found += (
        [f"nvidia-smi on this machine lists {', '.join(sorted(set(report.local_gpus)))}"] if report.local_gpus else []
    )
    return tuple(found)
