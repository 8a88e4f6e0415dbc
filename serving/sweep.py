"""One point of a measuring sweep: a steady closed loop, and what was seen of it.

So many workers, each sending its next request when the last is answered. The run warms up, then is watched for a fixed
time; a request counts by the share of its life that lies in that time. Prompts are random token ids, so that their
length is exact and no two share a prefix that a cache could find.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from math import ceil
from random import Random
from time import monotonic

from serving.capacity import RequestShape, WorkloadMix
from serving.endpoint import Answer, Endpoint, EndpointError
from serving.points import MeasuredPoint
from serving.stepsim import percentile

#: A point ends early once it has so many answers.
MOST_REQUESTS = 5000
#: Ids that even a tiny vocabulary has, and that are ordinary tokens: the special ones come first or last.
_TOKEN_IDS = range(300, 800)


class ClosedLoop:
    """One mix at one concurrency, on one served model."""

    def __init__(
        self, endpoint: Endpoint, model: str, max_num_batched_tokens: int, mix: WorkloadMix, concurrency: int
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._max_num_batched_tokens = max_num_batched_tokens
        self._mix = mix
        self._concurrency = concurrency
        self._rng = Random(f"{mix.name}/{concurrency}")  # noqa: S311 - lengths and ids, not secrets
        self._shapes = self._endless_shapes()
        self._answers: list[Answer] = []
        self._failures: list[str] = []
        self._stopping = asyncio.Event()

    async def point(self, warm_up_s: float, watch_s: float) -> MeasuredPoint:
        """Warm up, watch, wait for what is in flight, and sum up. Raises ``EndpointError`` if any request failed."""
        workers = [asyncio.create_task(self._work()) for _ in range(self._concurrency)]
        try:
            await self._until(monotonic() + warm_up_s)
            steps_before, start_s = await self._endpoint.engine_steps(), monotonic()
            await self._until(start_s + watch_s)
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
            if len(self._answers) >= MOST_REQUESTS or len(self._failures) > self._concurrency:
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
        watched = [(answer, share_within(answer, start_s, end_s)) for answer in self._answers]
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
        prefill_steps = ceil(answer.input_tokens / self._max_num_batched_tokens)
        found_running = 1 if self._concurrency > 1 else 0
        return (prefill_steps + answer.output_tokens - 1 + found_running) / self._concurrency


def share_within(answer: Answer, start_s: float, end_s: float) -> float:
    """The share of an answer's life between two moments."""
    within_s = min(answer.finish_s, end_s) - max(answer.start_s, start_s)
    return max(0.0, within_s / (answer.finish_s - answer.start_s))


def _tpot_s(answer: Answer) -> float:
    return (answer.finish_s - answer.first_token_s) / (answer.output_tokens - 1)


def _kv_token_steps(answer: Answer) -> float:
    return answer.output_tokens * (answer.input_tokens + answer.output_tokens / 2)
