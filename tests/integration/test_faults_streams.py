"""Many streams whose clients leave, or whose gateway is killed: nothing stays held, and each is in the ledger once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from ratelimit.gateway.hold import FASTEST_TOKENS_PER_S
from ratelimit.store import Store
from tests.integration.gateway_bench import Bench
from tests.support.books import balance, end_leases, ledger, open_reservations, pool_work_us, twice
from tests.support.callers import ask
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings
from tests.support.slow_replica import SlowReplica
from tests.support.waiting import eventually_async

#: Whole gateways under load, by the second.
pytestmark = pytest.mark.slow

PROMPT_TOKENS = 11
#: A stream lives for about two seconds, if nobody leaves it.
OUTPUT, TOKEN_S = 20, 0.1
#: How many come at once, and how long after the last ones.
AT_ONCE, WAVE_S = 100, 0.2
#: Streams that a killed gateway has open, each far from its end.
KILLED, LONG, LEASE_S = 30, 2_000, 1.0
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")


def stream(path: str = PATHS[0], output: int = OUTPUT) -> dict[str, Any]:
    """A stream's body; its prompt is 11 tokens long on the stand-in replica."""
    told: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 44}], "max_tokens": output}
    if path == "/v1/responses":
        told = {"input": "x" * 44, "max_output_tokens": output}
    elif path == "/v1/completions":
        told = {"prompt": "x" * 44, "max_tokens": output}
    return {"model": MODEL, "stream": True, **told}


@pytest.fixture
async def replica() -> AsyncIterator[SlowReplica]:
    """A replica that says a token every ``TOKEN_S``."""
    async with SlowReplica(TOKEN_S) as made:
        yield made


async def leave(bench: Bench, path: str, after_s: float) -> None:
    """A client of a stream that is gone after so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(after_s):
            await ask(bench.url, bench.secret, stream(path), path)


async def none_running(replica: SlowReplica) -> None:
    """Wait until the replica has nothing to do."""

    async def none() -> bool:
        return replica.running == 0

    await eventually_async(none, 10, "the end of the replica's work")


@pytest.mark.parametrize("streams", [200, 1_000])
async def test_streams_left_at_random_moments(bench: Bench, replica: SlowReplica, streams: int) -> None:
    """Whenever a client leaves, before the first byte or in the middle of any chunk, its work is aborted and its place
    given back; it owes the prompt and what was emitted, in one record; and in the end nothing is held by anybody.
    """
    await bench.publish([replica.url], pool_budget=(1, 1))
    moments = random.Random(11)
    before = balance([bench.gateway], "output")
    async with asyncio.TaskGroup() as tasks:
        for number in range(streams):
            after_s = moments.uniform(0, 1.2 * OUTPUT * TOKEN_S)
            tasks.create_task(leave(bench, PATHS[number % len(PATHS)], after_s))
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(WAVE_S)
    await none_running(replica)
    await bench.idle()
    lines = await ledger(bench.redis)

    assert twice(lines) == []
    assert replica.emitted.keys() <= {line.id for line in lines}
    assert replica.aborted > streams / 2
    unread = [replica.emitted.get(line.id, 0) - line.output_tokens for line in lines]
    assert min(unread) >= 0  # nobody pays for what was not emitted
    assert sum(unread) <= len(lines)  # on average, at most the chunk that was on its way
    for line in lines:
        if line.outcome == "unserved":
            assert (line.id in replica.emitted, line.input_tokens, line.cost_us) == (False, 0, 0)

    served = [line for line in lines if line.outcome != "unserved"]
    assert await bench.used() == {
        "requests": len(served),
        "input_tokens": sum(line.input_tokens for line in lines),
        "output_tokens": sum(line.output_tokens for line in lines),
        "concurrency": 0,
    }
    assert await pool_work_us(bench.redis, bench.published) == sum(line.cost_us for line in lines)
    after = balance([bench.gateway], "output")
    assert after.open == before.open
    assert after.settled - before.settled == sum(line.output_tokens for line in lines)
    assert bench.metric("penstock_open_requests") == 0
    assert "Traceback" not in bench.gateway.log()


async def test_a_killed_gateway_leaves_nothing_held(bench: Bench, replica: SlowReplica) -> None:
    """Its streams stay charged with what was reported and at most what a lease's time may have added, every place in
    flight comes back, each request is in the ledger once, and the gateway beside it serves on.
    """
    await bench.publish([replica.url])
    settings = msgspec.structs.replace(gateway_settings(bench.gateway.settings.redis_url), lease_s=LEASE_S)
    with GatewayProcess(settings) as doomed:
        ended = [ask(doomed.url, bench.secret, stream(PATHS[n % 4], 2), PATHS[n % 4]) for n in range(8)]
        assert {answer.complaint for answer in await asyncio.gather(*ended)} == {""}
        await bench.idle()
        finished = await ledger(bench.redis)
        broken = [
            asyncio.create_task(ask(doomed.url, bench.secret, stream(PATHS[n % 4], LONG), PATHS[n % 4]))
            for n in range(KILLED)
        ]

        async def said() -> bool:
            return len(replica.emitted) == 8 + KILLED and min(replica.emitted.values()) >= 2

        await eventually_async(said, 20, "a beginning of every stream")
        doomed.process.kill()
        doomed.process.wait(10)
        assert {(answer.status, answer.whole) for answer in await asyncio.gather(*broken)} == {(200, False)}
    await none_running(replica)
    emitted = sum(replica.emitted.values()) - 8 * 2
    assert (await bench.used())["concurrency"] == KILLED
    assert await open_reservations(bench.redis) == KILLED

    store = Store(bench.redis, MODEL, timeout_s=5)
    await eventually_async(lambda: reaped(store, bench), 5 * LEASE_S, "the end of the leases")
    used = await bench.used()
    assert used["concurrency"] == 0
    charged = used["output_tokens"] - 8 * 2
    assert emitted <= charged <= emitted + KILLED * LEASE_S * FASTEST_TOKENS_PER_S
    assert charged < KILLED * LONG
    assert await end_leases(bench.redis) == KILLED
    lines = await ledger(bench.redis)
    assert twice(lines) == []
    expired = [line for line in lines if line.outcome == "expired"]
    assert {line.id for line in expired} == replica.emitted.keys() - {line.id for line in finished}
    assert sum(line.output_tokens for line in expired) == charged
    assert sum(line.input_tokens for line in lines) == used["input_tokens"]
    assert await open_reservations(bench.redis) == 0
    assert (await ask(bench.url, bench.secret, stream(output=2))).complaint == ""


async def reaped(store: Store, bench: Bench) -> bool:
    """Reap as the controller does; whether no place in flight is taken any more."""
    await store.reap()
    return (await bench.used())["concurrency"] == 0
