"""What cannot be true of a profile: contradictions between its own numbers, and with the data sheets. Pure.

A typo or a mistaken unit (milliseconds for seconds, one GPU's rate for eight) makes a document that is well formed and
wrong by a large factor. Such factors are caught here, and only such: an engine that is slow, or a little faster than a
data sheet says, is none of this module's business. A coefficient of exactly zero is what a fit says of one that its
points could not tell apart, and passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import isfinite

from serving.gpus import WEIGHT_BYTES, GpuFacts, ModelFacts, find_gpu, find_model
from serving.points import MeasuredPoint
from serving.profile import Profile

#: A rate beyond the roofline by more than this is an error, not a fast engine.
BEYOND_ROOFLINE = 2.0
#: A coefficient this many times slower than the roofline is in the wrong unit.
BEHIND_ROOFLINE = 200.0
#: Share of an empty step below which a measured TPOT contradicts it; what is between is an error of the fit.
LEAST_TPOT_SHARE = 0.7
#: By how much the time spent in requests may exceed concurrency × duration: its means are of unlike weights.
LITTLE_SLACK = 2.0

_PERCENTILES = (("ttft_p50_s", "ttft_p95_s", "ttft_p99_s"), ("tpot_p50_s", "tpot_p95_s", "tpot_p99_s"))


def contradictions(profile: Profile) -> tuple[str, ...]:
    """What is impossible in the profile, each with how to mend it; empty where nothing is.

    Without facts of its GPU or its model (``serving.gpus``) only the profile's own numbers are compared.
    """
    return (*_of_points(profile), *_of_facts(profile))


def unchecked(profile: Profile) -> str | None:
    """Which facts are missing to compare the profile with, or None."""
    missing = [
        f"{kind} {name}"
        for kind, name, facts in (
            ("GPU", profile.gpu, find_gpu(profile.gpu)),
            ("model", profile.model, find_model(profile.model)),
        )
        if facts is None
    ]
    return f"no facts of {' and '.join(missing)} to compare with" if missing else None


def _of_points(profile: Profile) -> Iterator[str]:
    for point in profile.fit.points if profile.fit else ():
        name = f"point {point.mix!r} at {_load(point)}"
        for problem in (*_of_numbers(point), *_of_times(point), *_beside(profile, point)):
            yield f"{name}: {problem}"


def _load(point: MeasuredPoint) -> str:
    if point.concurrency is not None:
        return f"concurrency {point.concurrency:g}"
    return f"{point.offered_per_s:g} requests/s" if point.offered_per_s is not None else "an unstated load"


def _of_numbers(point: MeasuredPoint) -> Iterator[str]:
    for field in MeasuredPoint.__struct_fields__:
        value = getattr(point, field)
        if isinstance(value, int | float) and not (isfinite(value) and value >= 0):
            yield f"{field} is {value}, it must be zero or a positive number"
    if point.requests and point.output_tokens < point.requests:
        yield f"{point.requests} requests gave {point.output_tokens} output tokens; each gives at least one"
    if point.cached_tokens > point.input_tokens:
        yield f"{point.cached_tokens} cached of {point.input_tokens} input tokens; cached ones are among the input"


def _of_times(point: MeasuredPoint) -> Iterator[str]:
    for fields in _PERCENTILES:
        known = [(field, value) for field in fields if (value := getattr(point, field)) is not None]
        for (low, at_low), (high, at_high) in pairwise(known):
            if at_low > at_high:
                yield f"{low} is {at_low:g}, above {high}, which is {at_high:g}; are they exchanged?"
    ttft_s, tpot_s, concurrency = point.ttft_mean_s, point.tpot_mean_s, point.concurrency
    if ttft_s is None or tpot_s is None or concurrency is None or not point.requests:
        return
    later_tokens = point.output_tokens / point.requests - 1
    spent_s = point.requests * (ttft_s + later_tokens * tpot_s)
    if spent_s > LITTLE_SLACK * concurrency * point.duration_s:
        yield (
            f"its requests took {spent_s:.3g} s in all, and {concurrency:g} at a time in "
            f"{point.duration_s:g} s is less than half of that; are TTFT and TPOT in seconds?"
        )


def _beside(profile: Profile, point: MeasuredPoint) -> Iterator[str]:
    base_s = profile.step_time.base_s
    for field in ("tpot_mean_s", "tpot_p50_s"):
        seen_s = getattr(point, field)
        if seen_s is not None and 0 < seen_s < LEAST_TPOT_SHARE * base_s:
            yield (
                f"{field} is {seen_s * 1e3:.3g} ms, below the {base_s * 1e3:.3g} ms of an empty step "
                f"(step_time.base_s): a token takes a step; is one of them in another unit?"
            )
    if point.requests and point.input_tokens / point.requests > profile.limits.max_model_len:
        yield (
            f"its prompts have {point.input_tokens / point.requests:.0f} tokens in the mean, above "
            f"limits.max_model_len, which is {profile.limits.max_model_len}; raise it to the server's"
        )


def _of_facts(profile: Profile) -> Iterator[str]:
    gpu, model = find_gpu(profile.gpu), find_model(profile.model)
    if gpu is None or model is None:
        return
    yield from _of_memory(profile, gpu, model)
    yield from _of_coefficients(profile, gpu, model)
    yield from _of_rates(profile, gpu, model)


def _of_memory(profile: Profile, gpu: GpuFacts, model: ModelFacts) -> Iterator[str]:
    memory_bytes = gpu.memory_bytes * profile.gpus_per_replica
    weight_bytes = model.parameters * min(WEIGHT_BYTES.values())
    token_bytes = model.kv_bytes_per_token("fp8")
    kv_bytes = profile.limits.kv_tokens * token_bytes
    if weight_bytes + kv_bytes > memory_bytes:
        most = max(0.0, memory_bytes - weight_bytes) / token_bytes
        yield (
            f"limits.kv_tokens is {profile.limits.kv_tokens}: {kv_bytes / 1e9:.0f} GB in FP8, beside "
            f"{weight_bytes / 1e9:.0f} GB of weights at the least, and {profile.gpus_per_replica} × {gpu.name} have "
            f"{memory_bytes / 1e9:.0f} GB; at most {most:.0f} tokens fit: is it blocks × block_size, and are "
            f"gpus_per_replica right?"
        )


def _of_coefficients(profile: Profile, gpu: GpuFacts, model: ModelFacts) -> Iterator[str]:
    for field, (peak_s, slow_s) in _roofs(profile.gpus_per_replica, gpu, model).items():
        value_s = getattr(profile.step_time, field)
        if 0 < value_s < peak_s / BEYOND_ROOFLINE:
            yield (
                f"step_time.{field} is {value_s:.3g} s, and {profile.gpus_per_replica} × {gpu.name} at their peak "
                f"need {peak_s:.3g} s for {model.name}; is it in seconds, and are gpus_per_replica right?"
            )
        elif value_s > BEHIND_ROOFLINE * slow_s:
            yield (
                f"step_time.{field} is {value_s:.3g} s, {value_s / slow_s:.0f} times what {model.name} needs on "
                f"{profile.gpus_per_replica} × {gpu.name}; is it in seconds?"
            )


def _roofs(gpus: int, gpu: GpuFacts, model: ModelFacts) -> dict[str, tuple[float, float]]:
    """The seconds of each coefficient at peak, in the smallest data types and in BF16.

    A mixture of experts streams its active weights at the least, and all of them at the most. What a sequence costs
    has no floor: a fit may find it in the tokens that the sequence reads.
    """
    bytes_per_s = gpu.memory_bytes_per_s * gpus
    multiplied_s = 2 * model.active_parameters / (gpu.flops["bf16"] * gpus)
    return {
        "base_s": (
            model.active_parameters * min(WEIGHT_BYTES.values()) / bytes_per_s,
            model.parameters * WEIGHT_BYTES["bf16"] / bytes_per_s,
        ),
        "prompt_token_s": (2 * model.active_parameters / (max(gpu.flops.values()) * gpus), multiplied_s),
        "sequence_s": (0.0, multiplied_s),
        "kv_token_s": (
            model.kv_bytes_per_token("fp8") / bytes_per_s,
            model.kv_bytes_per_token("bf16") / bytes_per_s,
        ),
    }


def _of_rates(profile: Profile, gpu: GpuFacts, model: ModelFacts) -> Iterator[str]:
    peak_tokens_per_s = max(gpu.flops.values()) * profile.gpus_per_replica / (2 * model.active_parameters)
    for point in profile.fit.points if profile.fit else ():
        tokens = point.input_tokens - point.cached_tokens + point.output_tokens
        if point.duration_s > 0 and tokens / point.duration_s > BEYOND_ROOFLINE * peak_tokens_per_s:
            yield (
                f"point {point.mix!r} at {_load(point)}: {tokens / point.duration_s:.0f} uncached tokens/s, and "
                f"{profile.gpus_per_replica} × {gpu.name} multiply at most {peak_tokens_per_s:.0f} for {model.name}; "
                f"are gpus_per_replica right, and were prompts cached?"
            )
