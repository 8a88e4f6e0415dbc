"""Reading requests, and the bodies that go on to an engine."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.formats.fields import ALLOWED, OWNED
from ratelimit.gateway.formats.media import IMAGE_TOKENS
from ratelimit.gateway.formats.shapes import MAX_STOP_BYTES, MAX_STOPS
from ratelimit.gateway.formats.strict import MAX_DEPTH
from ratelimit.gateway.wire import (
    MAX_CHOICES,
    MAX_GENERATED_CHOICES,
    MAX_PROMPTS,
    PRIORITY_HEADER,
    ParsedRequest,
    Route,
    parse_request,
    upstream_body,
    upstream_headers,
)

ROUTES: tuple[Route, ...] = get_args(Route)
#: What vLLM 0.32 knows and a caller may not say.
INTERNAL = (
    "stream_interval",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "request_id",
    "session_id",
    "prompt_embeds",
    "mm_payload",
    "return_mm_kwargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "routed_experts_prompt_start",
    "watermarking",
    "chat_template",
    "use_beam_search",
    "include_reasoning",
    "previous_input_messages",
    "enable_response_messages",
    "conversation",
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
    assert caught.value.param == name
    assert str(asked) in caught.value.message


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
    assert "prompt" in caught.value.message


@pytest.mark.parametrize("name", ["tools", "functions", "documents", "chat_template_kwargs"])
def test_text_parts_and_all_that_a_template_may_write_count_as_prompt(name: str) -> None:
    """Content in parts, tools, documents and a template's arguments are part of the prompt's size."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "x" * 100}]}]
    assert parse_request("chat", encoded(messages=parts)).prompt_bytes > 100
    assert parse_request("chat", encoded(messages=MESSAGES, **{name: [{"a": "y" * 200}]})).prompt_bytes > 200


@pytest.mark.parametrize("name", ["system", "tools", "chat_template_kwargs"])
def test_an_anthropic_prompt_is_all_that_the_model_reads(name: str) -> None:
    """System text, content blocks and tools count, and the system text is one more message."""
    body = encoded(messages=[{"role": "user", "content": "hello"}], **{name: "y" * 200})
    parsed = parse_request("messages", body)
    assert parsed.prompt_bytes == 205
    assert parsed.messages == (2 if name == "system" else 1)
    assert parse_request("count_tokens", body).prompt_bytes == 205


@pytest.mark.parametrize("sent", ["hello", [{"role": "user", "content": "hello"}]])
def test_a_responses_prompt_is_input_and_instructions(sent: Any) -> None:
    """Input in either form, instructions and tools count."""
    parsed = parse_request("responses", encoded(input=sent, instructions="y" * 200, tools=[{"a": "z" * 300}]))
    assert parsed.prompt_bytes > 505
    assert parsed.messages == 2


@pytest.mark.parametrize(
    ("route", "members", "max_output"),
    [
        ("responses", {"max_output_tokens": 7}, 7),
        ("responses", {}, None),
        ("messages", {"max_tokens": 7}, 7),
        ("count_tokens", {}, None),
        ("completions", {"max_tokens": 7}, 7),
        ("completions", {}, 16),
        ("completions", {"max_tokens": None}, None),
    ],
)
def test_each_route_has_its_own_maximum(route: Route, members: dict[str, Any], max_output: int | None) -> None:
    """The maximum is read by the route's own name; a completion without one gets vLLM's 16 tokens."""
    assert parse_request(route, encoded(**members)).max_output == max_output


@pytest.mark.parametrize(
    ("route", "name"),
    [("chat", "max_output_tokens"), ("messages", "max_completion_tokens"), ("responses", "max_tokens")],
)
def test_another_routes_maximum_is_refused(route: Route, name: str) -> None:
    """A maximum that the engine would not see is not passed over in silence."""
    with pytest.raises(Rejection) as caught:
        parse_request(route, encoded(**{name: 1}))
    assert caught.value.message == f"Unrecognized request argument supplied: {name}"
    assert caught.value.param == name


