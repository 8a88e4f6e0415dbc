"""Anthropic's official client, unchanged, against the gateway: messages, streams, counting, refusals."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import httpx
import pytest

from ratelimit.gateway.hold import Usage
from tests.integration.gateway_bench import Bench
from tests.support.fake_upstream import CHUNKS_BEFORE_FAILURE, answer_of, events_of
from tests.support.gateway import MAX_MODEL_LEN, MODEL

PATH = "/v1/messages"
MESSAGES: Any = [{"role": "user", "content": "Tell me about the sea, at length and in detail."}]
#: What the stand-in counts for it.
PROMPT = 11


def message(**more: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, **more}


def client_of(bench: Bench, **options: Any) -> anthropic.AsyncAnthropic:
    """The official client with the bench's key."""
    return anthropic.AsyncAnthropic(base_url=bench.url, **{"api_key": bench.secret, "max_retries": 0, **options})


async def test_async_client_gets_a_whole_message(bench: Bench) -> None:
    """The unchanged client gets the engine's answer, its ids, and headers that agree with what was used."""
    async with client_of(bench) as client:
        raw = await client.messages.with_raw_response.create(**message(system="Be brief."))
        answer = await raw.parse()
    assert answer.content[0].type == "text"
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 8)
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    told = raw.headers
    assert told["anthropic-ratelimit-requests-limit"] == told["x-ratelimit-limit-requests"] == "1"
    assert told["anthropic-ratelimit-requests-remaining"] == told["x-ratelimit-remaining-requests"] == "49999"
    assert told["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert '"requests";r=49999' in told["ratelimit"]
    for name in ("tokens", "input-tokens", "output-tokens"):
        assert {f"anthropic-ratelimit-{name}-{field}" for field in ("limit", "remaining", "reset")} <= set(told)
    assert bench.upstream.paths == [PATH]
    await bench.settled(Usage(answer.usage.input_tokens, 8))


async def test_sync_client_streams(bench: Bench) -> None:
    """The synchronous client's stream has every delta and its usage, and is settled by it."""

    def ask() -> tuple[str, anthropic.types.Message]:
        with (
            anthropic.Anthropic(base_url=bench.url, api_key=bench.secret) as client,
            client.messages.stream(**message()) as stream,
        ):
            return "".join(stream.text_stream), stream.get_final_message()

    text, final = await asyncio.to_thread(ask)
    assert text.count("tok") == 8
    assert final.stop_reason == "max_tokens"
    assert (final.usage.input_tokens, final.usage.output_tokens) == (PROMPT, 8)
    await bench.settled(Usage(PROMPT, 8))


async def test_a_bearer_token_serves_too(bench: Bench) -> None:
    """Anthropic's client may present its key as OpenAI's does, and OpenAI's routes take Anthropic's header."""
    async with anthropic.AsyncAnthropic(base_url=bench.url, auth_token=bench.secret) as client:
        assert (await client.messages.create(**message())).usage.output_tokens == 8
    async with httpx.AsyncClient(base_url=bench.url, headers={"x-api-key": bench.secret}) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/v1/models", headers={"authorization": "Bearer other"})).status_code == 401
        assert (await http.get("/v1/models", headers={"authorization": "Basic x"})).status_code == 401


@pytest.mark.parametrize("ends_after", [None, 3])
async def test_stream_and_answer_are_the_engines_own(bench: Bench, ends_after: int | None) -> None:
    """Byte for byte, what the client gets is what the engine would have sent it directly."""
    bench.upstream.ends_after = ends_after
    async with bench.http() as http:
        streamed = await http.post(PATH, json=message(stream=True))
        whole = await http.post(PATH, json=message())
    assert streamed.content == b"".join(events_of(PATH, message(), ends_after))
    assert whole.content == answer_of(PATH, message(), ends_after)
    await bench.settled(Usage(2 * PROMPT, 2 * (ends_after or 8)), requests=2)


async def test_counting_takes_one_request_and_no_tokens(bench: Bench) -> None:
    """Tokens are counted by the engine, and nothing but the request is charged."""
    async with client_of(bench) as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=MESSAGES)
    assert counted.input_tokens == PROMPT
    assert bench.upstream.paths == [PATH + "/count_tokens"]
    assert bench.upstream.bodies == [{"model": MODEL, "messages": MESSAGES}]
    await bench.settled(Usage(0, 0))


async def test_the_gateways_own_members(bench: Bench) -> None:
    """The org's salt goes along, no priority does where the engine has none, and the maximum is the client's own."""
    async with bench.http() as http:
        assert (await http.post(PATH, json=message(cache_salt="theirs", priority=-1))).status_code == 200
    assert bench.upstream.bodies == [message(cache_salt="org:acme")]
    assert "x-vllm-priority" not in bench.upstream.headers[0]


