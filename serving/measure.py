"""``penstock measure``: drive a live endpoint through one fixed sweep and write down what it can do.

Four mixes, each at several concurrencies, in a closed loop: so many workers, each sending its next request when the
last is answered. A run warms up, then is watched for a fixed time; a request counts by the share of its life that lies
in that time. Prompts are random token ids, so that their length is exact and no two share a prefix that a cache could
find. Lengths are scaled down, mix by mix, to what the model's context can hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from math import ceil
from random import Random
from time import monotonic
from typing import NamedTuple

import msgspec

from serving.capacity import EngineLimits, RequestShape, WorkloadMix
from serving.endpoint import Answer, Endpoint, EndpointError, EndpointFacts
from serving.fit import fit_step_time
from serving.mixes import MIX_NAMES, load_mix
from serving.profile import MeasuredPoint, Profile, Provenance
from serving.stepsim import percentile

#: Ids that even a tiny vocabulary has, and that are ordinary tokens: the special ones come first or last.
_TOKEN_IDS = range(300, 800)
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
    max_requests_per_point: int = 5000
    request_timeout_s: float = 120.0
    seed: int = 0


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
            points.append(await _Run(endpoint, facts.model, target, limits, mix, concurrency).point())
        on_progress(Progress(len(loads), len(loads), "", 0))
    step_time, fit = fit_step_time(points)
    return Profile(
        name=target.name,
        model=facts.model,
        gpu=target.gpu,
        gpus_per_replica=target.gpus_per_replica,
        step_time=step_time,
        limits=limits,
        provenance=_provenance(target, facts, len(points)),
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


def _provenance(target: MeasureTarget, facts: EndpointFacts, points: int) -> Provenance:
    return Provenance(
        kind="measured",
        date=datetime.now(UTC).date().isoformat(),
        engine="vLLM",
        engine_version=facts.engine_version,
        dtype=target.dtype,
        parallelism=target.parallelism,
        source=(
            f"penstock measure: {points} closed-loop points of {target.point_s:g} s, "
            f"mixes {', '.join(MIX_NAMES)}{'; ' + target.hardware if target.hardware else ''}"
        ),
    )


class _Run:
    """One point of the sweep: one mix at one concurrency."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        target: MeasureTarget,
        limits: EngineLimits,
        mix: WorkloadMix,
        concurrency: int,
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._target = target
        self._limits = limits
        self._mix = mix
        self._concurrency = concurrency
        self._rng = Random(f"{target.seed}/{mix.name}/{concurrency}")  # noqa: S311 - lengths and ids, not secrets
        self._shapes = self._endless_shapes()
        self._answers: list[Answer] = []
        self._failures: list[str] = []
        self._stopping = asyncio.Event()

    async def point(self) -> MeasuredPoint:
        """Warm up, watch, wait for what is in flight, and sum up. Raises ``EndpointError`` if nothing succeeded."""
        workers = [asyncio.create_task(self._work()) for _ in range(self._concurrency)]
        try:
            await self._until(monotonic() + self._target.warm_up_s)
            steps_before, start_s = await self._endpoint.engine_steps(), monotonic()
            await self._until(start_s + self._target.point_s)
            steps_after, end_s = await self._endpoint.engine_steps(), monotonic()
            self._stopping.set()
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        counted = None if steps_before is None or steps_after is None else steps_after - steps_before
        return self._summary(start_s, end_s, counted)

    async def _until(self, time_s: float) -> None:
        """Wait until then, or until the run has stopped by itself."""
        try:
            async with asyncio.timeout(max(0.0, time_s - monotonic())):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _work(self) -> None:
        while not self._stopping.is_set():
            shape = next(self._shapes)
            prompt = self._rng.choices(_TOKEN_IDS, k=shape.input_tokens)
            try:
                self._answers.append(await self._endpoint.complete(self._model, prompt, shape.output_tokens))
            except EndpointError as error:
                self._failures.append(str(error))
            if len(self._answers) >= self._target.max_requests_per_point or len(self._failures) > self._concurrency:
                self._stopping.set()

    def _endless_shapes(self) -> Iterator[RequestShape]:
        while True:
            yield from self._rng.sample(self._mix.shapes, len(self._mix.shapes))

    def _summary(self, start_s: float, end_s: float, counted_steps: float | None) -> MeasuredPoint:
        where = f"{self._mix.name} at concurrency {self._concurrency}"
        if self._failures:
            raise EndpointError(
                f"{where}: {len(self._failures)} of {len(self._failures) + len(self._answers)} requests failed, "
                f"first: {self._failures[0]}"
            )
        watched = [(answer, _share_within(answer, start_s, end_s)) for answer in self._answers]
        watched = [(answer, share) for answer, share in watched if share > 0]
        if not watched:
            raise EndpointError(f"{where}: no answer was under way in the {end_s - start_s:.3g} s watched")
        ttfts = [answer.first_token_s - answer.start_s for answer, _ in watched]
        tpots = [_tpot_s(answer) for answer, _ in watched if answer.output_tokens > 1]
        steps = counted_steps or sum(share * self._resident_steps(answer) for answer, share in watched)
        return MeasuredPoint(
            mix=self._mix.name,
            concurrency=self._concurrency,
            duration_s=round(end_s - start_s, 3),
            requests=len(watched),
            input_tokens=round(sum(share * answer.input_tokens for answer, share in watched)),
            output_tokens=round(sum(share * answer.output_tokens for answer, share in watched)),
            steps=round(steps, 1),
            kv_token_steps=round(sum(share * _kv_token_steps(answer) for answer, share in watched)),
            ttft_p50_s=round(percentile(ttfts, 50), 5),
            ttft_p95_s=round(percentile(ttfts, 95), 5),
            tpot_p50_s=round(percentile(tpots, 50), 6),
            tpot_p95_s=round(percentile(tpots, 95), 6),
        )

    def _resident_steps(self, answer: Answer) -> float:
        """Engine steps to which one answer contributes 1/concurrency each, where the engine does not count them.

        Its prefill steps, a decode step for each later token, and, beside others, the step it found running.
        """
        prefill_steps = ceil(answer.input_tokens / self._limits.max_num_batched_tokens)
        found_running = 1 if self._concurrency > 1 else 0
        return (prefill_steps + answer.output_tokens - 1 + found_running) / self._concurrency


def _share_within(answer: Answer, start_s: float, end_s: float) -> float:
    """The share of an answer's life between two moments."""
    within_s = min(answer.finish_s, end_s) - max(answer.start_s, start_s)
    return max(0.0, within_s / (answer.finish_s - answer.start_s))


def _tpot_s(answer: Answer) -> float:
    return (answer.finish_s - answer.first_token_s) / (answer.output_tokens - 1)


def _kv_token_steps(answer: Answer) -> float:
    return answer.output_tokens * (answer.input_tokens + answer.output_tokens / 2)