@pytest.mark.parametrize("members", [{"background": True}, {"previous_response_id": "resp_1"}])
def test_what_needs_a_stored_response_is_refused(members: dict[str, Any]) -> None:
    """Answers are not stored, so what refers to one is refused with that reason."""
    with pytest.raises(Rejection, match="400") as caught:
        parse_request("responses", encoded(input="x", **members))
    assert caught.value.param in members
    assert "not stored" in caught.value.message


def test_a_response_is_never_stored() -> None:
    """Whatever the caller says, the engine is told not to keep the answer."""
    for members in ({}, {"store": True}, {"store": False, "background": False, "previous_response_id": None}):
        sent = json.loads(upstream_body(parse_request("responses", encoded(input="x", **members)), "salt", None))
        assert sent["store"] is False


@given(
    st.dictionaries(
        st.sampled_from(["priority", "cache_salt", "temperature", "stop", "seed", "user"]),
        st.one_of(st.none(), TEXT, st.integers(-(2**40), 2**40), st.lists(TEXT, max_size=3)),
    )
)
def test_the_rest_of_a_body_is_untouched(members: dict[str, Any]) -> None:
    """Everything but the gateway's own members reaches the engine as the client sent it."""
    sent = json.loads(upstream_body(parse_request("chat", encoded(messages=MESSAGES, **members)), "salt", None))
    kept = {name: value for name, value in members.items() if name not in OWNED}
    assert sent == {"model": "m", "messages": MESSAGES, **kept, "cache_salt": "salt"}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [*INTERNAL, "no_such_member", ""])
def test_only_listed_members_pass(route: Route, name: str) -> None:
    """What is an operator's to say, or nobody's, is refused by its name, however that is escaped."""
    for written in (name, f"\\u{ord(name[0]):04x}{name[1:]}" if name else name):
        body = encoded()[:-1] + f',"{written}":"caller\'s"}}'.encode()
        with pytest.raises(Rejection, match="400") as caught:
            parse_request(route, body)
        assert caught.value.message == f"Unrecognized request argument supplied: {name}"


@pytest.mark.parametrize("route", ROUTES)
def test_every_listed_member_reaches_the_engine(route: Route) -> None:
    """Every member of the list but the gateway's own is passed on where its value can be read at all."""
    body = encoded(**{name: [] if name == "messages" else None for name in ALLOWED[route] - {"model"}})
    sent = json.loads(upstream_body(parse_request(route, body), "salt", None))
    dropped = OWNED | {"stream_options"} if route == "responses" else OWNED
    assert ALLOWED[route] - dropped <= set(sent)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("priority", [None, 0, 1003])
def test_priority_and_salt_are_the_gateways(route: Route, priority: int | None) -> None:
    """A caller's own priority and salt are overwritten; what has no such member in its body says it by a header."""
    parsed = parse_request(route, encoded(priority=-9, cache_salt="theirs"))
    sent = json.loads(upstream_body(parsed, "org:acme", priority))
    headers = upstream_headers(route, "id", priority)
    assert sent.get("cache_salt") == (None if route == "count_tokens" else "org:acme")
    in_body = priority if route in ("chat", "completions", "responses") else None
    assert sent.get("priority") == in_body
    in_header = str(priority) if route == "messages" and priority is not None else None
    assert headers.get(PRIORITY_HEADER) == in_header
    assert headers["X-Request-Id"] == "id"


def test_numbers_and_text_pass_as_written() -> None:
    """Values are not parsed and written again: digits and escapes stay as they were."""
    body = b'{"model":"m","messages":[],"temperature":0.70,"seed":123456789012345678901,"user":"\\u00e9"}'
    assert upstream_body(parse_request("chat", body), "s", None) == body[:-1] + b',"cache_salt":"s"}'


@pytest.mark.parametrize("again", ["{name}", "\\u{code:04x}{rest}"])
@pytest.mark.parametrize("values", [("1", "12"), ("12", "1"), ("1", "1"), ('"a"', '"ab"'), ("null", "1"), ("[1]", "2")])
@pytest.mark.parametrize("name", ["model", "max_tokens", "n", "stream", "prompt", "user"])
def test_a_member_that_occurs_twice_is_refused(name: str, values: tuple[str, str], again: str) -> None:
    """Of two values one reader might take the first and another the last, so neither is taken."""
    first, second = values
    twice = again.format(name=name, code=ord(name[0]), rest=name[1:])
    spaced = f'{{ "seed" : 1, "{name}" : {first} , "top_p":1,"{twice}":{second}, "echo":true}}'
    compact = f'{{"seed":1,"{name}":{first},"{twice}":{second}}}'
    for body in (spaced.encode(), compact.encode(), compact.encode() + b" "):
        with pytest.raises(Rejection, match="400") as caught:
            parse_request("completions", body)
        assert caught.value.message == f"'{name}' occurs twice in the request body."
        assert caught.value.param == name


