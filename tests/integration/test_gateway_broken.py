"""A gateway whose background work ends by a fault ends too, in order, for its supervisor to start it again."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from ratelimit.gateway.ledger import Ledger
from ratelimit.gateway.server import GatewayBrokenError, serve_gateway
from ratelimit.usagedrain import usage_stream
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import MODEL, gateway_settings, make_key, publication, publish
from tests.support.waiting import eventually_async


async def test_it_lets_open_streams_finish_and_settles_them(
    redis_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One critical line and an error that makes the exit status 1, after the stream under way has ended and settled."""
    fault = asyncio.Event()

    async def sweep(_: Ledger) -> None:
        await fault.wait()
        raise LookupError("an odd thing")

    monkeypatch.setattr(Ledger, "sweep", sweep)
    await redis_client.delete(usage_stream(MODEL))
    secret, record = make_key()
    settings = gateway_settings(redis_url)
    async with FakeUpstream() as upstream:
        upstream.gate.clear()
        await publish(redis_client, publication([upstream.url]), record)
        serving = asyncio.create_task(serve_gateway(settings))
        base = f"http://{settings.host}:{settings.port}"
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {secret}"}, timeout=20, base_url=base) as http:

            async def is_up() -> bool:
                try:
                    return (await http.get("/health")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually_async(is_up, 20, "the gateway's start")
            body: dict[str, Any] = {
                "model": MODEL,
                "messages": [{"role": "user", "content": "x" * 44}],
                "max_tokens": 8,
                "stream": True,
            }
            async with http.stream("POST", "/v1/chat/completions", json=body) as running:
                lines = running.aiter_lines()
                await anext(lines)
                fault.set()

                async def is_told() -> bool:
                    return any(told.levelno == logging.CRITICAL for told in caplog.records)

                await eventually_async(is_told, 20, "the line in the log")
                upstream.gate.set()
                assert [line async for line in lines][-2] == "data: [DONE]"
        with pytest.raises(GatewayBrokenError):
            async with asyncio.timeout(20):
                await serving
    critical = [told for told in caplog.records if told.levelno == logging.CRITICAL]
    assert len(critical) == 1
    assert "an odd thing" in caplog.text
    assert await redis_client.xlen(usage_stream(MODEL)) == 1
