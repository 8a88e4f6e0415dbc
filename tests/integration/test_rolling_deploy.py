"""Old and new gateways side by side on one Redis: each keeps to its own keys, and both to the newest limits."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from ratelimit.publisher import KEYS_KEY, PUBLICATION_KEY
from ratelimit.store import KEY_VERSION
from tests.integration.gateway_bench import Bench
from tests.support.books import end_leases
from tests.support.callers import ask
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings, publication

pytestmark = pytest.mark.slow

#: Longer than any test: what this gateway is not told of, it never finds.
NEVER_S = 3_600.0


def chat(**more: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **more}


async def older_layout(redis: Redis, key: str) -> dict[bytes, tuple[bytes, int]]:
    """What a gateway of the first layout leaves behind, with an expired reservation: its keys as they are stored."""
    cell = f"pn1:{{{MODEL}}}:"
    await redis.set(f"{cell}b:k:{key}:requests", msgspec.msgpack.encode([60_000_000, 1, 60, 10, 1]), px=600_000)
    await redis.hset(f"{cell}reservations", "r1", msgspec.msgpack.encode([0, [1], [1], [], []]))
    await redis.hset(f"{cell}gauges", f"k:{key}:concurrency", msgspec.msgpack.encode([3, 1, 0, 10, 1]))
    await redis.zadd(f"{cell}leases", {"r1": 1})
    await redis.zadd(f"{cell}tombstones", {"r0": 1})
    return await dumped(redis, cell)


async def dumped(redis: Redis, prefix: str) -> dict[bytes, tuple[bytes, int]]:
    """Every key that begins so, whole; and whether it lives for ever (-1) or not (0)."""
    names = [name async for name in redis.scan_iter(prefix + "*")]
    return {name: (await redis.dump(name) or b"", min(0, await redis.ttl(name))) for name in names}


async def test_an_older_gateways_keys_are_left_alone(bench: Bench) -> None:
    """Requests, settlements and the reaping of the new layout neither read nor touch a key of the old one."""
    before = await older_layout(bench.redis, bench.record.id)
    bodies = [chat(stream=bool(number % 2)) for number in range(20)]
    answers = await asyncio.gather(*(ask(bench.url, bench.secret, body) for body in bodies))
    assert {answer.complaint for answer in answers} == {""}
    await bench.idle()
    await end_leases(bench.redis)
    assert (await bench.used())["requests"] == 20
    assert await dumped(bench.redis, f"pn1:{{{MODEL}}}:") == before
    ours = {bytes(name).split(b":")[0].decode() async for name in bench.redis.scan_iter("pn*")}
    assert ours == {"pn1", KEY_VERSION}


async def test_two_epochs_side_by_side_enforce_the_newest(bench: Bench) -> None:
    """A gateway that has not heard of lower limits yet, asked first or last, lets nobody through above them."""
    settings = gateway_settings(bench.gateway.settings.redis_url)
    late_settings = msgspec.structs.replace(settings, poll_interval_s=NEVER_S)
    await bench.publish(requests=(1, 50))
    with GatewayProcess(late_settings) as late:
        await bench.until(lambda: late.epoch() == bench.epoch)
        newer = publication([bench.upstream.url], bench.epoch + 1, requests=(1, 8))
        await bench.redis.hset(KEYS_KEY, bench.record.digest, msgspec.json.encode(bench.record).decode())
        await bench.redis.set(PUBLICATION_KEY, msgspec.json.encode(newer))  # without a word to anybody
        await bench.until(lambda: bench.gateway.epoch() == bench.epoch + 1)
        first = await ask(bench.url, bench.secret, chat())
        by_late = [await ask(late.url, bench.secret, chat()) for _ in range(10)]
        last = await ask(bench.url, bench.secret, chat())
        assert late.epoch() == bench.epoch
    assert first.status == 200
    assert Counter(answer.status for answer in by_late) == {200: 7, 429: 3}
    assert last.status == 429
    assert {answer.complaint for answer in (first, *by_late, last)} == {""}
