"""The capacity model: how long an engine step takes, and what a request costs.

One step of a continuous-batching server takes, to first order,

    T = c0 + c_p·(uncached prompt tokens) + c_s·(sequences) + c_k·(KV tokens read)

c0 streams the weights once, c_p is arithmetic, c_s is per-sequence overhead and c_k reads the KV cache. Summed over
the steps of one request of I input tokens (C of them cached) and O output tokens, the part that grows with load is

    w = c_p·(I − C) + c_s·O + c_k·O·(I + O/2)          replica-seconds of *work*

and work adds up over requests: at λ requests a second the mean step time is T = c0 / (1 − λ·E[w]).

The closed forms here are means. SLOs are percentiles, so the supply of a replica is the knee of ``stepsim``; these
forms are its upper bounds, and the shares by which unlike GPUs and unlike requests are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import fsum, inf

import msgspec

#: Share of the KV cache that a replica fills before block fragmentation and preemption set in.
USABLE_KV_SHARE = 0.85


class InfeasibleSloError(ValueError):
    """No load, however small, meets this SLO on this replica."""


class StepTimeModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The four coefficients of a step's duration, all in seconds."""

    base_s: float
    prompt_token_s: float
    sequence_s: float
    kv_token_s: float

    def step_s(self, prompt_tokens: float, sequences: float, kv_tokens: float) -> float:
        """Duration of one step that prefills, decodes and reads this much."""
        return (
            self.base_s
            + self.prompt_token_s * prompt_tokens
            + self.sequence_s * sequences
            + self.kv_token_s * kv_tokens
        )

    def slowed(self, factor: float) -> StepTimeModel:
        """The same device with its clock running ``factor`` times slower."""
        return StepTimeModel(
            self.base_s * factor, self.prompt_token_s * factor, self.sequence_s * factor, self.kv_token_s * factor
        )


class EngineLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What bounds one replica's batch: scheduler slots, tokens a step, KV-cache tokens, context length."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int
    max_model_len: int
    block_size: int = 16

    @property
    def request_kv_blocks(self) -> int:
        """Blocks of the KV cache that requests can hold: of all that there are, vLLM keeps one (its null block)."""
        return self.kv_tokens // self.block_size - 1


class Slo(msgspec.Struct, frozen=True, cache_hash=True, forbid_unknown_fields=True):
    """Time to first token and time per output token, each met by ``percentile`` percent of requests.

    Raises ``ValueError`` for bounds that no time can be held against.
    """

    ttft_s: float
    tpot_s: float
    percentile: float = 95.0

    def __post_init__(self) -> None:
        for name, bound_s in (("TTFT", self.ttft_s), ("TPOT", self.tpot_s)):
            if not 0 < bound_s < inf:
                raise ValueError(f"the {name} bound of an SLO is {bound_s}, it must be a positive number of seconds")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"the percentile of an SLO is {self.percentile}, it must be above 0 and at most 100")

    def slowed(self, factor: float) -> Slo:
        """The bound that means the same on a device slowed by ``factor``."""
        return Slo(self.ttft_s * factor, self.tpot_s * factor, self.percentile)


class RequestShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token counts of one request; ``cached_tokens`` of the input are found in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0


class WorkloadMix(msgspec.Struct, frozen=True, cache_hash=True, dict=True):
    """A named sample of request shapes, each equally likely. Raises ``ValueError`` for an empty sample."""

    name: str
    shapes: tuple[RequestShape, ...]

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError(f"the mix {self.name!r} is empty; give it at least one request shape")
        for shape in self.shapes:
            if shape.output_tokens < 0 or not 0 <= shape.cached_tokens <= shape.input_tokens:
                raise ValueError(
                    f"the mix {self.name!r} holds {shape}; counts are positive, cached tokens are of the input"
                )

    @cached_property
    def mean_input_tokens(self) -> float:
        """Mean uncached input tokens per request."""
        return fsum(s.input_tokens - s.cached_tokens for s in self.shapes) / len(self.shapes)

    @cached_property
    def mean_output_tokens(self) -> float:
        """Mean output tokens per request."""
        return fsum(s.output_tokens for s in self.shapes) / len(self.shapes)


class ReplicaGroup(msgspec.Struct, frozen=True, cache_hash=True):
    """``count`` identical replicas, with the SLO they are held to (both already slowed, if the device is)."""

    count: int
    step_time: StepTimeModel
    limits: EngineLimits
    slo: Slo


def longest_step_s(step_time: StepTimeModel, limits: EngineLimits) -> float:
    """Duration of a step in which everything is full: its tokens, its slots and the KV cache."""
    return step_time.step_s(limits.max_num_batched_tokens, limits.max_num_seqs, limits.kv_tokens)


