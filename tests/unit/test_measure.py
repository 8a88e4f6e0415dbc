from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from serving.capacity import EngineLimits
from serving.endpoint import SAMPLE_TEXT, Answer, Endpoint, EndpointError
from serving.measure import WELL_FITTED, MeasureTarget, Progress, fitting_mix, measure
from serving.mixes import MIX_NAMES, load_mix
from serving.profile import dump_profile, parse_profile
from serving.sweep import share_within


class FakeEngine:
    """An OpenAI endpoint whose batch moves in lockstep: each step lasts longer, the more it carries."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.steps = 0
        self.model_card: dict[str, Any] = {"id": "fake-llama", "max_model_len": 512}
        self.metrics = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="640",other="None"} 1.0\n'
        self.status = 200
        self.last_words: list[dict[str, Any]] | None = None
        self._active = 0
        self._prompt_tokens = 0
        self._stepped = asyncio.Condition()

    async def engine(self) -> None:
        """Step for ever while there is work."""
        while True:
            prompt_tokens, self._prompt_tokens = self._prompt_tokens, 0
            await asyncio.sleep(1e-3 + 5e-6 * prompt_tokens + 2e-5 * self._active if self._active else 1e-4)
            async with self._stepped:
                self.steps += bool(self._active)
                self._stepped.notify_all()

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [self.model_card]})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def exposition(self, _: web.Request) -> web.Response:
        return web.Response(text=f"{self.metrics}vllm:iteration_tokens_total_count {self.steps}\n")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "no capacity"}}, status=self.status)
        response = web.StreamResponse()
        await response.prepare(request)
        prompt = body["prompt"]
        prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt) // 4
        self._active += 1
        self._prompt_tokens += prompt_tokens
        try:
            for _ in range(body["max_tokens"]):
                async with self._stepped:
                    await self._stepped.wait()
                await self._send(response, {"choices": [{"index": 0, "text": ""}], "usage": None})
        finally:
            self._active -= 1
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": body["max_tokens"]}
        for chunk in self.last_words if self.last_words is not None else [{"choices": [], "usage": usage}]:
            await self._send(response, chunk)
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Run it on a free port of this machine; gives its URL."""
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/version", self.version)
        app.router.add_get("/metrics", self.exposition)
        app.router.add_post("/v1/completions", self.completions)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine = asyncio.create_task(self.engine())
        try:
            yield str(site.name)
        finally:
            engine.cancel()
            await runner.cleanup()


@pytest.fixture
def engine() -> FakeEngine:
    """A healthy fake."""
    return FakeEngine()


def target(url: str) -> MeasureTarget:
    """A sweep short enough for a test."""
    return MeasureTarget(
        url, "fake", "FAKE", max_num_seqs=8, concurrencies=(1, 4, 64), warm_up_s=0.05, point_s=0.3, request_timeout_s=20
    )


async def test_a_sweep_gives_a_valid_profile_with_its_fit(engine: FakeEngine) -> None:
    """Four mixes at each concurrency that has slots, with progress, and what the engine said of itself."""
    seen: list[Progress] = []
    async with engine.serving() as url:
        profile = await measure(target(url), seen.append)

    assert parse_profile(dump_profile(profile)) == profile
    assert profile.fit is not None
    assert [(p.mix, p.concurrency) for p in profile.fit.points] == [(m, c) for m in MIX_NAMES for c in (1, 4)]
    assert [p.done for p in seen] == list(range(9))
    assert (profile.model, profile.provenance.kind) == ("fake-llama", "measured")
    assert profile.provenance.engine_version == "0.32.0"
    assert profile.limits == EngineLimits(8, 8192, 640 * 16, 512, 16)
    assert profile.tokens_per_byte == pytest.approx(0.25, abs=0.01)
    assert profile.step_time.base_s > 0
    assert ("misses a point" in profile.provenance.source) == (profile.fit.residual_max > WELL_FITTED)


async def test_prompts_are_exact_unique_and_run_to_their_length(engine: FakeEngine) -> None:
    """Token ids, no shared prefix for a cache to find, and no end before max_tokens."""
    async with engine.serving() as url:
        await measure(target(url), lambda _: None)

    prompts = [body["prompt"] for body in engine.bodies if isinstance(body["prompt"], list)]
    long_prompts = [tuple(prompt[:16]) for prompt in prompts if len(prompt) >= 16]
    assert len(set(long_prompts)) == len(long_prompts)
    for body in engine.bodies:
        assert body["min_tokens"] == body["max_tokens"] >= 1
        assert body["ignore_eos"] is True
        assert body["stream_options"] == {"include_usage": True}
    assert engine.bodies[0]["prompt"] == SAMPLE_TEXT


