"""What a serve command says of its server: checkpoint, GPUs, data types, bounds of a batch. Pure.

Of vLLM, SGLang and TensorRT-LLM. Options count by their whole names, ``-`` and ``_`` alike, with their value behind a
space or ``=``; the last of several counts, as in the engines themselves.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import PurePosixPath

import msgspec

from serving.gpus import KvDtype, WeightDtype

_CHECKPOINT = ("model", "model-path")
_PARALLEL = (
    ("tp", "tp-size", "tensor-parallel-size"),
    ("pp", "pp-size", "pipeline-parallel-size"),
    ("dp", "dp-size", "data-parallel-size"),
)
_DATA_PARALLEL = _PARALLEL[2]
#: Under SGLang's attention in data parallel the tensor-parallel GPUs are the same ones.
_SHARED_DATA_PARALLEL = "enable-dp-attention"
_MAX_NUM_SEQS = ("max-num-seqs", "max-running-requests", "max-batch-size")
_MAX_NUM_BATCHED_TOKENS = ("max-num-batched-tokens", "max-num-tokens", "chunked-prefill-size")
_MAX_MODEL_LEN = ("max-model-len", "max-seq-len", "context-length")
_QUANTIZATION = ("quantization", "q")

#: Words of a checkpoint's name, or of ``--quantization``, that tell the weights' type.
_WEIGHT_WORDS: dict[str, WeightDtype] = {
    "bf16": "bf16",
    "fp16": "bf16",
    "fp8": "fp8",
    "mxfp4": "mxfp4",
    "fp4": "fp4",
    "nvfp4": "fp4",
}
#: Those of types whose bytes a weight are not known here.
_OTHER_WORDS = frozenset(
    (
        "awq",
        "gptq",
        "marlin",
        "int4",
        "int8",
        "w4a16",
        "w8a8",
        "w4a8",
        "gguf",
        "bnb",
        "bitsandbytes",
        "4bit",
        "8bit",
        "fp6",
    )
)
#: What ``--quantization`` says that leaves it to the checkpoint's name.
_UNTOLD_QUANTIZATION = frozenset({"", "none", "auto"})
#: ``--dtype`` is of what is not quantized, and these have two bytes, as BF16 has.
_TWO_BYTES = frozenset({"", "auto", "half", "float16", "bfloat16", "fp16", "bf16"})
#: vLLM reads 1k as 1000 and 1K as 1024.
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


class UnknownDtypeError(ValueError):
    """Weights of a type whose size is not known here."""


class ServeCommand(msgspec.Struct, frozen=True):
    """A command, taken apart. ``checkpoint`` is empty where it names none; an option without value has an empty one."""

    checkpoint: str
    options: Mapping[str, str]

    @property
    def gpus(self) -> int:
        """How many GPUs one replica takes: one where the command names no number."""
        product = 1
        for names in _PARALLEL:
            if names != _DATA_PARALLEL or _SHARED_DATA_PARALLEL not in self.options:
                product *= self._count(names) or 1
        return product

    @property
    def max_num_seqs(self) -> int | None:
        """Scheduler slots; None where the engine chooses."""
        return self._count(_MAX_NUM_SEQS)

    @property
    def max_num_batched_tokens(self) -> int | None:
        """Tokens of a step; None where the engine chooses."""
        return self._count(_MAX_NUM_BATCHED_TOKENS)

    @property
    def max_model_len(self) -> int | None:
        """The longest context, in tokens; None where it is the model's own."""
        return self._count(_MAX_MODEL_LEN)

    @property
    def kv_dtype(self) -> KvDtype:
        """How keys and values are kept: in BF16 unless told otherwise."""
        return "fp8" if self._value(("kv-cache-dtype",)).lower().startswith("fp8") else "bf16"

    @property
    def weight_dtype(self) -> WeightDtype | None:
        """The weights' type, by ``--quantization`` or the checkpoint's name; None where they say nothing of it.

        Raises ``UnknownDtypeError`` for AWQ, GPTQ and whatever else is of no known size.
        """
        dtype = self._value(("dtype",)).lower()
        if dtype not in _TWO_BYTES:
            raise UnknownDtypeError(f"--dtype {dtype}")
        quantization = self._value(_QUANTIZATION)
        named = dtype_told_by(self.checkpoint.rsplit("/", 1)[-1])
        if quantization.lower() in _UNTOLD_QUANTIZATION:
            return named
        told = dtype_told_by(quantization) or named
        if told is None:
            raise UnknownDtypeError(f"--quantization {quantization}")
        return told

    def _value(self, names: tuple[str, ...]) -> str:
        return next((self.options[name] for name in names if name in self.options), "")

    def _count(self, names: tuple[str, ...]) -> int | None:
        found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)([kmgKMG]?)", self._value(names))
        count = int(float(found.group(1)) * _MULTIPLES[found.group(2)]) if found else 0
        return count if count > 0 else None


def dtype_told_by(name: str) -> WeightDtype | None:
    """The weights' type that a checkpoint's name or a method of quantization says; None where it says none.

    Raises ``UnknownDtypeError`` where it says one of no known size.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    told = next((_WEIGHT_WORDS[word] for word in words if word in _WEIGHT_WORDS), None)
    if told is None and not _OTHER_WORDS.isdisjoint(words):
        raise UnknownDtypeError(name)
    return told


def parse_command(text: str) -> ServeCommand:
    """The command taken apart. Text that is no command has neither checkpoint nor options."""
    joined = text.replace("\\\n", " ")
    try:
        words = shlex.split(joined)
    except ValueError:  # a quote without its end
        words = joined.split()
    options: dict[str, str] = {}
    for word, following in pairwise([*words, ""]):
        if not _is_option(word):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        options[name.replace("_", "-")] = value if equals or _is_option(following) else following
    named = (options[name] for name in _CHECKPOINT if options.get(name))
    return ServeCommand(_positional(words) or next(named, ""), options)


def _positional(words: list[str]) -> str:
    """What follows ``vllm serve``, ``sglang serve``, ``trtllm-serve`` or ``trtllm-serve serve``."""
    for word, following in pairwise(words):
        is_server = word == "serve" or PurePosixPath(word).name == "trtllm-serve"
        if is_server and following != "serve":
            return "" if _is_option(following) else following
    return ""


def _is_option(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None
