"""The streams and answers of ``/v1/messages`` and ``/v1/responses``: what passes, and what is accounted for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.estimates import TextRates
from ratelimit.gateway.formats.answers import answer_outcome
from ratelimit.gateway.formats.events import (
    QUIET_S,
    EventFilter,
    Reader,
    read_messages_event,
    read_responses_event,
)
from ratelimit.gateway.formats.fields import Route
from ratelimit.gateway.hold import FASTEST_TOKENS_PER_S, Usage
from ratelimit.gateway.sse import EventTooLargeError
from tests.support.fake_formats import (
    compact,
    count_answer,
    messages_answer,
    messages_events,
    responses_answer,
    responses_events,
)

BODY = {"model": "m", "input": "hello"}
HELD = 40
#: The text of the fake's tokens is 20 bytes long: two and a half tokens by this ratio.
RATES = TextRates(tokens_per_byte=0.125)


def stream_of(route: str) -> EventFilter:
    """The filter of a route's stream."""
    read = read_messages_event if route == "messages" else read_responses_event
    return EventFilter(read, HELD, RATES, clock=lambda: 0.0)


def events_of(route: str, output: int = 5, ended: bool = False, cached: int = 0) -> list[bytes]:
    """What vLLM sends."""
    if route == "messages":
        return messages_events("m", 11, output, "end_turn" if ended else "max_tokens", cached)
    return responses_events(BODY, 11, output, "completed" if ended else "incomplete", cached)


@pytest.mark.parametrize("route", ["messages", "responses"])
@given(data=st.data())
def test_streams_pass_unchanged_however_they_are_cut(route: str, data: st.DataObject) -> None:
    """Byte for byte, at any split, the client gets the engine's own stream, and the usage is the engine's."""
    whole = b"".join(events_of(route, cached=4))
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=20))
    stream, passed = stream_of(route), b""
    for start, end in pairwise([0, *sorted(cuts), len(whole)]):
        passed += stream.feed(whole[start:end])
    assert not stream.error_seen
    assert stream.complete
    assert stream.usage == Usage(11, 5, 4)
    assert passed + stream.flush() == whole


@pytest.mark.parametrize("route", ["messages", "responses"])
def test_the_last_event_is_kept_back(route: str) -> None:
    """A client does not see the end before the account is settled, and nothing overtakes it."""
    events = events_of(route)
    stream = stream_of(route)
    assert b"".join(map(stream.feed, events[:-1])) == b"".join(events[:-1])
    before = stream.complete
    assert stream.feed(events[-1]) == b""
    assert (before, stream.complete) == (False, True)
    assert stream.feed(b": late\n\n") == b""
    assert stream.flush() == events[-1] + b": late\n\n"


@pytest.mark.parametrize("route", ["messages", "responses"])
@pytest.mark.parametrize("ended", [True, False])
def test_only_answers_that_ended_by_themselves_have_ended(route: str, ended: bool) -> None:
    """An answer at its maximum is complete, but says nothing of how long answers are."""
    stream = stream_of(route)
    for event in events_of(route, ended=ended):
        assert not stream.ended or event.startswith(b"event: message_stop")
        stream.feed(event)
    assert stream.complete
    assert stream.ended == ended


def test_a_message_that_is_left_owes_its_prompt_and_an_upper_estimate() -> None:
    """The prompt is told first; until the end the output is what came, in deltas or in bytes, whichever is more."""
    stream = stream_of("messages")
    events = events_of("messages")
    seen = [stream.usage]
    for event in events[:2]:
        stream.feed(event)
        seen.append(stream.usage)
    assert seen == [None, Usage(11, 0), Usage(11, 0)]
    for number, event in enumerate(events[2:5], start=1):
        stream.feed(event)
        assert stream.usage == Usage(11, (0, 3, 5, 8)[number])


def test_many_small_deltas_are_tokens_each() -> None:
    """Where the text is shorter than the tokens were, the deltas count."""
    stream = stream_of("messages")
    for _ in range(10):
        told = {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "a"}, "index": 0}
        stream.feed(f"event: content_block_delta\ndata: {compact(told)}\n\n".encode())
    assert stream.usage == Usage(HELD, 10)


@pytest.mark.parametrize(("route", "read"), [("messages", read_messages_event), ("responses", read_responses_event)])
def test_deltas_are_worth_what_was_learned(route: str, read: Reader) -> None:
    """A stream that is left owes its deltas at the caller's own rate, and a whole one says how many it had."""
    learned = TextRates(RATES.tokens_per_byte, tokens_per_delta=1.5)
    stream = EventFilter(read, HELD, learned, clock=lambda: 0.0)
    for event in events_of(route, output=50)[:-3]:
        stream.feed(event)
    assert stream.usage is not None
    assert (stream.usage.output_tokens, stream.deltas) == (75, 0)
    for event in events_of(route, output=50)[-3:]:
        stream.feed(event)
    assert (stream.usage.output_tokens, stream.deltas) == (50, 50)


