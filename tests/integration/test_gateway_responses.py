"""OpenAI's Responses API through the official client, LangChain's chat model, and curl."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from ratelimit.gateway.hold import Usage
from tests.integration.gateway_bench import Bench
from tests.support.fake_upstream import answer_of, events_of
from tests.support.gateway import MODEL

PATH = "/v1/responses"
INPUT = "Tell me about the sea, at length and in detail."
#: What the stand-in counts for it.
PROMPT = 11
#: What the gateway holds for it: 47 bytes at a quarter of a token each, and one message.
HELD_PROMPT = 16


def asked(**more: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": MODEL, "input": INPUT, "max_output_tokens": 8, **more}


async def test_client_gets_a_whole_response(bench: Bench) -> None:
    """The unchanged client gets the engine's answer, which is not stored, and is charged by its usage."""
    async with bench.client() as client:
        raw = await client.responses.with_raw_response.create(**asked(store=True))
        answer = raw.parse()
    assert answer.output_text == "tok"
    assert (answer.status, answer.usage and answer.usage.output_tokens) == ("incomplete", 8)
    assert raw.headers["x-ratelimit-remaining-requests"] == "49999"
    assert "request-id" not in raw.headers
    assert bench.upstream.paths == [PATH]
    assert bench.upstream.bodies == [asked(store=False, cache_salt="org:acme")]
    await bench.settled(Usage(PROMPT, 8))


async def test_client_streams(bench: Bench) -> None:
    """The client's stream has every delta and ends with the whole response."""
    async with bench.client() as client, client.responses.stream(**asked()) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert len(deltas) == 8
    assert final.usage is not None
    assert final.usage.output_tokens == 8
    await bench.settled(Usage(PROMPT, 8))


@pytest.mark.parametrize("ends_after", [None, 3])
async def test_stream_and_answer_are_the_engines_own(bench: Bench, ends_after: int | None) -> None:
    """Byte for byte, what the client gets is what the engine would have sent it directly."""
    bench.upstream.ends_after = ends_after
    async with bench.http() as http:
        streamed = await http.post(PATH, json=asked(stream=True, stream_options={"include_obfuscation": False}))
        whole = await http.post(PATH, json=asked())
    assert streamed.content == b"".join(events_of(PATH, asked(), ends_after))
    assert whole.content == answer_of(PATH, asked(), ends_after)
    assert "stream_options" not in bench.upstream.bodies[0]
    await bench.settled(Usage(2 * PROMPT, 2 * (ends_after or 8)), requests=2)


@pytest.mark.parametrize("change", [{"background": True}, {"previous_response_id": "resp_1"}, {"conversation": "c_1"}])
async def test_what_needs_stored_answers_is_refused_at_once(bench: Bench, change: dict[str, Any]) -> None:
    """Answers are not stored: what refers to one is final, and says why."""
    async with bench.client(max_retries=2) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(**asked(), extra_body=change)
    assert caught.value.param in change
    assert bench.upstream.bodies == []


@pytest.mark.parametrize("path", [PATH + "/resp_1", PATH + "/resp_1/cancel", PATH + "/input_tokens"])
async def test_no_other_responses_routes_exist(bench: Bench, path: str) -> None:
    """Nothing can be fetched or cancelled."""
    async with bench.http() as http:
        assert (await http.get(path)).status_code == (await http.post(path, json={})).status_code == 404
    assert bench.upstream.bodies == []


@pytest.mark.parametrize("failure", ["die after", "no finish"])
async def test_a_broken_stream_raises(bench: Bench, failure: Any) -> None:
    """A stream that breaks off raises in the client, and owes its prompt as held: nothing was emitted yet."""
    bench.upstream.failures.append(failure)
    async with bench.client(max_retries=2) as client:
        stream = await client.responses.create(**asked(stream=True))
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                pass
    await bench.settled(Usage(HELD_PROMPT, 0))


async def test_a_client_that_leaves_owes_the_held_prompt(bench: Bench) -> None:
    """The format tells no usage before its end, so a client that leaves pays by what was held and seen."""
    bench.upstream.gate.clear()
    async with bench.client() as client:
        stream = await client.responses.create(**asked(stream=True))
        await anext(aiter(stream))
        await stream.close()
    await bench.until(lambda: bench.upstream.aborted == 1)
    bench.upstream.gate.set()
    await bench.settled(Usage(HELD_PROMPT, 0))
    assert (bench.upstream.aborted, bench.upstream.open_requests) == (1, 0)