@pytest.mark.parametrize(("assured", "told"), [(True, "3"), (False, "1003")])
async def test_priority_goes_by_header(bench: Bench, assured: bool, told: str) -> None:
    """Where replicas schedule by priority it is told by vLLM's header, since a message has no member for it."""
    budget = 60 * 10**9, 10**9  # from full to empty in a second
    borrow_up_to = 0 if assured else 1000
    await bench.publish(
        pool_budget=budget, priority_scheduling=True, priority=3, assured=assured, borrow_up_to=borrow_up_to
    )
    async with client_of(bench, max_retries=5) as client:
        await client.messages.create(**message())
        await client.messages.count_tokens(model=MODEL, messages=MESSAGES)
    assert bench.upstream.headers[0]["x-vllm-priority"] == told
    assert "priority" not in bench.upstream.bodies[0]
    assert "x-vllm-priority" not in bench.upstream.headers[1]


async def test_client_retries_after_429_and_succeeds(bench: Bench) -> None:
    """The client's own retry, at the time it was told, is served."""
    await bench.publish(requests=(60, 1))
    async with client_of(bench, max_retries=2) as client:
        await client.messages.create(**message())
        again = await client.messages.create(**message())
    assert again.content
    assert bench.denials("requests") >= 1


async def test_client_retries_after_529_and_succeeds(bench: Bench) -> None:
    """A pool that is full is an overload, and the client's own retry at the time it was told is served."""
    await bench.publish(pool_budget=(60 * 10**6, 10**6), assured=False, borrow_up_to=1000)
    async with client_of(bench) as impatient:
        with pytest.raises(anthropic.APIStatusError) as refused:
            await impatient.messages.create(**message())
    assert refused.value.status_code == 529
    assert refused.value.type == "overloaded_error"
    assert int(refused.value.response.headers["retry-after-ms"]) >= 1
    async with client_of(bench, max_retries=2) as patient:
        assert (await patient.messages.create(**message())).content


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"model": "gone"}, anthropic.NotFoundError, "does not exist"),
        ({"n": 2}, anthropic.BadRequestError, "Unrecognized request argument supplied: n"),
        ({"max_tokens": MAX_MODEL_LEN + 1}, anthropic.BadRequestError, "maximum allowed number of output tokens for"),
        ({"max_tokens": "many"}, anthropic.BadRequestError, "max_tokens"),
    ],
)
async def test_final_refusals_are_final(bench: Bench, change: dict[str, Any], kind: type[Exception], text: str) -> None:
    """The client raises the right error at once, in Anthropic's form, and nothing is charged."""
    async with client_of(bench, max_retries=2) as client:
        with pytest.raises(kind, match=text) as caught:
            await client.messages.create(**message(), extra_body=change)
    assert isinstance(caught.value, anthropic.APIStatusError)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["request_id"] == caught.value.request_id
    assert bench.upstream.bodies == []
    await bench.settled(Usage(0, 0), requests=0)


async def test_a_bad_key_in_anthropics_form(bench: Bench) -> None:
    """A key that is unknown raises the client's authentication error, without a retry."""
    async with client_of(bench, api_key="pn-unknown", max_retries=2) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await client.messages.create(**message())
    assert caught.value.type == "authentication_error"


async def test_the_engines_refusal_in_anthropics_form(bench: Bench) -> None:
    """A prompt that only the engine could measure is refused in the words that clients match, and costs a request."""
    bench.upstream.failures.append("bad request")
    bench.upstream.refusal = (
        "This model's maximum context length is 4096 tokens. However, your prompt contains 5000 input tokens, which "
        "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
    )
    async with client_of(bench, max_retries=2) as client:
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 5000 tokens > 4096 maximum"):
            await client.messages.create(**message())
    await bench.settled(Usage(0, 0))


@pytest.mark.parametrize("failure", ["die after", "no finish", "engine error"])
async def test_a_broken_stream_raises(bench: Bench, failure: Any) -> None:
    """Whatever breaks a stream, the client raises, and what was told or emitted is charged."""
    bench.upstream.failures.append(failure)
    async with client_of(bench, max_retries=2) as client:
        stream = await client.messages.create(**message(stream=True))
        with pytest.raises(anthropic.APIStatusError) as caught:
            async for _ in stream:
                pass
    body: Any = caught.value.body
    assert body["error"]["type"] in ("api_error", "internal_error")
    await bench.settled(Usage(PROMPT, 5))  # one delta of 20 bytes, at a quarter of a token each


async def test_a_client_that_leaves_owes_the_prompt_and_what_was_emitted(bench: Bench) -> None:
    """The engine's work is aborted, and the output so far is estimated at the upper side."""
    bench.upstream.gate.clear()
    async with client_of(bench) as client:
        stream = await client.messages.create(**message(stream=True))
        for _ in range(CHUNKS_BEFORE_FAILURE):
            await anext(stream)
        await stream.close()
    await bench.until(lambda: bench.upstream.aborted == 1)
    bench.upstream.gate.set()
    await bench.settled(Usage(PROMPT, 5))
    assert (bench.upstream.aborted, bench.upstream.open_requests) == (1, 0)