@given(
    st.dictionaries(st.sampled_from(["model", "prompt", "user", "seed", "n", "stop"]), st.one_of(TEXT, st.integers())),
    st.sampled_from([(",", ":"), (" , ", " : "), (",\n\t", ":\r\n")]),
    st.booleans(),
)
def test_a_body_without_repetition_is_never_taken_for_one(
    members: dict[str, Any], separators: tuple[str, str], ascii_only: bool
) -> None:
    """Whatever the spacing and escapes, members that occur once are not refused as repeated."""
    body = json.dumps(members, separators=separators, ensure_ascii=ascii_only).encode()
    with suppress(Rejection):
        parse_request("completions", b" " + body + b"\n")
        return
    with pytest.raises(Rejection) as caught:
        parse_request("completions", body)
    assert "twice" not in caught.value.message


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'\xef\xbb\xbf{"model":"m"}', "byte order mark"),
        (b'{"model":"m","user":"\xff"}', "not UTF-8"),
        (b'{"model":"m","user":"\\ud800"}', "not valid JSON"),
        (b'{"model":"m","user":"\\udc00\\ud800"}', "not valid JSON"),
        (b'{"model":"m","temperature":NaN}', "not valid JSON"),
        (b'{"model":"m","temperature":-Infinity}', "not valid JSON"),
        (b'{"model":"m","temperature":1e999}', "out of range"),
        (b'{"model":"m","seed":' + b"9" * 5_000 + b"}", "out of range"),
        (b'{"model":"m","n":' + b"9" * 30 + b"}", "must be from 1"),
        (b'{"model":"m","max_tokens":1e3}', "Expected `int"),
        (b'{"model":"m","max_tokens":true}', "Expected `int"),
        (b'{"model":"m","user":' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", "nested deeper"),
        (b'{"model":"m","user":' + b'{"a":' * 900 + b"1" + b"}" * 901, "nested deeper"),
        (b'{"model":"m","user":' + b"[" * 90_000, "nested deeper"),
        (b"null", "Expected `object`"),
        (b"", "not valid JSON"),
        (b'{"model":"m"}{}', "not valid JSON"),
        (b'{"model":"m","a\x00":1}', "not valid JSON"),
    ],
)
def test_what_two_readers_might_read_differently_is_refused(body: bytes, told: str) -> None:
    """Each is a 400 that says what is wrong, and none reaches an engine."""
    with pytest.raises(Rejection, match="400") as caught:
        parse_request("chat", body)
    assert told in caught.value.message


def test_as_deep_as_the_bound_is_accepted() -> None:
    """The bound itself is accepted, and many shallow values are not taken for deep ones."""
    inner = MAX_DEPTH - 1
    deep, shallow = b"[" * inner + b"]" * inner, msgspec.json.encode([[]] * 10 * MAX_DEPTH)
    for user in (deep, shallow):
        parsed = parse_request("chat", b'{"model":"m","user":' + user + b"}")
        assert bytes(parsed.members["user"]) == user


