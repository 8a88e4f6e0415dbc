"""Gateways restarted one after the other under load, behind a balancer that goes by their readiness."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from random import Random
from typing import Any, Literal

import httpx
import openai
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from ratelimit.gateway.settings import GatewaySettings, new_gateway_id
from ratelimit.store import KEY_VERSION
from tests.support.balancer import Balancer
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings, make_key, publication, publish
from tests.support.slow_replica import SlowReplica
from tests.support.stack import metric
from tests.support.waiting import eventually_async

GATEWAYS = 3
LONG_S = 30.0
TOKEN_S = 0.02
#: Longer than a balancer takes to hear that a gateway leaves.
DELAY_S = 1.0
PROBE_EVERY_S = 0.2
CALLERS = 24
MOST_TOKENS = 60

Kind = Literal["stream", "whole"]


class Fleet:
    """Gateways on one Redis, each of which can be replaced by a new process at its addresses."""

    def __init__(self, running: ExitStack, settings: Iterable[GatewaySettings]) -> None:
        self._running = running
        self.gateways = [running.enter_context(GatewayProcess(each)) for each in settings]

    async def replace(self, index: int) -> GatewayProcess:
        """SIGTERM to one, wait for its end, and start another in its place; gives the one that has ended."""
        old = self.gateways[index]
        status = await asyncio.to_thread(old.stop)
        assert status == 0, old.log()
        new = GatewayProcess(replace(old.settings, gateway_id=new_gateway_id()))
        self.gateways[index] = await asyncio.to_thread(self._running.enter_context, new)
        return old


@contextmanager
def fleet_of(redis_url: str, size: int, **changes: Any) -> Iterator[Fleet]:
    """So many gateways, which end with the block."""
    with ExitStack() as running:
        # One after the other: each takes ports that are free when it starts.
        yield Fleet(running, (replace(gateway_settings(redis_url), **changes) for _ in range(size)))


class Load:
    """Callers with the official client, which never retries here: what fails is seen."""

    def __init__(self, url: str, secret: str) -> None:
        self.done: Counter[Kind] = Counter()
        self.failures: list[str] = []
        self.tokens = 0
        self.over = asyncio.Event()
        self._clients = [
            openai.AsyncOpenAI(base_url=url + "/v1", api_key=secret, max_retries=0, timeout=LONG_S) for _ in range(3)
        ]

    async def run(self) -> None:
        """Ask until it is over; what was begun is finished."""
        async with asyncio.TaskGroup() as callers:
            for number in range(CALLERS):
                callers.create_task(self._caller(self._clients[number % 3], Random(number)))
        for client in self._clients:
            await client.close()

    async def _caller(self, client: openai.AsyncOpenAI, chance: Random) -> None:
        for number in count():
            if self.over.is_set():
                return
            kind: Kind = "stream" if number % 3 else "whole"
            tokens = chance.randint(1, MOST_TOKENS)
            try:
                said = await self._ask(client, kind, tokens)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.failures.append(f"{kind} of {tokens}: {error!r} from {error.__cause__!r}")
            else:
                if said != tokens:
                    self.failures.append(f"{kind}: {said} of {tokens} tokens")
                self.done[kind] += 1
                self.tokens += tokens
            await asyncio.sleep(chance.random() * 0.1)

    @staticmethod
    async def _ask(client: openai.AsyncOpenAI, kind: Kind, tokens: int) -> int:
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens}
        if kind == "whole":
            whole = await client.chat.completions.create(**asked)
            return whole.usage.completion_tokens if whole.usage and whole.choices[0].finish_reason else 0
        said, finished = 0, False
        async with await client.chat.completions.create(**asked, stream=True) as stream:
            async for chunk in stream:
                said += bool(chunk.choices[0].delta.content)
                finished = finished or chunk.choices[0].finish_reason is not None
        return said if finished else 0


async def none_open(redis: Redis) -> bool:
    """Whether every reservation is settled."""
    return await redis.zcard(f"{KEY_VERSION}:{{{MODEL}}}:leases") == 0


async def charged(url: str, secret: str) -> dict[str, float]:
    """What a key has used; exact under the slow rates of the tests' publications."""
    async with httpx.AsyncClient(timeout=LONG_S) as http:
        answer = await http.get(url + "/v1/limits", headers={"authorization": f"Bearer {secret}"})
    return {limit["name"]: limit["burst"] - limit["remaining"] for limit in answer.json()["limits"]}


@pytest.fixture
async def replica() -> AsyncIterator[SlowReplica]:
    """One that sends a token at each beat."""
    async with SlowReplica(TOKEN_S) as slow:
        yield slow