@pytest.mark.parametrize(("assured", "told"), [(True, 3), (False, 1003)])
async def test_priority_goes_in_the_body(bench: Bench, assured: bool, told: int) -> None:
    """Where replicas schedule by priority the tier's is told, and what is borrowed goes behind all that is assured."""
    budget = 60 * 10**9, 10**9  # from full to empty in a second
    borrow_up_to = 0 if assured else 1000
    await bench.publish(
        pool_budget=budget, priority_scheduling=True, priority=3, assured=assured, borrow_up_to=borrow_up_to
    )
    async with bench.client(max_retries=5) as client:
        await client.responses.create(**asked(), extra_body={"priority": -9})
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=1)
    assert [body["priority"] for body in bench.upstream.bodies] == [told, told]


@asynccontextmanager
async def langchain(bench: Bench, max_retries: int = 0, **options: Any) -> AsyncIterator[ChatOpenAI]:
    """LangChain's OpenAI chat model with the bench's key."""
    # Of its own clients LangChain keeps one for the process, which no test could close.
    async with openai.DefaultAsyncHttpxClient() as http:
        with openai.DefaultHttpxClient() as sync_http:
            yield ChatOpenAI(
                model=MODEL,
                base_url=bench.url + "/v1",
                api_key=SecretStr(bench.secret),
                http_client=sync_http,
                http_async_client=http,
                max_retries=max_retries,
                max_completion_tokens=8,
                **options,
            )


@pytest.mark.parametrize("use_responses_api", [False, True])
async def test_langchain_answers_and_streams(bench: Bench, use_responses_api: bool) -> None:
    """LangChain's chat model works over both of OpenAI's APIs, streaming and not, and reads the usage."""
    async with langchain(bench, use_responses_api=use_responses_api, stream_usage=True) as model:
        whole = await model.ainvoke(INPUT)
        chunks = [chunk async for chunk in model.astream(INPUT)]
    assert whole.text
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.text for chunk in chunks).count("tok") == 8
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [8]
    assert set(bench.upstream.paths) == {PATH if use_responses_api else "/v1/chat/completions"}
    await bench.settled(Usage(2 * PROMPT, 16), requests=2)


async def test_langchain_retries_after_429(bench: Bench) -> None:
    """LangChain leaves retries to the client below it, and they succeed at the time that was told."""
    await bench.publish(requests=(60, 1))
    async with langchain(bench, max_retries=2) as model:
        await model.ainvoke(INPUT)
        assert (await model.ainvoke(INPUT)).text
    assert bench.denials("requests") >= 1


async def test_langchain_knows_a_prompt_that_is_too_long(bench: Bench) -> None:
    """The engine's own refusal of a long prompt reaches LangChain as the error that it has for that."""
    bench.upstream.failures.append("bad request")
    bench.upstream.refusal = (
        "This model's maximum context length is 4096 tokens. However, your prompt contains 5000 input tokens, which "
        "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
    )
    async with langchain(bench) as model:
        with pytest.raises(ContextOverflowError):
            await model.ainvoke(INPUT)


async def curl(*args: str) -> str:
    """What curl prints."""
    command = ["curl", "--silent", "--show-error", "--max-time", "20", *args]
    ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=True)
    return ended.stdout


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": INPUT}], "max_tokens": 8}),
        ("/v1/completions", {"prompt": INPUT, "max_tokens": 8}),
        (PATH, {"input": INPUT, "max_output_tokens": 8}),
        ("/v1/messages", {"messages": [{"role": "user", "content": INPUT}], "max_tokens": 8}),
    ],
)
async def test_curl(bench: Bench, path: str, told: dict[str, Any]) -> None:
    """Plain curl gets each route's answer and stream, with the key in either header."""
    body = {"model": MODEL, **told}
    for key in (f"authorization: Bearer {bench.secret}", f"x-api-key: {bench.secret}"):
        common = ("-H", key, "-H", "content-type: application/json", bench.url + path)
        assert await curl("-d", json.dumps(body), *common) == answer_of(path, body).decode()
        streamed = await curl("--no-buffer", "-d", json.dumps({**body, "stream": True}), *common)
        assert streamed == b"".join(events_of(path, body)).decode()
    await bench.settled(Usage(4 * PROMPT, 32), requests=4)


async def test_curl_sees_the_wait(bench: Bench) -> None:
    """A refusal's headers are there for a script to read, and ``curl --retry`` waits as told and succeeds."""
    await bench.publish(requests=(60, 1))
    body = json.dumps({"model": MODEL, "prompt": INPUT, "max_tokens": 8})
    call = ("-H", f"authorization: Bearer {bench.secret}", "-d", body, bench.url + "/v1/completions")
    assert "usage" in await curl(*call)
    refused = await curl("--include", *call)
    assert refused.startswith("HTTP/1.1 429")
    assert "\nretry-after: 1\n" in refused.lower()
    assert '"usage"' in await curl("--retry", "3", *call)