@pytest.mark.parametrize(("route", "read"), [("messages", read_messages_event), ("responses", read_responses_event)])
def test_no_estimate_is_above_what_was_asked_for(route: str, read: Reader) -> None:
    """A client that leaves never owes more output than the maximum that its request set."""
    stream = EventFilter(read, HELD, RATES, most_output=6, clock=lambda: 0.0)
    for event in events_of(route)[:-2]:
        stream.feed(event)
    assert stream.usage is not None
    assert stream.usage.output_tokens == 6


def test_a_response_that_is_left_owes_its_held_prompt_and_an_upper_estimate() -> None:
    """The Responses format tells nothing before its end, so the prompt is as held."""
    stream = stream_of("responses")
    events = events_of("responses")
    for event in events[:4]:
        stream.feed(event)
    assert stream.usage is None
    for event in events[4:6]:
        stream.feed(event)
    assert stream.usage == Usage(HELD, 5)


class Clock:
    """A clock that is set by hand."""

    now_s = 5.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


@pytest.mark.parametrize(
    ("route", "read", "prompt"), [("messages", read_messages_event, 11), ("responses", read_responses_event, HELD)]
)
def test_text_that_is_held_back_is_not_for_nothing(route: str, read: Reader, prompt: int) -> None:
    """A stream that tells nothing for long owes what it may have generated, at most the maximum."""
    clock = Clock()
    stream = EventFilter(read, HELD, RATES, most_output=5_000, clock=clock)
    stream.feed(events_of(route)[0])
    clock.now_s += 10
    assert stream.usage == Usage(prompt, 10 * FASTEST_TOKENS_PER_S)
    clock.now_s += 90
    assert stream.usage == Usage(prompt, 5_000)


@pytest.mark.parametrize("route", ["messages", "responses"])
def test_a_stream_whose_text_flows_owes_what_came(route: str) -> None:
    """However slow the engine is, and after a silence that text has ended, nothing is added to what was told."""
    clock = Clock()
    read = read_messages_event if route == "messages" else read_responses_event
    stream = EventFilter(read, HELD, RATES, clock=clock)
    still = stream_of(route)
    for event in events_of(route, output=50)[:-3]:
        stream.feed(event)
        still.feed(event)
        assert stream.usage == still.usage
        clock.now_s += 0.1 * QUIET_S
    assert still.usage is not None
    assert still.usage.output_tokens > 100
    clock.now_s += 20
    assert stream.usage != still.usage
    for each in (stream, still):
        each.feed(events_of(route)[4])
    assert stream.usage == still.usage


@pytest.mark.parametrize("route", ["messages", "responses"])
def test_a_silence_adds_nothing_to_usage_that_was_told(route: str) -> None:
    """What the engine told at the end is what is owed, however late that is asked for."""
    clock = Clock()
    read = read_messages_event if route == "messages" else read_responses_event
    stream = EventFilter(read, HELD, RATES, clock=clock)
    stream.feed(b"".join(events_of(route)))
    clock.now_s += 100
    assert stream.usage == Usage(11, 5)


@pytest.mark.parametrize(
    ("kind", "delta"),
    [
        ("text_delta", {"text": "x" * 80}),
        ("thinking_delta", {"thinking": "x" * 80}),
        ("input_json_delta", {"partial_json": "x" * 80}),
    ],
)
def test_every_kind_of_delta_counts(kind: str, delta: dict[str, str]) -> None:
    """Text, thinking and tool arguments are output alike."""
    stream = stream_of("messages")
    told = {"type": "content_block_delta", "delta": {"type": kind, **delta}, "index": 0}
    stream.feed(f"event: content_block_delta\ndata: {compact(told)}\n\n".encode())
    assert stream.usage == Usage(HELD, 10)


@pytest.mark.parametrize("name", ["output_text", "reasoning_text", "function_call_arguments", "custom_tool_call_input"])
def test_every_kind_of_response_delta_counts(name: str) -> None:
    """So they are in the Responses format."""
    stream = stream_of("responses")
    told = {"type": f"response.{name}.delta", "delta": "é" * 40}
    stream.feed(f"event: response.{name}.delta\ndata: {compact(told)}\n\n".encode())
    assert stream.usage == Usage(HELD, 10)


def test_message_stop_alone_proves_nothing() -> None:
    """Without a stop reason the answer is not whole: an engine whose core was killed still ends its stream."""
    stream = stream_of("messages")
    events = events_of("messages")
    for event in (*events[:3], events[-1]):
        stream.feed(event)
    assert not stream.complete
    stream = stream_of("messages")
    for event in events:
        stream.feed(event.replace(b'"stop_reason":"max_tokens"', b'"stop_reason":null'))
    assert not stream.complete
    assert stream.usage == Usage(11, 5)


@pytest.mark.parametrize("name", ["response.completed", "response.incomplete", "response.failed"])
def test_a_response_ends_with_any_of_its_last_events(name: str) -> None:
    """All three end an answer; only one of them ends it by itself."""
    stream = stream_of("responses")
    for event in events_of("responses", ended=True):
        stream.feed(event.replace(b"response.completed", name.encode()))
    assert stream.complete
    assert stream.ended == (name == "response.completed")


