"""The two servers that the files in ``tests/data`` were measured on; stop them with Ctrl-C.

python -m tests.support.benchservers virtual 28471 FOLDER     a virtual H100 slowed five times; its files are in FOLDER
python -m tests.support.benchservers failing 28473 5          answers 5 completions, and 500 to all others
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from aiohttp import web

from serving.engine.launch import EngineSpec, start_engines
from serving.profile import load_profile

HOST = "127.0.0.1"
SLOWDOWN = 5.0
_TOKENS = 16


async def virtual(port: int, folder: Path) -> None:
    """Serve until cancelled."""
    profile = load_profile("h100-llama-3.1-8b")
    (engine,) = await start_engines([EngineSpec("virtual", "tiny", port, profile=profile, slowdown=SLOWDOWN)], folder)
    print(f"{engine.url} is ready; its tokenizer is in {folder / 'models'}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await engine.stop()


class Failing:
    """An endpoint that streams a few good answers first."""

    def __init__(self, good: int) -> None:
        self._left = good

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        return app

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        if self._left == 0:
            return web.json_response({"error": {"message": "no"}}, status=500)
        self._left -= 1
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(_TOKENS):
            choice = {"index": 0, "text": " the", "finish_reason": "length" if number == _TOKENS - 1 else None}
            await _send(response, choices=[choice])
            await asyncio.sleep(0.01)
        usage = {"prompt_tokens": 64, "completion_tokens": _TOKENS, "total_tokens": 64 + _TOKENS}
        await _send(response, choices=[], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, **fields: object) -> None:
    event = {"id": "c", "object": "text_completion", "model": "tiny", **fields}
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


if __name__ == "__main__":
    kind, port, last = sys.argv[1:]
    if kind == "failing":
        web.run_app(Failing(int(last)).app(), host=HOST, port=int(port))
    else:
        asyncio.run(virtual(int(port), Path(last)))
