"""What callers get, and what they are charged, when a replica, the store or the client itself fails."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
from redis.asyncio import Redis

from ratelimit.gateway.hold import Usage
from tests.integration.gateway_bench import Bench
from tests.support.fake_upstream import CHUNKS_BEFORE_FAILURE, Failure, FakeUpstream
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings

PATH = "/v1/chat/completions"
PROMPT_TOKENS = 11
#: 44 bytes at 0.25 tokens a byte, and 4 for the message.
ESTIMATED_PROMPT = 15
#: One chunk has the role and no token.
SENT_TOKENS = CHUNKS_BEFORE_FAILURE - 1


def chat(**more: Any) -> dict[str, Any]:
    """A chat request's body; its prompt is 11 tokens long on the stand-in replica."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": 8, **more}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("failure", ["busy", "die before"])
async def test_another_replica_takes_over(bench: Bench, failure: Failure, stream: bool) -> None:
    """A replica that fails before the first byte is replaced, and the client sees nothing of it."""
    async with FakeUpstream() as other:
        await bench.publish([bench.upstream.url, other.url])
        for upstream in (bench.upstream, other):
            upstream.failures.append(failure)
        bench.upstream.failures.clear()
        async with bench.http() as http:
            answers = [await http.post(PATH, json=chat(stream=stream)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(bench.upstream.bodies) >= 1
    await bench.settled(Usage(2 * PROMPT_TOKENS, 16), requests=2)


async def test_unreachable_replica_is_passed_over(bench: Bench) -> None:
    """A replica that refuses connections costs the caller nothing but the attempt."""
    async with FakeUpstream() as gone:
        url = gone.url
    await bench.publish([url, bench.upstream.url])
    async with bench.http() as http:
        assert (await http.post(PATH, json=chat())).status_code == 200
    assert bench.metric("penstock_upstream_failures_total", reason="refused") >= 1
    await bench.settled(Usage(PROMPT_TOKENS, 8))


@pytest.mark.parametrize(("failure", "requests", "prompt"), [("busy", 0, 0), ("die before", 1, ESTIMATED_PROMPT)])
async def test_503_when_no_replica_takes_it(bench: Bench, failure: Failure, requests: int, prompt: int) -> None:
    """When the last replica has failed, the answer is a retryable 503; one that died of it is paid for the prompt."""
    bench.upstream.failures.append(failure)
    async with bench.http() as http:
        refused = await http.post(PATH, json=chat(stream=True))
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "temporary_reduced_capacity"
    await bench.settled(Usage(prompt, 0), requests=requests)


async def test_a_deadly_request_meets_few_replicas(bench: Bench) -> None:
    """A request on which replicas die is tried on two of them at most."""
    async with FakeUpstream() as second, FakeUpstream() as third:
        replicas = [bench.upstream, second, third]
        await bench.publish([replica.url for replica in replicas])
        for replica in replicas:
            replica.failures.append("die before")
        async with bench.http() as http:
            assert (await http.post(PATH, json=chat())).status_code == 503
        assert sum(len(replica.bodies) for replica in replicas) == 2


@pytest.mark.parametrize("failure", ["die after", "no finish"])
async def test_broken_stream_ends_with_an_error_event(bench: Bench, failure: Failure) -> None:
    """A stream that breaks off, or claims to be done without a finish reason, raises in the client."""
    bench.upstream.failures.append(failure)
    async with bench.client() as client:
        stream = await client.chat.completions.create(**chat(stream=True))
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                pass
    assert bench.metric("penstock_broken_streams_total") == 1
    await bench.settled(Usage(PROMPT_TOKENS, SENT_TOKENS))


async def test_engine_error_passes_without_done(bench: Bench) -> None:
    """The engine's own error event reaches the client, once, and no [DONE] after it."""
    bench.upstream.failures.append("engine error")
    async with bench.http() as http:
        text = (await http.post(PATH, json=chat(stream=True))).text
    assert text.count('"error"') == 1
    assert text.rstrip().splitlines()[-1] == 'data: {"error":{"message":"engine died","code":500}}'
    await bench.settled(Usage(PROMPT_TOKENS, SENT_TOKENS))


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_fails_is_not_paid(bench: Bench, stream: bool) -> None:
    """An engine's 500 passes unchanged, and costs the caller nothing."""
    bench.upstream.failures.append("broken")
    async with bench.http() as http:
        answer = await http.post(PATH, json=chat(stream=stream))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "broken"
    await bench.settled(Usage(0, 0), requests=0)


async def test_an_answer_above_the_bound_is_a_502(redis_url: str, redis_client: Redis) -> None:
    """An answer that would fill the memory is given up, told as OpenAI does, and charged as held."""
    settings = msgspec.structs.replace(gateway_settings(redis_url), max_answer_bytes=100)
    with GatewayProcess(settings) as gateway:
        async with FakeUpstream() as upstream:
            small = Bench(gateway, redis_client, upstream, epoch=0)
            await small.publish()
            async with small.http() as http:
                answer = await http.post(PATH, json=chat())
                streamed = await http.post(PATH, json=chat(stream=True))
            await small.settled(Usage(ESTIMATED_PROMPT + PROMPT_TOKENS, 16), requests=2)
    assert (answer.status_code, streamed.status_code) == (502, 200)
    assert answer.json()["error"]["code"] == "answer_too_large"


@pytest.fixture
async def impatient(redis_url: str, redis_client: Redis) -> AsyncIterator[Bench]:
    """A bench whose gateway gives a replica and the store half a second."""
    settings = msgspec.structs.replace(
        gateway_settings(redis_url), first_byte_timeout_s=0.5, chunk_timeout_s=0.5, store_timeout_s=0.5
    )
    with GatewayProcess(settings) as gateway:
        async with FakeUpstream() as upstream:
            made = Bench(gateway, redis_client, upstream, epoch=0)
            await made.publish()
            yield made


async def test_silence_before_the_first_byte(impatient: Bench) -> None:
    """A replica that says nothing in time is left for another; two that may have been at work are paid the prompt."""
    async with FakeUpstream() as other:
        await impatient.publish([impatient.upstream.url, other.url])
        impatient.upstream.failures.append("silent")
        other.failures.append("silent")
        async with impatient.http() as http:
            first = asyncio.create_task(http.post(PATH, json=chat(stream=True)))
            refused = await first
        assert refused.status_code == 503
        await impatient.until(lambda: impatient.upstream.aborted == other.aborted == 1)
    await impatient.settled(Usage(ESTIMATED_PROMPT, 0))


async def test_silence_between_chunks(impatient: Bench) -> None:
    """A stream that falls silent ends with an error event, and the replica's work is aborted."""
    impatient.upstream.gate.clear()
    async with impatient.http() as http:
        text = (await http.post(PATH, json=chat(stream=True))).text
    assert "broke off before it was complete (silent)" in text
    assert "[DONE]" not in text
    await impatient.until(lambda: impatient.upstream.aborted == 1)
    await impatient.settled(Usage(PROMPT_TOKENS, SENT_TOKENS))


async def test_client_that_leaves_a_stream_pays_for_what_was_sent(bench: Bench) -> None:
    """The replica's work is aborted at once; the prompt and the tokens so far are charged, the rest is given back."""
    bench.upstream.gate.clear()
    async with bench.http() as http, http.stream("POST", PATH, json=chat(stream=True, max_tokens=500)) as response:
        lines = response.aiter_lines()
        for _ in range(2 * CHUNKS_BEFORE_FAILURE):
            await anext(lines)
    await bench.until(lambda: bench.upstream.aborted == 1)
    await bench.settled(Usage(PROMPT_TOKENS, SENT_TOKENS))
    assert bench.metric("penstock_requests_total", status="499") == 1


@pytest.mark.slow
async def test_client_that_stops_reading_holds_no_replica(redis_url: str, redis_client: Redis) -> None:
    """A stream that its client does not read is aborted and settled at the request timeout, and its place is free."""
    settings = msgspec.structs.replace(gateway_settings(redis_url), request_timeout_s=2)
    with GatewayProcess(settings) as gateway:
        async with FakeUpstream() as upstream:
            stalled = Bench(gateway, redis_client, upstream, epoch=0)
            await stalled.publish()
            body = msgspec.json.encode(chat(stream=True, max_tokens=1_000, n=32))
            head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stalled.secret}\r\n"
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((settings.host, settings.port))
                client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
                await stalled.until(lambda: stalled.metric("penstock_requests_total", status="499") == 1)
                await stalled.until(lambda: upstream.open_requests == 0)
                await stalled.idle()
            used = await stalled.used()
    assert (used["requests"], used["concurrency"]) == (1, 0)
    assert used["output_tokens"] < 32_000


async def test_client_that_leaves_before_an_answer(bench: Bench) -> None:
    """An answer that is not streamed is aborted too; what was generated is unknown, so nothing is given back."""
    bench.upstream.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        async with bench.http() as http:
            await http.post(PATH, json=chat(), timeout=0.3)
    await bench.until(lambda: bench.upstream.aborted == 1)
    await bench.settled(Usage(ESTIMATED_PROMPT, 8))


async def test_true_prompt_is_held_from_the_first_chunk_on(bench: Bench) -> None:
    """While a stream still runs, its estimated prompt is already replaced by the true one."""
    bench.upstream.gate.clear()
    async with bench.http() as http, http.stream("POST", PATH, json=chat(stream=True)) as response:
        lines = response.aiter_lines()
        await anext(lines)
        used: dict[str, float] = {}
        async with asyncio.timeout(5):
            while used.get("input_tokens") != PROMPT_TOKENS:
                used = await bench.used()
        assert used == {"requests": 1, "input_tokens": PROMPT_TOKENS, "output_tokens": 8, "concurrency": 1}
        bench.upstream.gate.set()
        async for _ in lines:
            pass
    await bench.settled(Usage(PROMPT_TOKENS, 8))


async def test_output_beyond_the_hold_is_charged_along_the_way(bench: Bench) -> None:
    """Where the caller sets no maximum and the answer outgrows the hold, the true output is charged in the end."""
    await bench.publish(default_max_output=4)
    async with bench.http() as http:
        body = {**chat(stream=True), "max_tokens": None}
        assert (await http.post(PATH, json=body)).status_code == 200
    await bench.settled(Usage(PROMPT_TOKENS, 16))


async def test_many_streams_at_once_all_settle(bench: Bench) -> None:
    """Many streams at once, some cut by their clients, leave nothing held."""
    async with bench.http() as http:

        async def one(index: int) -> int:
            async with http.stream("POST", PATH, json=chat(stream=True)) as response:
                chunks = response.aiter_bytes()
                await anext(chunks)
                if index % 4:
                    async for _ in chunks:
                        pass
                return response.status_code

        statuses = await asyncio.gather(*(one(index) for index in range(80)))
    await bench.idle()
    used = await bench.used()
    assert set(statuses) == {200}
    assert used["concurrency"] == 0
    assert (used["requests"], used["input_tokens"]) == (80, 80 * PROMPT_TOKENS)
    assert bench.metric("penstock_open_requests") == 0


async def test_sigterm_lets_streams_finish(bench: Bench) -> None:
    """A gateway told to stop takes no new connection, finishes its open stream, settles, and exits with 0."""
    bench.upstream.gate.clear()
    headers = {"authorization": f"Bearer {bench.secret}"}
    with GatewayProcess(gateway_settings(bench.gateway.settings.redis_url)) as own:
        async with (
            httpx.AsyncClient(base_url=own.url, headers=headers, timeout=20) as http,
            http.stream("POST", PATH, json=chat(stream=True)) as response,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            stopping = asyncio.create_task(asyncio.to_thread(own.stop, signal.SIGTERM))
            await bench.until(lambda: refuses_connections(own.url))
            bench.upstream.gate.set()
            rest = [line async for line in lines]
        assert rest[-2] == "data: [DONE]"
        assert await stopping == 0
        assert own.log() == ""
    await bench.settled(Usage(PROMPT_TOKENS, 8))


def refuses_connections(url: str) -> bool:
    """Whether nothing listens there any more."""
    try:
        httpx.get(url + "/health", timeout=5)
    except httpx.ConnectError:
        return True
    return False