@pytest.mark.parametrize(("first", "second"), [("a", "b" * 99), ("b" * 99, "a")])
def test_the_prompt_that_was_measured_is_what_is_read(first: str, second: str) -> None:
    """Of a message's content that occurs twice, both count, and so does what the engine takes."""
    message = f'{{"content":"{first}","content":"{second}"}}'
    parsed = parse_request("chat", f'{{"model":"m","messages":[{message}]}}'.encode())
    assert parsed.prompt_bytes >= len(json.loads(upstream_body(parsed, "s", None))["messages"][0]["content"])


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
    sent = json.loads(upstream_body(parsed, "s", None))
    assert sent["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_formats_that_cannot_be_asked_for_usage_are_not() -> None:
    """What the Responses format calls stream options says nothing of usage, and vLLM reads it nowhere."""
    body = encoded(input="x", stream=True, stream_options={"include_obfuscation": False})
    assert "stream_options" not in json.loads(upstream_body(parse_request("responses", body), "s", None))
    body = encoded(messages=MESSAGES, stream=True)
    assert "stream_options" not in json.loads(upstream_body(parse_request("messages", body), "s", None))


def outcome(route: Route, body: bytes) -> ParsedRequest | Rejection:
    """What a body is read as, or how it is refused; nothing else may come out."""
    try:
        return parse_request(route, body)
    except Rejection as rejection:
        return rejection


@pytest.mark.parametrize("route", ROUTES)
@given(body=st.one_of(st.binary(max_size=200), st.binary(max_size=50).map(lambda b: b'{"model":"m","user":' + b)))
def test_any_bytes_are_parsed_or_refused(route: Route, body: bytes) -> None:
    """No input raises anything but a refusal that says why; what is accepted can be counted."""
    found = outcome(route, body)
    if isinstance(found, Rejection):
        assert (found.status, bool(found.message)) == (400, True)
    else:
        assert found.model
        assert 0 < found.choices <= found.generated_choices <= MAX_GENERATED_CHOICES
        assert min(found.prompts, found.prompt_bytes, found.template_tokens) >= 0


#: What an engine may write into a prompt, by route: beside the messages, and in them.
PROMPT_MEMBERS: list[tuple[Route, str]] = [
    ("chat", "tools"),
    ("chat", "tool_choice"),
    ("chat", "functions"),
    ("chat", "function_call"),
    ("chat", "documents"),
    ("chat", "chat_template_kwargs"),
    ("chat", "response_format"),
    ("chat", "structured_outputs"),
    ("chat", "reasoning_effort"),
    ("responses", "input"),
    ("responses", "instructions"),
    ("responses", "tools"),
    ("responses", "tool_choice"),
    ("responses", "text"),
    ("responses", "reasoning"),
    ("responses", "chat_template_kwargs"),
    ("responses", "structured_outputs"),
    ("messages", "system"),
    ("messages", "tools"),
    ("messages", "tool_choice"),
    ("messages", "thinking"),
    ("messages", "output_config"),
    ("messages", "chat_template_kwargs"),
]


@pytest.mark.parametrize(("route", "name"), PROMPT_MEMBERS)
def test_every_member_that_an_engine_may_write_into_the_prompt_counts(route: Route, name: str) -> None:
    """Whatever is large, and wherever, the request is measured by it."""
    value = [{"a": "y" * 5_000}]
    assert parse_request(route, encoded(**{name: value})).prompt_bytes > 5_000


@pytest.mark.parametrize("route", ["chat", "messages", "responses"])
@pytest.mark.parametrize("name", ["role", "name", "reasoning", "task", "tools", "tool_calls", "no_such_member"])
def test_every_member_of_a_message_counts(route: Route, name: str) -> None:
    """A template may write any of them: a developer's tools, a name, what was reasoned before."""
    message = {"role": "user", "content": "hello", name: "y" * 5_000}
    members = {"input": [message]} if route == "responses" else {"messages": [message]}
    assert parse_request(route, encoded(**members)).prompt_bytes > 5_000


@pytest.mark.parametrize("item", ['"hello"', "1", "[]", "null"])
@pytest.mark.parametrize("route", ["chat", "messages"])
def test_messages_are_objects(route: Route, item: str) -> None:
    """What is no message is refused with its place."""
    with pytest.raises(Rejection, match="400") as caught:
        parse_request(route, b'{"model":"m","messages":[{}, ' + item.encode() + b"]}")
    assert "$.messages[1]" in caught.value.message


IMAGE = "data:image/png;base64," + "A" * 50_000
URLS = ("http://169.254.169.254/latest", "https://a/b.png", "file:///etc/passwd", "HTTP://a", " data:", "")


def with_part(route: Route, part: dict[str, Any], inside: str = "") -> bytes:
    """A request with a part in its content, or in that of the part ``inside`` it."""
    content = [{"type": "text", "text": "x"}, {"type": inside, "content": [part]} if inside else part]
    message = {"role": "user", "content": content}
    return encoded(**({"input": [message]} if route == "responses" else {"messages": [message]}))


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    ("route", "part"),
    [
        *(("chat", {"type": n, n: {"url": None}}) for n in ("image_url", "audio_url", "video_url")),
        ("chat", {"image_url": None}),
        ("responses", {"type": "input_image", "image_url": None}),
        ("responses", {"type": "input_file", "file_url": None}),
        ("messages", {"type": "image", "source": {"type": "url", "url": None}}),
        ("count_tokens", {"type": "document", "source": {"type": "url", "url": None}}),
    ],
)
@pytest.mark.parametrize("inside", ["", "tool_result"])
def test_an_engine_is_never_sent_to_fetch(route: Route, part: dict[str, Any], url: str, inside: str) -> None:
    """Whatever the form, the scheme and the escapes, only content that comes along is accepted."""
    written = with_part(route, part, inside).replace(b"null", json.dumps(url).encode())
    for body in (written, written.replace(b"url", b"\\u0075rl").replace(b"source", b"s\\u006furce")):
        with pytest.raises(Rejection, match="400") as caught:
            parse_request(route, body)
        assert "'data:' URL" in caught.value.message


