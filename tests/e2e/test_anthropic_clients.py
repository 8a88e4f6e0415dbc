"""Anthropic's official client, unchanged, against the whole stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.support.stack import MODEL, Stack, metric
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MESSAGES: Any = [{"role": "user", "content": "How much water passes the sluice?"}]


@pytest.fixture
def client(stack: Stack) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.url, api_key=stack.key, max_retries=2, timeout=60) as made:
        yield made


def output_tokens(stack: Stack) -> float:
    """What the two gateways have counted as generated for the tier of the stack's own key."""
    host, port = stack.admin_url.rsplit(":", 1)
    urls = [f"{host}:{int(port) + worker}/metrics" for worker in range(2)]
    pages = [httpx.get(url, headers=stack.admin_headers(), timeout=10).text for url in urls]
    return sum(metric(page, "penstock_tokens_total", kind="output") for page in pages)


def test_message(client: anthropic.Anthropic) -> None:
    """A plain message has exactly the tokens asked for, with its usage, stop reason and rate-limit headers."""
    raw = client.messages.with_raw_response.create(model=MODEL, max_tokens=12, messages=MESSAGES, system="Be brief.")
    answer = raw.parse()

    assert answer.content[0].type == "text"
    assert (answer.usage.output_tokens, answer.stop_reason) == (12, "max_tokens")
    assert answer.usage.input_tokens > 0
    assert int(raw.headers["anthropic-ratelimit-output-tokens-limit"]) > 0
    assert raw.headers["request-id"]


def test_streamed_message_is_accounted_for_by_its_own_usage(client: anthropic.Anthropic, stack: Stack) -> None:
    """A stream's text, stop reason and usage arrive, and the gateway counts what the engine told."""
    before = output_tokens(stack)
    with client.messages.stream(model=MODEL, max_tokens=12, messages=MESSAGES) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert text
    assert (final.usage.output_tokens, final.stop_reason) == (12, "max_tokens")
    eventually(lambda: output_tokens(stack) == before + 12, 5, "the settlement")


def test_a_stream_that_is_left_is_charged_for_what_was_emitted(client: anthropic.Anthropic, stack: Stack) -> None:
    """A message tells no usage in its middle, so its deltas are counted, on the upper side and not beyond."""
    before = output_tokens(stack)
    with client.messages.create(model=MODEL, max_tokens=2_000, messages=MESSAGES, stream=True) as stream:
        deltas = 0
        for event in stream:
            deltas += event.type == "content_block_delta"
            if deltas == 10:
                break

    eventually(lambda: output_tokens(stack) >= before + 10, 5, "the settlement")
    assert output_tokens(stack) - before < 1_000


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    """Counting agrees with what a message is then said to have used."""
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES)
    answer = client.messages.create(model=MODEL, max_tokens=1, messages=MESSAGES)

    cached = answer.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == answer.usage.input_tokens + cached > 0


def test_a_prompt_that_is_too_long_is_refused_in_anthropics_words(client: anthropic.Anthropic) -> None:
    """What only the engine can measure is refused in the wording that clients match."""
    long: Any = [{"role": "user", "content": "water " * 200_000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ \w+ > \d+ maximum") as refused:
        client.messages.create(model=MODEL, max_tokens=1, messages=long)

    assert refused.value.type == "invalid_request_error"
