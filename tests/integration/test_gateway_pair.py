"""Two gateway processes on one port and one Redis enforce one limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from ratelimit.gateway.hold import Usage
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


async def ask(http: httpx.AsyncClient, index: int) -> bool:
    """One request, every other one streamed; whether it was served."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": OUTPUT}
    answer = await http.post(PATH, json={**body, "stream": bool(index % 2)})
    assert answer.status_code in (200, 429), answer.text
    return answer.status_code == 200


async def served_at_once(bench: Bench) -> int:
    """How many of all the requests at once are served."""
    limits = httpx.Limits(max_connections=REQUESTS)
    headers = {"authorization": f"Bearer {bench.secret}"}
    async with httpx.AsyncClient(base_url=bench.url, headers=headers, limits=limits, timeout=30) as http:
        return sum(await asyncio.gather(*(ask(http, index) for index in range(REQUESTS))))


def counted(bench: Bench, second: GatewayProcess, name: str, **labels: str) -> list[float]:
    """By how much a metric has grown in this test, on each gateway."""
    return [bench.metric(name, **labels), metric(second.metrics(), name, **labels)]


async def test_200_requests_at_once_share_one_limit(bench: Bench, second: GatewayProcess) -> None:
    """However they fall on two processes, no more output passes than burst + rate × time, and it all settles."""
    per_minute, burst = 600, 400
    await bench.publish(output_tokens=(per_minute, burst))
    await bench.until(lambda: second.epoch() == bench.epoch)
    started = time.monotonic()
    output = OUTPUT * await served_at_once(bench)
    elapsed_s = time.monotonic() - started
    assert burst <= output <= burst + per_minute / 60 * elapsed_s
    await bench.idle()
    assert sum(counted(bench, second, TOKENS, kind="output")) == output
    seen = counted(bench, second, ANSWERED, route="chat")
    assert sum(seen) == REQUESTS
    assert min(seen) > 0


async def test_answers_that_stop_early_give_back_what_they_held(bench: Bench, second: GatewayProcess) -> None:
    """What two processes charge in the end is what the replica reported, whoever held what in between."""
    bench.upstream.ends_after = 5
    await bench.publish(output_tokens=(1, 400))
    await bench.until(lambda: second.epoch() == bench.epoch)
    served = await served_at_once(bench)
    assert served == len(bench.upstream.bodies)
    assert served >= 400 // OUTPUT
    await bench.settled(Usage(served, 5 * served), requests=served)  # a prompt is 1 token
    assert sum(counted(bench, second, TOKENS, kind="input")) == served
    assert sum(counted(bench, second, TOKENS, kind="output")) == 5 * served