@pytest.mark.parametrize(
    ("route", "part"),
    [
        ("chat", {"type": "image_url", "image_url": {"url": IMAGE}}),
        ("responses", {"type": "input_image", "image_url": IMAGE}),
        ("messages", {"type": "image", "source": {"type": "base64", "data": "A" * 50_000}}),
    ],
)
def test_an_image_holds_a_constant(route: Route, part: dict[str, Any]) -> None:
    """An image's bytes say little of its tokens, so each holds the same."""
    parsed = parse_request(route, with_part(route, part))
    assert parsed.images == 1
    assert parsed.prompt_bytes < 500
    assert IMAGE_TOKENS < parsed.template_tokens < IMAGE_TOKENS + 10


def test_what_a_tool_is_called_with_may_name_a_url() -> None:
    """A tool's arguments and a search result's source are text to an engine, which fetches nothing for them."""
    called = {"type": "tool_use", "id": "t", "name": "f", "input": {"image_url": "https://a", "source": {"url": "b"}}}
    found = {"type": "search_result", "source": "https://a", "content": []}
    for part in (called, found):
        assert parse_request("messages", with_part("messages", part)).images == 0


@pytest.mark.parametrize(("route", "name"), [("chat", "stop"), ("completions", "stop"), ("responses", "stop")])
@pytest.mark.parametrize("stops", ["é" * 129, ["a", "b" * 257], ["a"] * 17])
def test_stop_strings_are_bounded(route: Route, name: str, stops: Any) -> None:
    """An engine holds text back for as long as a stop string may begin in it, so none is long and few are accepted."""
    with pytest.raises(Rejection, match="400") as caught:
        parse_request(route, encoded(**{name: stops}))
    assert caught.value.param == name
    with pytest.raises(Rejection, match="400"):
        parse_request("messages", encoded(stop_sequences=stops))


def test_as_many_stop_strings_as_the_bound_are_accepted() -> None:
    """The bounds themselves are accepted."""
    for stop in (["a" * MAX_STOP_BYTES] * MAX_STOPS, "a" * MAX_STOP_BYTES):
        parsed = parse_request("chat", encoded(stop=stop))
        assert json.loads(upstream_body(parsed, "s", None))["stop"] == stop


@pytest.mark.parametrize(
    ("prompt", "most", "tokens"),
    [
        ([1] * 50, 10, 10),
        ([1] * 50, 60, 50),
        ([1] * 50, -1, 50),
        ([1] * 50, -7, 50),
        ([[1] * 50, [1] * 4], 10, 14),
        ("text", 1, None),
    ],
)
def test_a_prompt_that_the_engine_cuts_counts_as_cut(prompt: Any, most: int, tokens: int | None) -> None:
    """Of token ids so many are left of each prompt; -1 leaves what the context holds."""
    parsed = parse_request("completions", encoded(prompt=prompt, truncate_prompt_tokens=most))
    assert (parsed.prompt_tokens, parsed.prompt_truncated) == (tokens, tokens is not None)