def work_s(step_time: StepTimeModel, shape: RequestShape) -> float:
    """Replica-seconds by which one request lengthens the steps it takes part in."""
    inputs, outputs = shape.input_tokens, shape.output_tokens
    return (
        step_time.prompt_token_s * (inputs - shape.cached_tokens)
        + step_time.sequence_s * outputs
        + step_time.kv_token_s * outputs * (inputs + outputs / 2)
    )


def mean_work_s(step_time: StepTimeModel, mix: WorkloadMix) -> float:
    """E[w] over the mix; never w of the mean lengths, which overstates capacity."""
    return fsum(work_s(step_time, shape) for shape in mix.shapes) / len(mix.shapes)


def resource_bounds_s(group: ReplicaGroup, shape: RequestShape) -> tuple[float, float, float, float]:
    """Replica-seconds one request takes by each of four resources, as if that one alone were scarce.

    In order: the TPOT budget, the scheduler's slots, the KV cache, the tokens of a step. Raises
    ``InfeasibleSloError`` where even an empty step exceeds the TPOT bound.
    """
    step_time, limits, tpot_s = group.step_time, group.limits, group.slo.tpot_s
    if step_time.base_s >= tpot_s:
        raise InfeasibleSloError(f"an empty step takes {step_time.base_s:.4g} s, the TPOT bound is {tpot_s:.4g} s")
    work = work_s(step_time, shape)
    base, outputs = step_time.base_s, shape.output_tokens
    kv_token_steps = outputs * (shape.input_tokens + outputs / 2)
    step_tokens = shape.input_tokens - shape.cached_tokens + outputs
    return (
        work / (1 - base / tpot_s),
        work + base * outputs / limits.max_num_seqs,
        work + base * kv_token_steps / (USABLE_KV_SHARE * limits.kv_tokens),
        work + base * step_tokens / limits.max_num_batched_tokens,
    )


def replica_seconds(group: ReplicaGroup, shape: RequestShape) -> float:
    """The share u of a replica-second that one request takes of this kind of replica under its SLO.

    The largest of its ``resource_bounds_s``, and raises as they do.
    """
    return max(resource_bounds_s(group, shape))


def replica_share(group: ReplicaGroup, shape: RequestShape) -> tuple[float, float]:
    """The u of a request, and the part of what a replica may hold at once under its SLO that it takes while it runs.

    Where such requests alone come at 1/u a second, steps last T = c0 / (1 − w/u), and each stays for O and those that
    its prompt fills: 1/u times that is what the replica holds, by Little's law. The part is 0 where steps take no time
    of their own. Raises as ``resource_bounds_s`` does.
    """
    step_time, limits = group.step_time, group.limits
    bounds = resource_bounds_s(group, shape)
    seconds, work = max(bounds), bounds[0] * (1 - step_time.base_s / group.slo.tpot_s)
    steps = shape.output_tokens + (shape.input_tokens - shape.cached_tokens) / limits.max_num_batched_tokens
    empty_s = step_time.base_s * steps
    return seconds, (seconds - work) / empty_s if empty_s else 0.0


def closed_form_requests_per_s(group: ReplicaGroup, mix: WorkloadMix) -> float:
    """An upper bound on the rate at which one replica of the group serves the mix under its SLO.

    Each resource is shared by all requests, so its bound is taken over the mix before the scarcest is chosen; the mean
    of ``replica_seconds`` would charge every request by the resource that it alone is shortest of.
    """
    bounds = [resource_bounds_s(group, shape) for shape in mix.shapes]
    return len(bounds) / max(map(fsum, zip(*bounds, strict=True)))


def mean_replica_seconds(group: ReplicaGroup, mix: WorkloadMix) -> float:
    """E[u] over the mix."""
    return fsum(replica_seconds(group, shape) for shape in mix.shapes) / len(mix.shapes)


def merged_groups(groups: Iterable[ReplicaGroup]) -> tuple[ReplicaGroup, ...]:
    """The same fleet with identical groups counted together, so that a cost takes one term per kind of replica."""
    counts: Counter[ReplicaGroup] = Counter()
    for group in groups:
        counts[msgspec.structs.replace(group, count=1)] += group.count
    return tuple(msgspec.structs.replace(kind, count=count) for kind, count in counts.items())


def fleet_cost_s(groups: Sequence[ReplicaGroup], shape: RequestShape) -> float:
    """Replica-seconds that a request is charged against a mixed fleet, whichever replica serves it.

    N / Σ_g(n_g / u_g): the fleet's N replica-seconds a second divided by the rate at which it could serve this
    shape alone. In a fleet of one kind it is that kind's u. Raises ``ValueError`` for an empty fleet.
    """
    count = sum(group.count for group in groups)
    if count == 0:
        raise ValueError("an empty fleet serves nothing, so a request has no cost on it")
    return count / fsum(group.count / replica_seconds(group, shape) for group in groups)