@pytest.mark.slow
async def test_a_rolling_restart_loses_nothing(redis_url: str, redis_client: Redis, replica: SlowReplica) -> None:
    """Streams and whole answers through all three restarts: none fails, and each is charged once, to the token."""
    secret, record = make_key()
    await publish(redis_client, publication([replica.url]), record)
    with fleet_of(redis_url, GATEWAYS, drain_s=10.0, drain_delay_s=DELAY_S) as fleet:
        async with Balancer(PROBE_EVERY_S) as balancer:

            async def all_ready() -> bool:
                return len(balancer.ready) == GATEWAYS

            balancer.follow(fleet.gateways)
            await eventually_async(all_ready, LONG_S, "readiness")
            load = Load(balancer.url, secret)
            async with asyncio.TaskGroup() as callers:
                callers.create_task(load.run())
                for index in range(GATEWAYS):
                    await fleet.replace(index)
                    balancer.follow(fleet.gateways)
                    await eventually_async(all_ready, LONG_S, "readiness of all again")
                load.over.set()
        assert load.failures == []
        assert balancer.refused == 0
        assert min(load.done["stream"], load.done["whole"]) > CALLERS
        await eventually_async(lambda: none_open(redis_client), LONG_S, "the settlement of all")
        used = await charged(fleet.gateways[0].url, secret)
    assert (used["requests"], used["output_tokens"]) == (load.done.total(), load.tokens)
    assert used["concurrency"] == 0


@pytest.mark.slow
async def test_what_outlasts_the_drain_is_told_and_settled(
    redis_url: str, redis_client: Redis, replica: SlowReplica
) -> None:
    """A stream ends with an error that clients raise and no [DONE], a whole answer with a 503; both are settled."""
    secret, record = make_key()
    await publish(redis_client, publication([replica.url]), record)
    with fleet_of(redis_url, 1, drain_s=0.5) as fleet:
        (gateway,) = fleet.gateways
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4000}
        headers = {"authorization": f"Bearer {secret}"}
        async with (
            openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key=secret, max_retries=0) as client,
            httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=LONG_S) as http,
            await client.chat.completions.create(**asked, stream=True) as stream,
            http.stream("POST", "/v1/messages", json={**asked, "stream": True}) as messages,
        ):
            whole = asyncio.create_task(http.post("/v1/chat/completions", json=asked))
            chunks = aiter(stream)
            assert await anext(chunks)

            async def all_run() -> bool:
                return replica.running == 3

            await eventually_async(all_run, LONG_S, "the three requests' begin")
            gateway.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="gateway ended"):
                async for _ in chunks:
                    pass
            told = await messages.aread()
            refused = await whole
        assert await asyncio.to_thread(gateway.process.wait, LONG_S) == 0
        assert "cutting off 3 requests" in gateway.log()
        assert b"\nevent: error\n" in told
        assert b"message_stop" not in told
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert int(refused.headers["retry-after"]) >= 1
        assert await none_open(redis_client)


@pytest.mark.slow
async def test_readiness_through_publication_outage_and_drain(own_server: Any, replica: SlowReplica) -> None:
    """Not ready without Redis, limits or a replica, each for its own reason; then ready through an outage, to the end.

    Both ports say so, and it lives all the while.
    """
    _, record = make_key()
    own_server.kill()
    settings = replace(gateway_settings(own_server.url), drain_delay_s=1.0)

    with GatewayProcess(settings) as gateway:

        async def health() -> list[tuple[int, str]]:
            async with httpx.AsyncClient(timeout=5) as http:
                answers = [await http.get(url + "/health") for url in (gateway.admin_url, gateway.url)]
                assert (await http.get(gateway.admin_url + "/live")).status_code == 200
            return [(answer.status_code, answer.json().get("why", "")) for answer in answers]

        async def until(status: int, reason: str) -> None:
            async def is_told() -> bool:
                return all(told == status and reason in why for told, why in await health())

            await eventually_async(is_told, LONG_S, f"health {status} {reason}")

        await until(503, "Redis has not answered")
        own_server.start()
        await until(503, "No limits")
        async with Redis.from_url(own_server.url) as redis:
            await publish(redis, publication([]), record)
            await until(503, "no pool has had a replica")
            await publish(redis, publication([replica.url], 2), record)
            await until(200, "")
            await publish(redis, publication([], 3), record)

            async def lost() -> bool:
                return await asyncio.to_thread(gateway.epoch) == 3

            await eventually_async(lost, LONG_S, "the loss of the replica")
        own_server.kill()

        async def failing() -> bool:
            return metric(await asyncio.to_thread(gateway.metrics), "penstock_directory_errors_total", what="redis") > 1

        await eventually_async(failing, LONG_S, "a read that fails")
        assert await health() == [(200, ""), (200, "")]
        gateway.process.send_signal(signal.SIGTERM)
        await until(503, "draining")
        assert await asyncio.to_thread(gateway.process.wait, LONG_S) == 0