async def test_an_answer_is_counted_by_its_usage(engine: FakeEngine) -> None:
    """Three chunks that carry seven tokens are seven tokens."""
    engine.last_words = [{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}]
    async with engine.serving() as url, Endpoint(url + "/v1/", None, 20) as endpoint:
        answer = await endpoint.complete("fake-llama", [300] * 5, 3)

    assert (answer.input_tokens, answer.output_tokens) == (5, 7)
    assert answer.start_s < answer.first_token_s <= answer.finish_s


async def test_an_endpoint_that_is_away_is_named() -> None:
    """Nothing listens: the message has the URL."""
    with pytest.raises(EndpointError, match=r"cannot reach http://127\.0\.0\.1:9"):
        await measure(target("http://127.0.0.1:9"), lambda _: None)


async def test_no_success_quotes_the_first_refusal(engine: FakeEngine) -> None:
    """The sample text is refused already, so no sweep is started."""
    engine.status = 503
    async with engine.serving() as url:
        with pytest.raises(EndpointError, match=r"answered 503: .*no capacity"):
            await measure(target(url), lambda _: None)


async def test_failures_in_the_sweep_end_it(engine: FakeEngine) -> None:
    """An engine that starts to refuse is not retried for ever, and the point says where it failed."""

    def fail_soon(progress: Progress) -> None:
        engine.status = 500 if progress.done == 1 else 200

    async with engine.serving() as url:
        with pytest.raises(EndpointError, match=r"chat at concurrency 4: \d+ of \d+ requests failed, first: .* 500"):
            await measure(target(url), fail_soon)


@pytest.mark.parametrize(
    ("last_words", "message"),
    [
        ([], "reports no usage in its streams"),
        ([{"error": {"message": "engine died"}}], "failed within an answer: .*engine died"),
        ([{"choices": "none"}], r"streams what is not an OpenAI completion: .* at `\$\.choices`"),
    ],
)
async def test_a_stream_that_cannot_be_counted_is_refused(
    engine: FakeEngine, last_words: list[dict[str, Any]], message: str
) -> None:
    """No usage, an error event in a 200 answer, or another format: never a guess from the chunks."""
    engine.last_words = last_words
    async with engine.serving() as url:
        with pytest.raises(EndpointError, match=message):
            await measure(target(url), lambda _: None)


async def test_what_the_engine_does_not_report_is_asked_for(engine: FakeEngine) -> None:
    """Without a context length or a KV cache there is no profile; another model is not measured by mistake."""
    async with engine.serving() as url:
        with pytest.raises(EndpointError, match="serves fake-llama, not 'gpt'"):
            await measure(msgspec.structs.replace(target(url), model="gpt"), lambda _: None)
        engine.metrics = ""
        with pytest.raises(EndpointError, match="does not report vllm:cache_config_info"):
            await measure(target(url), lambda _: None)
        engine.model_card = {"id": "fake-llama"}
        with pytest.raises(EndpointError, match="does not report max_model_len"):
            await measure(target(url), lambda _: None)


async def test_a_slow_answer_is_given_up(engine: FakeEngine) -> None:
    """Every request has a timeout."""
    async with engine.serving() as url, Endpoint(url, None, 0.1) as endpoint:
        with pytest.raises(EndpointError, match=r"did not finish an answer in 0\.1 s"):
            await endpoint.complete("fake-llama", [300], 100_000)


@pytest.mark.parametrize("name", MIX_NAMES)
@pytest.mark.parametrize("context", [256, 2048, 131_072])
def test_a_mix_is_scaled_to_the_context_and_no_further(name: str, context: int) -> None:
    """The longest request fits, and at twice the scale it would not (or the mix is whole)."""
    mix = fitting_mix(name, EngineLimits(8, 2048, 10**9, context))

    longest = max(s.input_tokens + s.output_tokens for s in mix.shapes)
    assert longest <= context
    assert longest * 2 > context * 0.95 or mix == load_mix(name)


def test_a_context_too_small_for_any_mix_is_refused() -> None:
    """Not an endless loop of halving."""
    with pytest.raises(EndpointError, match="does not fit a context of 4 tokens"):
        fitting_mix("long-context", EngineLimits(8, 2048, 10**9, 4))


@pytest.mark.parametrize(
    ("window", "share"), [((0, 10), 1.0), ((3, 10), 0.5), ((0, 2), 0.25), ((2, 3), 0.25), ((6, 9), 0.0)]
)
def test_an_answer_counts_by_the_share_of_its_life_watched(window: tuple[float, float], share: float) -> None:
    """An answer from 1 to 5 s, seen through several windows."""
    assert share_within(Answer(1.0, 2.0, 5.0, 10, 10), *window) == pytest.approx(share)
