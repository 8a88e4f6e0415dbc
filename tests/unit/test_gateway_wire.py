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
from ratelimit.gateway.wire import (
    ENGINE_INTERNAL,
    MAX_CHOICES,
    MAX_GENERATED_CHOICES,
    MAX_PROMPTS,
    Route,
    parse_request,
    upstream_body,
)

#: What JSON escapes, and what it need not.
TEXT = st.text('ab"\\/é\n', max_size=5)
MESSAGES = [{"role": "user", "content": "hello"}]


def encoded(**members: Any) -> bytes:
    """A body for model m."""
    return msgspec.json.encode({"model": "m", **members})


@pytest.mark.parametrize(
    ("members", "max_output", "generated"),
    [
        ({}, None, 1),
        ({"max_tokens": 1, "max_completion_tokens": 10_000}, 10_000, 1),
        ({"max_tokens": 10, "max_completion_tokens": None}, 10, 1),
        ({"max_tokens": 7, "n": 3}, 7, 3),
        ({"n": 2, "best_of": 5}, None, 5),
        ({"n": 5, "best_of": 2}, None, 5),
        ({"max_tokens": 0}, 0, 1),
    ],
)
def test_the_largest_output_counts(members: dict[str, Any], max_output: int | None, generated: int) -> None:
    """No alias, nor n or best_of, lets a request hold less than it may generate."""
    parsed = parse_request("chat", encoded(messages=MESSAGES, **members))
    assert (parsed.max_output, parsed.generated_choices) == (max_output, generated)


@pytest.mark.parametrize(("n", "best_of", "choices"), [(None, None, 2), (1, 3, 2), (2, 5, 4), (3, None, 6)])
def test_n_choices_come_back_for_each_prompt(n: int | None, best_of: int | None, choices: int) -> None:
    """``best_of`` is held for, but adds no answer to those that a complete stream finishes."""
    parsed = parse_request("completions", encoded(prompt=["a", "b"], n=n, best_of=best_of))
    assert parsed.choices == choices


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize(("asked", "prompts"), [(MAX_CHOICES + 1, 1), (MAX_CHOICES, 9), (2, MAX_PROMPTS)])
def test_one_request_has_a_bounded_number_of_choices(name: str, asked: int, prompts: int) -> None:
    """A request counts as one in flight, so what it may have generated is bounded over all its prompts."""
    with pytest.raises(Rejection, match="400") as caught:
        parse_request("completions", encoded(prompt=["a"] * prompts, **{name: asked}))
    error = json.loads(caught.value.body)["error"]
    assert error["param"] == name
    assert str(asked) in error["message"]


def test_as_many_choices_as_the_bound_are_accepted() -> None:
    """The bound itself is accepted, by many prompts or by many choices of each."""
    parsed = parse_request("completions", encoded(prompt=["a"] * (MAX_GENERATED_CHOICES // MAX_CHOICES), n=MAX_CHOICES))
    assert parsed.choices == MAX_GENERATED_CHOICES
    assert parse_request("completions", encoded(prompt=["a"] * MAX_PROMPTS)).choices == MAX_PROMPTS


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
    kept = {name: value for name, value in members.items() if name not in ENGINE_INTERNAL}
    assert sent == {"model": "m", "messages": MESSAGES, **kept, "cache_salt": "salt"}


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("name", sorted(ENGINE_INTERNAL))
def test_what_is_internal_to_an_engine_never_reaches_it(route: Route, name: str) -> None:
    """No caller says to an engine what only its operator may, however the member's name is escaped."""
    own = {"prompt": "hello", "messages": MESSAGES, "cache_salt": "org"}
    for written in (name, f"\\u{ord(name[0]):04x}{name[1:]}"):
        body = encoded(prompt="hello", messages=MESSAGES)[:-1] + f',"{written}":"caller\'s"}}'.encode()
        assert json.loads(upstream_body(parse_request(route, body), "org")) == {"model": "m", **own}


@pytest.mark.parametrize("name", ["temperature", "logprobs", "return_token_ids", "ignore_eos", "structured_outputs"])
def test_what_callers_may_ask_of_an_engine_reaches_it(name: str) -> None:
    """Features of vLLM beyond OpenAI's stay open to callers."""
    sent = json.loads(upstream_body(parse_request("chat", encoded(messages=MESSAGES, **{name: 1})), "org"))
    assert sent[name] == 1


def test_numbers_and_text_pass_as_written() -> None:
    """Values are not parsed and written again: digits and escapes stay as they were."""
    body = b'{"model":"m","messages":[],"temperature":0.70,"seed":123456789012345678901,"user":"\\u00e9"}'
    assert upstream_body(parse_request("chat", body), "s") == body[:-1] + b',"cache_salt":"s"}'


@pytest.mark.parametrize("again", ["{name}", "\\u{code:04x}{rest}"])
@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("model", "model", ("a", "b")),
        ("max_tokens", "max_output", (1, 9)),
        ("max_tokens", "max_output", (9, 1)),
        ("max_completion_tokens", "max_output", (1, 9)),
        ("n", "choices", (1, 9)),
        ("n", "choices", (9, 1)),
        ("best_of", "generated_choices", (9, 2)),
        ("stream", "stream", (False, True)),
        ("stream", "stream", (True, False)),
    ],
)
def test_what_was_accounted_for_is_what_is_sent(name: str, field: str, values: tuple[Any, Any], again: str) -> None:
    """Of a member that occurs twice, the engine sees one, with the value that was checked here."""
    first, second = (msgspec.json.encode(value).decode() for value in values)
    twice = again.format(name=name, code=ord(name[0]), rest=name[1:])
    parsed = parse_request("chat", f'{{"model":"m","messages":[],"{name}":{first},"{twice}":{second}}}'.encode())
    assert getattr(parsed, field) == values[1]
    sent = json.loads(upstream_body(parsed, "s"), object_pairs_hook=lambda pairs: pairs)
    assert [value for member, value in sent if member == name] == [values[1]]


@pytest.mark.parametrize(("first", "second"), [("a", "b" * 99), ("b" * 99, "a")])
def test_the_prompt_that_was_measured_is_what_is_sent(first: str, second: str) -> None:
    """Of a prompt, and of a message's content, that occur twice, the size of what the engine takes counts."""
    parsed = parse_request("completions", f'{{"model":"m","prompt":"{first}","prompt":"{second}"}}'.encode())
    assert parsed.prompt_bytes == len(json.loads(upstream_body(parsed, "s"))["prompt"])
    message = f'{{"content":"{first}","content":"{second}"}}'
    parsed = parse_request("chat", f'{{"model":"m","messages":[{message}]}}'.encode())
    assert parsed.prompt_bytes == len(json.loads(upstream_body(parsed, "s"))["messages"][0]["content"])


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
