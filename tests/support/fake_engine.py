"""An engine for tests of measuring: an OpenAI endpoint whose batch moves in lockstep, and what it says of itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from queue import Queue
from threading import Thread
from typing import Any

from aiohttp import web


class FakeEngine:
    """Each step lasts longer, the more it carries. Its fields may be set before or while it serves."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.steps = 0
        self.step_s = 1e-3
        self.model_card: dict[str, Any] = {"id": "fake-llama", "max_model_len": 512}
        self.metrics = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="640",other="None"} 1.0\n'
        self.server_info: dict[str, Any] = {}
        self.fingerprint: str | None = "vllm-0.32.0-3a95e869"
        self.status = 200
        self.cached_tokens: int | None = None
        self.last_words: list[dict[str, Any]] | None = None
        self._active = 0
        self._prompt_tokens = 0
        self._stepped = asyncio.Condition()

    async def engine(self) -> None:
        """Step for ever while there is work."""
        while True:
            prompt_tokens, self._prompt_tokens = self._prompt_tokens, 0
            busy_s = self.step_s + 5e-6 * prompt_tokens + 2e-5 * self._active
            await asyncio.sleep(busy_s if self._active else 1e-4)
            async with self._stepped:
                self.steps += bool(self._active)
                self._stepped.notify_all()

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [self.model_card]})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def exposition(self, _: web.Request) -> web.Response:
        gauges = f'vllm:num_requests_running{{engine="0"}} {self._active}\nvllm:num_requests_waiting{{engine="0"}} 0\n'
        return web.Response(text=f"{self.metrics}{gauges}vllm:iteration_tokens_total_count {self.steps}\n")

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response(self.server_info, status=200 if self.server_info else 404)

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
        for chunk in self.last_words if self.last_words is not None else [self._usage(prompt_tokens, body)]:
            await self._send(response, chunk)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self, prompt_tokens: int, body: dict[str, Any]) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": body["max_tokens"]}
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return {"choices": [], "usage": usage, "system_fingerprint": self.fingerprint}

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
        app.router.add_get("/server_info", self.info)
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

    @contextmanager
    def in_thread(self) -> Iterator[str]:
        """Serve from a thread with a loop of its own, for callers that have none; gives its URL."""
        urls: Queue[str] = Queue()
        loop = asyncio.new_event_loop()
        over = asyncio.Event()

        async def serve() -> None:
            async with self.serving() as url:
                urls.put(url)
                await over.wait()

        thread = Thread(target=loop.run_until_complete, args=(serve(),), name="fake engine")
        thread.start()
        try:
            yield urls.get(timeout=10)
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join(10)
            loop.close()
