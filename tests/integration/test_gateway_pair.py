"""Two gateway processes on one port and one Redis enforce one limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from tests.integration.gateway_bench import Bench
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings
from tests.support.stack import metric

PATH = "/v1/chat/completions"
REQUESTS = 200
OUTPUT = 20
TOKENS, ANSWERED = "penstock_tokens_total", "penstock_requests_total"


@pytest.fixture
async def second(bench: Bench) -> AsyncIterator[GatewayProcess]:
    """A gateway on the data port of the first."""
    settings = gateway_settings(bench.gateway.settings.redis_url)
    shared = msgspec.structs.replace(settings, port=bench.gateway.settings.port)
    with GatewayProcess(shared) as process:
        yield process


async def ask(http: httpx.AsyncClient, index: int) -> int:
    """One request, every other one streamed; the output tokens served, 0 where it was refused."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": OUTPUT, "stream": index % 2}
    answer = await http.post(PATH, json={**body, "stream": bool(index % 2)})
    assert answer.status_code in (200, 429), answer.text
    return OUTPUT if answer.status_code == 200 else 0


async def test_200_requests_at_once_share_one_limit(bench: Bench, second: GatewayProcess) -> None:
    """However they fall on two processes, no more output passes than burst + rate × time, and it all settles."""
    per_minute, burst = 600, 400
    await bench.publish(output_tokens=(per_minute, burst))
    await bench.until(lambda: second.epoch() == bench.epoch)
    limits = httpx.Limits(max_connections=REQUESTS)
    headers = {"authorization": f"Bearer {bench.secret}"}
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=bench.url, headers=headers, limits=limits, timeout=30) as http:
        served = sum(await asyncio.gather(*(ask(http, index) for index in range(REQUESTS))))
    elapsed_s = time.monotonic() - started
    assert burst <= served <= burst + per_minute / 60 * elapsed_s
    await bench.idle()
    exposed = second.metrics()
    output = [bench.metric(TOKENS, kind="output"), metric(exposed, TOKENS, kind="output")]
    assert sum(output) == served
    seen = [bench.metric(ANSWERED, route="chat"), metric(exposed, ANSWERED, route="chat")]
    assert sum(seen) == REQUESTS
    assert min(seen) > 0
