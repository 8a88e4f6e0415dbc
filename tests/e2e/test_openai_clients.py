"""The official client, unchanged, against the whole stack."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support.stack import MODEL, Stack, penstock
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How much water passes the sluice?"}]


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stack.url + "/v1", api_key=stack.key, max_retries=2, timeout=60) as made:
        yield made


@pytest.fixture
async def async_client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key=stack.key, max_retries=2, timeout=60) as made:
        yield made


def test_chat_completion(client: openai.OpenAI) -> None:
    """A plain completion returns text of exactly the tokens asked for, with its usage."""
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12)

    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens > 0


def test_streamed_chat_has_no_usage_chunk_that_was_not_asked_for(client: openai.OpenAI) -> None:
    """Every chunk of a plain stream has a choice, so that ``chunk.choices[0]`` works on all of them."""
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, stream=True))

    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_streamed_chat_has_its_usage_where_asked_for(client: openai.OpenAI) -> None:
    """A client that asks for usage gets it once, at the end, and it is true."""
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    usages = [chunk.usage for chunk in stream if chunk.usage is not None]

    assert [usage.completion_tokens for usage in usages] == [12]


def test_completions_route(client: openai.OpenAI) -> None:
    """The older route serves too, streaming and not."""
    answer = client.completions.create(model=MODEL, prompt="water", max_tokens=5)
    streamed = list(client.completions.create(model=MODEL, prompt="water", max_tokens=5, stream=True))

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert "".join(chunk.choices[0].text for chunk in streamed)


def test_responses_route(client: openai.OpenAI) -> None:
    """A response is served whole and as a stream, each with its usage, and is not stored."""
    answer = client.responses.create(model=MODEL, input="How much water passes?", max_output_tokens=12)
    with client.responses.stream(model=MODEL, input="How much water passes?", max_output_tokens=12) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()

    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == 12
    assert "".join(deltas) == final.output_text
    assert final.usage is not None
    assert final.usage.output_tokens == 12
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError, match="not stored"):
        client.responses.create(model=MODEL, input="More.", previous_response_id=answer.id)


def test_a_prompt_that_is_too_long_is_refused_by_its_code(client: openai.OpenAI) -> None:
    """What only the engine can measure is refused with the code that clients match."""
    long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "water " * 200_000}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=long, max_tokens=1)

    assert refused.value.code == "context_length_exceeded"


def test_models_are_listed(client: openai.OpenAI) -> None:
    """The models a key may use are those of the pools."""
    assert [model.id for model in client.models.list()] == [MODEL]


async def test_async_client_streams_and_completes(async_client: openai.AsyncOpenAI) -> None:
    """The asynchronous client works the same, many at once."""

    async def streamed() -> str:
        stream = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*(streamed() for _ in range(8)))
    whole = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8)

    assert all(answers)
    assert whole.usage is not None


def test_a_retry_after_a_429_succeeds(stack: Stack) -> None:
    """A refused caller is told when to come back, and the client's own retry then succeeds."""
    key = stack.create_key("tiny")
    limits = stack.limits(key)
    burst, per_minute = limits["output_tokens"]["burst"], limits["output_tokens"]["per_minute"]
    # Two requests, one of which empties the bucket, so that the second must wait a few seconds for its share.
    second = max(1, min(burst // 2, per_minute * 3 // 60))
    with openai.OpenAI(base_url=stack.url + "/v1", api_key=key, max_retries=0, timeout=60) as impatient:
        impatient.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=burst)
        with pytest.raises(openai.RateLimitError) as refused:
            impatient.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=second)
    assert int(refused.value.response.headers["retry-after-ms"]) >= 1

    with openai.OpenAI(base_url=stack.url + "/v1", api_key=key, max_retries=2, timeout=60) as patient:
        answer = patient.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=second)

    assert answer.usage is not None
    assert answer.usage.completion_tokens == second


def test_a_revoked_key_is_refused(stack: Stack) -> None:
    """After `penstock keys revoke` every gateway refuses the key."""
    key = stack.create_key("free", name="to be revoked")
    key_id = next(row["id"] for row in stack.key_rows() if row["name"] == "to be revoked")
    assert penstock("keys", "revoke", key_id, "--config", stack.config_path).returncode == 0

    eventually(
        lambda: [stack.get("/v1/models", key).status_code for _ in range(8)] == [401] * 8, 5, "the key's refusal"
    )