def test_a_failed_response_without_usage_owes_its_estimate() -> None:
    """A last event that tells no usage leaves the estimate."""
    stream = stream_of("responses")
    stream.feed(events_of("responses")[4])
    stream.feed(b'event: response.failed\ndata: {"type":"response.failed","response":{"status":"failed"}}\n\n')
    assert stream.complete
    assert stream.usage == Usage(HELD, 3)


def test_a_last_delta_with_output_only_keeps_the_prompt() -> None:
    """An engine that tells the prompt at the start only is read as well as vLLM, which tells it twice."""
    stream = stream_of("messages")
    stream.feed(events_of("messages")[0])
    told = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}
    stream.feed(f"event: message_delta\ndata: {compact(told)}\n\n".encode())
    assert stream.usage == Usage(11, 3)


@pytest.mark.parametrize("route", ["messages", "responses"])
@pytest.mark.parametrize(
    "event", [b'event: error\ndata: {"type":"error"}\n\n', b'data: {"error":{"message":"no"}}\n\n']
)
def test_an_engines_error_is_seen_and_passed(route: str, event: bytes) -> None:
    """An error event reaches the client as it is."""
    stream = stream_of(route)
    assert stream.feed(event) == event
    assert stream.error_seen
    assert not stream.complete


@pytest.mark.parametrize("route", ["messages", "responses"])
def test_other_forms_of_events_are_read_too(route: str) -> None:
    """CRLF, comments and pings pass as they are, and hide nothing."""
    stream, passed = stream_of(route), b""
    whole = b": hello\r\n\r\nevent: ping\r\ndata: {}\r\n\r\n" + b"".join(events_of(route)).replace(b"\n", b"\r\n")
    for start in range(0, len(whole), 7):
        passed += stream.feed(whole[start : start + 7])
    assert stream.complete
    assert stream.usage == Usage(11, 5)
    assert passed + stream.flush() == whole


@pytest.mark.parametrize("route", ["messages", "responses"])
@pytest.mark.parametrize("garbled", [b"data: {garbled}\n\n", b"data: \xff\n\n", b"data: " + b"[" * 100_000 + b"\n\n"])
def test_garbled_events_are_told_as_such(route: str, garbled: bytes) -> None:
    """What cannot be read raises, and what was seen before is still known."""
    stream = stream_of(route)
    for event in events_of(route)[:6]:
        stream.feed(event)
    before = stream.usage
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError, RecursionError)):
        stream.feed(garbled)
    assert stream.usage == before


def test_an_endless_event_is_refused() -> None:
    """An event that never ends cannot fill the memory."""
    stream = stream_of("messages")
    for _ in range(16):
        assert stream.feed(b"x" * 1024 * 1024) == b""
    with pytest.raises(EventTooLargeError):
        stream.feed(b"x")


USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None}
#: A fresh prompt as vLLM tells it: what the cache took counts as input, like what it did not.
CACHE_WRITTEN = {"cache_creation_input_tokens": 16, "cache_read_input_tokens": 0}
CACHED_USAGE: dict[str, Any] = {**USAGE, "prompt_tokens_details": {"cached_tokens": 5}}


@pytest.mark.parametrize(
    ("route", "body", "usage", "ended"),
    [
        ("chat", compact({"choices": [{"finish_reason": "stop"}], "usage": USAGE}), Usage(9, 4), True),
        ("chat", compact({"choices": [{"finish_reason": "tool_calls"}], "usage": CACHED_USAGE}), Usage(9, 4, 5), True),
        ("chat", compact({"choices": [{"finish_reason": "length"}], "usage": USAGE}), Usage(9, 4), False),
        (
            "completions",
            compact({"choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}], "usage": USAGE}),
            Usage(9, 4),
            False,
        ),
        ("chat", '{"choices":[],"usage":null}', None, False),
        ("chat", "not json", None, False),
        ("messages", messages_answer("m", 9, 4, "end_turn", cached=5), Usage(9, 4, 5), True),
        ("messages", messages_answer("m", 9, 4, "stop_sequence"), Usage(9, 4), True),
        ("messages", messages_answer("m", 9, 4, "max_tokens"), Usage(9, 4), False),
        (
            "messages",
            compact({"stop_reason": None, "usage": {"input_tokens": 14, "output_tokens": 3, **CACHE_WRITTEN}}),
            Usage(30, 3),
            False,
        ),
        ("messages", "[]", None, False),
        ("responses", responses_answer(BODY, 9, 4, "completed", cached=5), Usage(9, 4, 5), True),
        ("responses", responses_answer(BODY, 9, 4, "incomplete"), Usage(9, 4), False),
        ("responses", "{}", None, False),
        ("count_tokens", count_answer(9), Usage(0, 0), False),
        ("count_tokens", "null", None, False),
    ],
)
def test_what_a_whole_answer_tells(route: Route, body: str | bytes, usage: Usage | None, ended: bool) -> None:
    """Each format's usage is read in its own terms; what is no such answer has none."""
    outcome = answer_outcome(route, body if isinstance(body, bytes) else body.encode())
    assert (outcome.usage, outcome.ended) == (usage, ended)
