"""Reading requests, and the bodies that go on to an engine."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.wire import MAX_PROMPTS, parse_request, upstream_body

#: What JSON escapes, and what it need not.
TEXT = st.text('ab"\\/é\n', max_size=5)
MESSAGES = [{"role": "user", "content": "hello"}]


def encoded(**members: Any) -> bytes:
    """A body for model m."""
    return msgspec.json.encode({"model": "m", **members})


@pytest.mark.parametrize(
    ("members", "max_output", "choices"),
    [
        ({}, None, 1),
        ({"max_tokens": 1, "max_completion_tokens": 10_000}, 10_000, 1),
        ({"max_tokens": 10, "max_completion_tokens": None}, 10, 1),
        ({"max_tokens": 7, "n": 3}, 7, 3),
        ({"n": 2, "best_of": 5}, None, 5),
        ({"max_tokens": 0}, 0, 1),
    ],
)
def test_the_largest_output_counts(members: dict[str, Any], max_output: int | None, choices: int) -> None:
    """No alias, nor n or best_of, lets a request hold less than it may generate."""
    parsed = parse_request("chat", encoded(messages=MESSAGES, **members))
    assert (parsed.max_output, parsed.choices) == (max_output, choices)


@pytest.mark.parametrize(
    ("prompt", "size", "prompts", "tokens"),
    [
        ("hello", 5, 1, None),
        (["ab", "cdé"], 6, 2, None),
        ([1, 2, 3], 7, 1, 3),
        ([[1, 2], [3]], 11, 2, 3),
        ("", 0, 1, None),
    ],
)
def test_prompts_of_every_form(prompt: Any, size: int, prompts: int, tokens: int | None) -> None:
    """Strings are measured in bytes, token ids are counted, and each prompt has its own answers."""
    parsed = parse_request("completions", encoded(prompt=prompt, n=2))
    assert (parsed.prompt_bytes, parsed.prompts, parsed.prompt_tokens) == (size, prompts, tokens)
    assert parsed.choices == 2 * prompts


@pytest.mark.parametrize("prompt", [[], [1, "a"], [{}], ["a"] * (MAX_PROMPTS + 1)])
def test_impossible_prompts_are_refused(prompt: Any) -> None:
    """A list that is no prompt, or holds too many, is refused by its name."""
    with pytest.raises(Rejection, match="400") as caught:
        parse_request("completions", encoded(prompt=prompt))
    assert b"prompt" in caught.value.body


def test_text_parts_and_tools_count_as_prompt() -> None:
    """Content in parts and tool definitions are part of the prompt's size."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "x" * 100}]}]
    assert parse_request("chat", encoded(messages=parts)).prompt_bytes > 100
    assert parse_request("chat", encoded(messages=MESSAGES, tools=[{"a": "y" * 200}])).prompt_bytes > 200


@given(
    st.dictionaries(
        st.sampled_from(["priority", "cache_salt", "temperature", "stop", "seed", "stream_options", "user"]),
        st.one_of(st.none(), TEXT, st.integers(-(2**40), 2**40), st.lists(TEXT, max_size=3)),
    )
)
def test_the_rest_of_a_body_is_untouched(members: dict[str, Any]) -> None:
    """Everything but the gateway's own members reaches the engine as the client sent it."""
    members.pop("stream_options", None)
    sent = json.loads(upstream_body(parse_request("chat", encoded(messages=MESSAGES, **members)), "salt"))
    own = {"priority", "cache_salt"}
    kept = {name: value for name, value in members.items() if name not in own}
    assert sent == {"model": "m", "messages": MESSAGES, **kept, "cache_salt": "salt"}


def test_numbers_and_text_pass_as_written() -> None:
    """Values are not parsed and written again: digits and escapes stay as they were."""
    body = b'{"model":"m","messages":[],"temperature":0.70,"seed":123456789012345678901,"user":"\\u00e9"}'
    assert upstream_body(parse_request("chat", body), "s") == body[:-1] + b',"cache_salt":"s"}'


def test_member_that_occurs_twice_is_sent_once() -> None:
    """The engine sees the value that was checked, whichever of two it would have taken."""
    body = b'{"model":"m","messages":[],"max_tokens":1,"max_tokens":9}'
    parsed = parse_request("chat", body)
    assert parsed.max_output == 9
    assert json.loads(upstream_body(parsed, "s"), object_pairs_hook=lambda pairs: pairs).count(("max_tokens", 9)) == 1


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (None, "none"),
        ({}, "none"),
        ({"include_usage": False, "continuous_usage_stats": True}, "none"),
        ({"include_usage": True}, "final"),
        ({"include_usage": True, "continuous_usage_stats": True}, "every chunk"),
    ],
)
def test_streams_always_report_usage(options: Any, shown: str) -> None:
    """The engine is asked for usage on every chunk, whatever the client asked to see."""
    parsed = parse_request("chat", encoded(messages=MESSAGES, stream=True, stream_options=options))
    assert parsed.shown_usage == shown
    sent = json.loads(upstream_body(parsed, "s"))
    assert sent["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    """No input raises anything but a refusal."""
    with suppress(Rejection):
        parse_request("chat", body)
    with suppress(Rejection):
        parse_request("completions", body)
