"""Replicas that talk nonsense, die, freeze or are lost sight of, on every route: what callers get and owe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from tests.integration.gateway_bench import Bench
from tests.support.books import ledger, twice
from tests.support.callers import ask
from tests.support.fake_upstream import Failure, FakeUpstream
from tests.support.gateway import MODEL, GatewayProcess, gateway_settings

#: Every fault on every route, some of them by the second.
pytestmark = pytest.mark.slow

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
ROUTES = pytest.mark.parametrize("path", PATHS)
OUTPUT, PROMPT_TOKENS = 8, 11
#: What a replica may answer that is no answer of vLLM's.
NONSENSE = {
    "no HTTP": b"\x16\x03\x01 hello? anybody?\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-ty",
    "half a body": b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id": "x", ',
    "an endless head": b"HTTP/1.1 200 OK\r\nx: " + 100_000 * b"y",
    "no chunk size": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "an empty answer": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a page": b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 11\r\n\r\n<h1>Hi</h1>",
    "another place": b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
    "strange events": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        b"data: {oops}\n\nevent: \xff\xfe\ndata: []\n\ndata: [DONE]\n\n"
    ),
    "a page for an error": b"HTTP/1.1 500 X\r\ncontent-type: text/html\r\ncontent-length: 11\r\n\r\n<h1>Oh</h1>",
}


def body(path: str, stream: bool, output: int = OUTPUT) -> dict[str, Any]:
    """A request's body; its prompt is 11 tokens long on the stand-in replica."""
    told: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 44}], "max_tokens": output}
    if path == "/v1/responses":
        told = {"input": "x" * 44, "max_output_tokens": output}
    elif path == "/v1/completions":
        told = {"prompt": "x" * 44, "max_tokens": output}
    return {"model": MODEL, "stream": stream, **told}


@asynccontextmanager
async def babbler(said: bytes) -> AsyncIterator[str]:
    """A replica that says this to everybody, and hangs up; its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("said", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_is_no_answer(bench: Bench, said: bytes) -> None:
    """On no route does it reach a caller as an answer, crash the gateway or leave anything held; a replica beside it
    serves the request instead, as long as nothing was passed on.
    """
    calls = [(path, stream) for path in PATHS for stream in (True, False)]
    async with babbler(said) as url:
        await bench.publish([url])
        alone = await asyncio.gather(*(ask(bench.url, bench.secret, body(*call), call[0]) for call in calls))
        await bench.publish([url, bench.upstream.url])
        beside = [await ask(bench.url, bench.secret, body(path, stream=False), path) for path in PATHS * 2]
    await bench.idle()
    assert all(answer.whole for answer in alone)
    for (_, stream), answer in zip(calls, alone, strict=True):
        broken_off = stream and answer.status == 200 and b"broke off" in answer.body
        assert broken_off or answer.status in (500, 503, 529), answer
    if b"500" not in said[:12]:  # which is an engine's answer, and passes as such
        assert {answer.complaint for answer in beside} == {""}
        assert {answer.complaint for answer in alone if answer.status != 200} <= {""}
    assert (await bench.used())["concurrency"] == 0
    assert twice(await ledger(bench.redis)) == []
    assert "Traceback" not in bench.gateway.log()


async def test_a_replica_is_asked_for_plain_answers(bench: Bench) -> None:
    """What a proxy before it would compress could not be read here, and would not be said to be compressed."""
    assert (await ask(bench.url, bench.secret, body(PATHS[0], stream=False))).complaint == ""
    assert bench.upstream.headers[-1]["accept-encoding"] == "identity"


@ROUTES
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("failure", ["busy", "die before"])
async def test_another_replica_takes_over_on_every_route(
    bench: Bench, path: str, failure: Failure, stream: bool
) -> None:
    """A replica that fails before the first byte is not noticed where there is another, and a 503 (529) where there is
    none, for which nobody owes any output; nor a prompt, where the replica did not begin.
    """
    async with FakeUpstream() as other:
        await bench.publish([bench.upstream.url, other.url])
        bench.upstream.failures.extend([failure] * 2)
        other.failures.append(failure)
        refused = await ask(bench.url, bench.secret, body(path, stream), path)
        served = await ask(bench.url, bench.secret, body(path, stream), path)
    await bench.idle()
    first, second = await ledger(bench.redis)
    assert (refused.status, refused.complaint) == (529 if path == "/v1/messages" else 503, "")
    assert (served.status, served.complaint) == (200, "")
    assert first.output_tokens == 0
    assert (first.outcome == "unserved") == (first.input_tokens == 0)
    assert failure != "busy" or first.outcome == "unserved"
    assert (second.outcome, second.input_tokens, second.output_tokens) == ("ended", PROMPT_TOKENS, OUTPUT)


@ROUTES
@pytest.mark.parametrize("failure", ["die after", "no finish"])
async def test_a_stream_that_breaks_off_says_so_on_every_route(bench: Bench, path: str, failure: Failure) -> None:
    """After the first byte the route's own error event ends it, and what came before is owed."""
    bench.upstream.failures.append(failure)
    answer = await ask(bench.url, bench.secret, body(path, stream=True), path)
    await bench.idle()
    (line,) = await ledger(bench.redis)
    assert (answer.status, answer.whole, line.outcome) == (200, True, "cut")
    assert b"broke off before it was complete" in answer.body
    assert b"[DONE]" not in answer.body
    assert (await bench.used())["concurrency"] == 0


async def test_a_replica_that_freezes(redis_url: str, redis_client: Redis) -> None:
    """Silent in the middle of a stream, it is let go of after the chunk timeout, on every route: the caller is told,
    and owes what came.
    """
    settings = msgspec.structs.replace(gateway_settings(redis_url), chunk_timeout_s=0.4)
    with GatewayProcess(settings) as gateway:
        async with FakeUpstream() as upstream:
            bench = Bench(gateway, redis_client, upstream, epoch=0)
            await bench.publish()
            upstream.gate.clear()
            calls = [ask(bench.url, bench.secret, body(path, stream=True), path) for path in PATHS]
            answers = await asyncio.gather(*calls)
            await bench.until(lambda: upstream.aborted == len(PATHS))
            await bench.idle()
            lines = await ledger(bench.redis)
            assert (await bench.used())["concurrency"] == 0
    assert {(answer.status, answer.whole, b"(silent)" in answer.body) for answer in answers} == {(200, True, True)}
    assert [line.outcome for line in lines] == ["cut"] * len(PATHS)


@ROUTES
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_gone_before_the_first_byte(bench: Bench, path: str, stream: bool) -> None:
    """While its prompt is still computed its work is aborted at once; a stream owes the prompt, and whoever wanted all
    at once owes what was held, since nobody knows how much of it was generated.
    """
    bench.upstream.failures.append("silent")
    call = asyncio.create_task(ask(bench.url, bench.secret, body(path, stream), path))
    await bench.until(lambda: bench.upstream.open_requests == 1)
    call.cancel()
    await bench.until(lambda: bench.upstream.aborted == 1)
    await bench.idle()
    (line,) = await ledger(bench.redis)
    assert (line.outcome, line.output_tokens) == (("cut", 0) if stream else ("unknown", OUTPUT))
    assert line.input_tokens >= PROMPT_TOKENS
    assert (await bench.used())["concurrency"] == 0
