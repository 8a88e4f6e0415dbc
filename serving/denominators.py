"""Results whose rates have other denominators than one whole replica: refused, with the reason. Pure.

Where prefill and decode run on GPUs of their own, published rates divide input by the prefill GPUs and output by the
decode GPUs. Neither is a rate of a replica, their sum is a rate of nothing, and such a pair has no one step time.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Columns or keys that say it of a row, where they are set.
_FLAGS = frozenset({"disagg", "disaggregated", "is_disagg", "is_disaggregated"})
_UNSET = frozenset({"", "0", "false", "no", "none", "null"})
#: What server commands of a prefill or decode half carry.
_COMMANDS = ("kv_producer", "kv_consumer", "--disaggregation-mode", "trtllm-serve disaggregated")
#: Only a disaggregated deployment counts its GPUs so.
_GPU_COUNTS = ("prefill_gpu", "decode_gpu")
_PER_GPU = ("tput_per_gpu", "tok_s_per_gpu", "throughput_per_gpu")

_REASON = (
    "prefill and decode ran on GPUs of their own (disaggregated), where input is divided by the prefill GPUs and "
    "output by the decode GPUs; that is no rate of one replica. Benchmark a replica that does both, or each "
    "half by itself"
)


def command_problem(command: str) -> str | None:
    """What is wrong with the server command of one half of a disaggregated pair; None for any other."""
    return _REASON if any(mark in command for mark in _COMMANDS) else None


def flag_problem(flags: Iterable[tuple[str, object]]) -> str | None:
    """Which key or column says that the row is of a disaggregated deployment; None where none does."""
    for key, value in flags:
        name = key.lower()
        is_set = value is not None and value is not False and str(value).strip().lower() not in _UNSET
        if is_set and (name in _FLAGS or any(count in name for count in _GPU_COUNTS)):
            return f"{name} is {str(value)[:40]!r}: {_REASON}"
    return None


def are_per_gpu(keys: Iterable[str]) -> bool:
    """Whether a document states rates per GPU, as InferenceX's rows do, and so no totals."""
    return any(mark in key.lower() for key in keys for mark in _PER_GPU)
