"""What cannot be true of a profile: contradictions between its own numbers, and with the data sheets. Pure.

A typo or a mistaken unit (milliseconds for seconds, one GPU's rate for eight) makes a document that is well formed and
wrong by a large factor. Such factors are caught here, and only such: an engine that is slow, or a little faster than a
data sheet says, is none of this module's business. A coefficient of exactly zero is what a fit says of one that its
points could not tell apart, and passes.
"""

from __future__ import annotations

from collections.abc import Iterator

from serving.gpus import WEIGHT_BYTES, GpuFacts, ModelFacts, find_gpu, find_model
from serving.pointchecks import beyond_peak, point_problems
from serving.points import MeasuredPoint
from serving.profile import Profile

#: A coefficient beyond the roofline by more than this is an error, not a fast engine.
BEYOND_ROOFLINE = 2.0
#: A coefficient this many times slower than the roofline is in the wrong unit.
BEHIND_ROOFLINE = 200.0
#: Share of an empty step below which a measured TPOT contradicts it; what is between is an error of the fit.
LEAST_TPOT_SHARE = 0.7


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
        for problem in (*point_problems(point), *_beside(profile, point)):
            yield f"{name}: {problem}"


def _load(point: MeasuredPoint) -> str:
    if point.concurrency is not None:
        return f"concurrency {point.concurrency:g}"
    return f"{point.offered_per_s:g} requests/s" if point.offered_per_s is not None else "an unstated load"


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
    for point in profile.fit.points if profile.fit else ():
        problem = beyond_peak(point, gpu, profile.gpus_per_replica, model) if point.duration_s > 0 else None
        if problem is not None:
            yield f"point {point.mix!r} at {_load(point)}: {problem}"
