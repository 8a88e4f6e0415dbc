"""``penstock measure``: drive a live endpoint through one fixed sweep and write down what it can do.

Four mixes, each at several concurrencies, in a closed loop (``sweep``), from which the step-time model is fitted
(``fit``). Lengths are scaled down, mix by mix, to what the model's context can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from serving.capacity import EngineLimits, WorkloadMix
from serving.endpoint import Endpoint, EndpointError, EndpointFacts
from serving.fit import fit_step_time
from serving.mixes import MIX_NAMES, load_mix
from serving.profile import Fit, Profile, Provenance
from serving.sweep import ClosedLoop

#: A model that misses a point by more than this says so in its provenance.
WELL_FITTED = 0.10
#: The mixes shrink no further than this to fit a context.
_SMALLEST_SCALE = 1 / 256


class MeasureTarget(msgspec.Struct, frozen=True):
    """What to measure, and what the endpoint cannot say of itself.

    ``max_num_seqs`` and ``max_num_batched_tokens`` are the values it was started with (here: vLLM's for a large GPU).
    ``point_s`` is how long each point is watched, after ``warm_up_s``.
    """

    url: str
    name: str
    gpu: str
    gpus_per_replica: int = 1
    model: str | None = None
    api_key: str | None = None
    dtype: str = "unknown"
    parallelism: str = "tp1"
    hardware: str = ""
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    concurrencies: tuple[int, ...] = (1, 4, 16, 64)
    warm_up_s: float = 3.0
    point_s: float = 12.0
    request_timeout_s: float = 120.0


class Progress(NamedTuple):
    """How far a sweep has come."""

    done: int
    total: int
    mix: str
    concurrency: int


async def measure(target: MeasureTarget, on_progress: Callable[[Progress], None]) -> Profile:
    """Measure the endpoint and fit its profile.

    Raises ``EndpointError`` where it is away, refuses, never succeeds or counts no tokens; ``FitError`` where what was
    seen determines no model.
    """
    async with Endpoint(target.url, target.api_key, target.request_timeout_s) as endpoint:
        facts = await endpoint.facts(target.model)
        limits = _limits(target, facts)
        mixes = [fitting_mix(name, limits) for name in MIX_NAMES]
        loads = [(mix, c) for mix in mixes for c in target.concurrencies if c <= limits.max_num_seqs]
        tokens_per_byte = await endpoint.tokens_per_byte(facts.model)
        points = []
        for done, (mix, concurrency) in enumerate(loads):
            on_progress(Progress(done, len(loads), mix.name, concurrency))
            loop = ClosedLoop(endpoint, facts.model, limits.max_num_batched_tokens, mix, concurrency)
            points.append(await loop.point(target.warm_up_s, target.point_s))
        on_progress(Progress(len(loads), len(loads), "", 0))
    step_time, fit = fit_step_time(points)
    return Profile(
        name=target.name,
        model=facts.model,
        gpu=target.gpu,
        gpus_per_replica=target.gpus_per_replica,
        step_time=step_time,
        limits=limits,
        provenance=_provenance(target, facts, fit),
        tokens_per_byte=round(tokens_per_byte, 3),
        fit=fit,
    )


def fitting_mix(name: str, limits: EngineLimits) -> WorkloadMix:
    """The mix at the largest scale 1, ½, ¼ … at which its longest request fits. Raises ``EndpointError``."""
    longest = min(limits.max_model_len, limits.kv_tokens)
    scale = 1.0
    while scale >= _SMALLEST_SCALE:
        mix = load_mix(name, scale)
        if max(s.input_tokens + s.output_tokens for s in mix.shapes) <= longest:
            return mix
        scale /= 2
    raise EndpointError(f"the mix {name} does not fit a context of {longest} tokens, however much it is scaled down")


def _limits(target: MeasureTarget, facts: EndpointFacts) -> EngineLimits:
    if not facts.max_model_len or not facts.kv_tokens:
        missing = "max_model_len in /v1/models" if not facts.max_model_len else "vllm:cache_config_info in /metrics"
        raise EndpointError(f"{target.url} does not report {missing}; point penstock measure at vLLM itself")
    return EngineLimits(
        max_num_seqs=target.max_num_seqs,
        max_num_batched_tokens=target.max_num_batched_tokens,
        kv_tokens=facts.kv_tokens,
        max_model_len=facts.max_model_len,
        block_size=facts.block_size,
    )


def _provenance(target: MeasureTarget, facts: EndpointFacts, fit: Fit) -> Provenance:
    parts = [
        f"penstock measure: {len(fit.points)} closed-loop points of {target.point_s:g} s, mixes {', '.join(MIX_NAMES)}",
        target.hardware,
        f"the linear model misses a point by {fit.residual_max:.0%}" if fit.residual_max > WELL_FITTED else "",
    ]
    return Provenance(
        kind="measured",
        date=datetime.now(UTC).date().isoformat(),
        engine="vLLM",
        engine_version=facts.engine_version,
        dtype=target.dtype,
        parallelism=target.parallelism,
        source="; ".join(filter(None, parts)),
    )
