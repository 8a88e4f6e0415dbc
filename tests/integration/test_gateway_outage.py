"""Redis stops under a gateway's feet: who is served meanwhile, and that the books balance afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis

from ratelimit.gateway.hold import Usage
from ratelimit.store import KEY_VERSION
from ratelimit.usage import UsageRecord
from tests.integration.gateway_bench import Bench
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings, make_key
from tests.support.stack import metric

#: Whole gateways under load, by the second.
pytestmark = pytest.mark.slow

PATH = "/v1/chat/completions"
PROMPT_TOKENS = 11


def chat(**more: Any) -> dict[str, Any]:
    """A chat request's body; its prompt is 11 tokens long on the stand-in replica."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": 8, **more}


@pytest.fixture
async def own(redis_url: str, redis_client: Redis) -> AsyncIterator[Bench]:
    """A gateway of the test's own, which gives Redis half a second."""
    settings = msgspec.structs.replace(gateway_settings(redis_url), store_timeout_s=0.5)
    with GatewayProcess(settings) as gateway:
        async with FakeUpstream() as upstream:
            made = Bench(gateway, redis_client, upstream, epoch=0)
            await made.publish()
            await made.until(lambda: gateways(made) >= 1)
            yield made


def gateways(bench: Bench) -> int:
    """How many gateways this one counts, itself among them."""
    return int(metric(bench.gateway.metrics(), "penstock_gateways"))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def redis_pid(redis: Redis) -> int:
    """The server's process id."""
    return int((await redis.info("server"))["process_id"])


async def records(redis: Redis) -> list[UsageRecord]:
    """All usage records of the test's cell."""
    entries: Any = await redis.xrange(f"{KEY_VERSION}:{{{MODEL}}}:usage")
    return [msgspec.json.decode(fields[b"record"], type=UsageRecord) for _, fields in entries]


async def test_redis_stopped_under_load(own: Bench) -> None:
    """Assured callers are served within the safe share, best effort is told to come back, no request waits for Redis
    twice, streams go on; and when Redis is back all that was served is charged, exactly once.
    """
    secret, free = make_key(tier="free")
    best_effort = msgspec.structs.replace(own.published.tiers[0], tier="free", assured=False)
    await own.republish(free, tiers=(*own.published.tiers, best_effort))
    pid = await redis_pid(own.redis)
    statuses: Counter[int] = Counter()
    own.upstream.gate.clear()
    async with own.http() as http, http.stream("POST", PATH, json=chat(stream=True)) as running:
        lines = running.aiter_lines()
        await anext(lines)
        with stopped(pid):
            own.upstream.gate.set()
            assert [line async for line in lines][-2] == "data: [DONE]"
            for stream in (False, True) * 5:
                statuses[(await http.post(PATH, json=chat(stream=stream))).status_code] += 1
            bearer = {"authorization": f"Bearer {secret}"}
            refused = await http.post(PATH, json=chat(), headers=bearer)
        assert statuses == {200: 10}
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        await own.until(lambda: not own.metric("penstock_store_away"))
        assert (await http.post(PATH, json=chat())).status_code == 200
        assert (await http.post(PATH, json=chat(), headers=bearer)).status_code in (200, 503)
    await own.until(lambda: own.metric("penstock_held_tokens_total", kind="output", tier="pro") == 12 * 8)
    await own.until(lambda: own.metric("penstock_settled_tokens_total", kind="output", tier="pro") == 12 * 8)

    async def told() -> bool:
        return len([r for r in await records(own.redis) if r.tier == "pro"]) == 12

    async with asyncio.timeout(10):
        while not await told():  # noqa: ASYNC110 - it happens in the gateway
            await asyncio.sleep(0.02)
    await own.settled(Usage(12 * PROMPT_TOKENS, 12 * 8), requests=12)
    found = [record for record in await records(own.redis) if record.tier == "pro"]
    assert len({record.id for record in found}) == 12
    assert sum(record.marks == ("local",) for record in found) == 10
    assert own.metric("penstock_outages_total", cell=MODEL) == 1
    lines_told = [line for line in own.gateway.log().splitlines() if "for tiny" in line]
    assert len(lines_told) == 2


async def test_the_local_share_is_a_bound(own: Bench) -> None:
    """A gateway's part of four fifths of a burst is served; what is beyond is the fleet's fault, not the caller's."""
    await own.publish(requests=(1, 20))
    share = 16 // gateways(own)
    with stopped(await redis_pid(own.redis)):
        async with own.http() as http:
            answers = [await http.post(PATH, json=chat()) for _ in range(20)]
    assert Counter(answer.status_code for answer in answers) == {200: share, 503: 20 - share}
    assert "rate limiter" in answers[-1].json()["error"]["message"]
    assert int(answers[-1].headers["retry-after"]) >= 1
    await own.until(lambda: not own.metric("penstock_store_away"))

    async def paid() -> bool:
        return (await own.used())["requests"] == share

    async with asyncio.timeout(10):
        while not await paid():  # noqa: ASYNC110 - it happens in the gateway
            await asyncio.sleep(0.02)


async def test_a_killed_gateways_reservations_end_with_their_leases(redis_url: str, own: Bench) -> None:
    """What a stream had used, and may have used since it said so, stays charged; no place in flight stays taken."""
    settings = msgspec.structs.replace(gateway_settings(redis_url), lease_s=1.0)
    own.upstream.gate.clear()

    async def corrected() -> bool:
        return (await own.used())["input_tokens"] == PROMPT_TOKENS

    headers = {"authorization": f"Bearer {own.secret}"}
    with GatewayProcess(settings) as doomed:
        await own.until(lambda: httpx.get(doomed.admin_url + "/health", timeout=5).status_code == 200)
        async with (
            httpx.AsyncClient(base_url=doomed.url, headers=headers, timeout=20) as http,
            http.stream("POST", PATH, json=chat(stream=True, max_tokens=1_000)) as response,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            await _until(corrected)
            doomed.process.kill()
            doomed.process.wait(10)
            with pytest.raises(httpx.TransportError):
                [line async for line in lines]
    own.upstream.gate.set()

    async def ended() -> bool:
        async with own.http() as http:
            await http.post(PATH, json=chat())
        used = await own.used()
        return used["concurrency"] == 0

    async def books_agree() -> bool:
        served = own.metric("penstock_settled_tokens_total", kind="output") / 8
        used = await own.used()
        left = used["output_tokens"] - 8 * served
        return 200 <= left <= 200 + 16 and used["input_tokens"] == PROMPT_TOKENS * (1 + served)

    await _until(ended)
    await _until(books_agree)


async def _until(probe: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(15):
        while not await probe():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.1)
