"""The stream filter: what a client gets is what the engine would have sent it directly."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.formats.answers import answer_outcome
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.sse import EventTooLargeError, StreamFilter
from ratelimit.gateway.wire import ShownUsage
from tests.support.fake_formats import compact
from tests.support.fake_upstream import stream_events, whole_answer

OPTIONS: dict[ShownUsage, dict[str, bool] | None] = {
    "none": None,
    "final": {"include_usage": True},
    "every chunk": {"include_usage": True, "continuous_usage_stats": True},
}
FULL = {"include_usage": True, "continuous_usage_stats": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": 5}

#: Prompt tokens that a request held by estimate.
HELD = 40


def single(shown: ShownUsage) -> StreamFilter:
    """The filter of a stream of one choice."""
    return StreamFilter(shown, 1, 1, HELD)


def relayed(stream: StreamFilter, parts: list[bytes]) -> bytes:
    """What a client gets of these reads."""
    return b"".join(stream.feed(part) for part in parts) + stream.flush()


def events_for(options: dict[str, bool] | None, **more: Any) -> list[bytes]:
    """The stream that the engine sends for these options."""
    body: dict[str, Any] = {**CHAT, **more, "stream_options": options}
    return stream_events(body, chat=True)


@pytest.mark.parametrize("shown", ["none", "final", "every chunk"])
@pytest.mark.parametrize("chat", [True, False])
def test_filtered_stream_equals_the_direct_one(shown: ShownUsage, chat: bool) -> None:
    """Chunk by chunk, a filtered stream is byte for byte what the engine sends a client that asks itself."""
    body = {**CHAT, "prompt": "hello"}
    direct = b"".join(stream_events({**body, "stream_options": OPTIONS[shown]}, chat))
    asked = stream_events({**body, "stream_options": FULL}, chat)
    assert relayed(single(shown), asked) == direct


@given(shown=st.sampled_from(list(OPTIONS)), cuts=st.lists(st.integers(0, 3000), max_size=40), n=st.integers(1, 3))
def test_split_points_change_nothing(shown: ShownUsage, cuts: list[int], n: int) -> None:
    """However the network cuts the stream, the client's bytes, the usage and completeness are the same."""
    events = events_for(FULL, n=n)
    whole = b"".join(events)
    bounds = [0, *sorted(cut % len(whole) for cut in cuts), len(whole)]
    parts = [whole[a:b] for a, b in pairwise(bounds) if a < b]
    by_event, by_part = StreamFilter(shown, n, 1, HELD), StreamFilter(shown, n, 1, HELD)
    assert relayed(by_part, parts) == relayed(by_event, events)
    assert by_part.usage == by_event.usage == Usage(11, 5 * n)
    assert by_part.complete


def test_every_single_byte_boundary() -> None:
    """A stream cut in two at any byte comes out the same."""
    whole = b"".join(events_for(FULL))
    direct = b"".join(events_for(None))
    for cut in range(1, len(whole)):
        assert relayed(single("none"), [whole[:cut], whole[cut:]]) == direct


def test_byte_by_byte() -> None:
    """A stream that arrives one byte at a time comes out the same."""
    whole = b"".join(events_for(FULL))
    parts = [whole[i : i + 1] for i in range(len(whole))]
    assert relayed(single("none"), parts) == b"".join(events_for(None))


def test_usage_is_known_along_the_way() -> None:
    """The prompt's length is known after the first chunk, and the output so far after each later one."""
    stream = single("none")
    events = events_for(FULL)
    stream.feed(events[0])
    assert stream.usage == Usage(11, 0)
    stream.feed(events[1])
    stream.feed(events[2])
    assert stream.usage == Usage(11, 2)
    assert not stream.complete


def test_usage_of_several_choices_adds_up() -> None:
    """Each choice's chunks tell its own output; what the request used so far is their sum."""
    stream = StreamFilter("none", 2, 1, HELD)
    for event in events_for(FULL, n=2)[:6]:
        stream.feed(event)
    assert stream.usage == Usage(11, 4)


def test_several_prompts_add_up() -> None:
    """Prompts of one completions request are each counted once, whatever the number of choices."""
    stream = StreamFilter("none", 4, 2, HELD)
    for index, prompt in ((0, 10), (1, 10), (2, 7), (3, 7)):
        choice = {"index": index, "text": "a", "finish_reason": None}
        told = {"prompt_tokens": prompt, "completion_tokens": 1}
        stream.feed(f"data: {compact({'choices': [choice], 'usage': told})}\n\n".encode())
    assert stream.usage == Usage(17, 4)


def test_prompts_that_have_not_reported_count_as_held() -> None:
    """From the first chunk to the last, a stream of several prompts never seems to owe less than its prompts."""
    prompts = ["a" * 400, "b" * 40, "c" * 40, "d" * 40]
    body = {"model": "m", "prompt": prompts, "n": 2, "max_tokens": 3, "stream_options": FULL}
    events = stream_events(body, chat=False)
    stream = StreamFilter("none", 8, 4, held_prompt_tokens=130)
    stream.feed(events[0])
    assert stream.usage == Usage(100 + 3 * 33 - 1, 1)  # three quarters of 130, rounded up
    stream.feed(events[1])
    assert stream.usage == Usage(100 + 3 * 33 - 1, 2)
    stream.feed(events[2])
    assert stream.usage == Usage(110 + 65, 3)
    for event in events[3:8]:
        stream.feed(event)
    assert stream.usage == Usage(130, 8)
    for event in events[8:]:
        stream.feed(event)
    assert stream.usage == Usage(130, 24)
    assert stream.complete


def lines_before_data(event: bytes) -> bytes:
    return b": ping\nevent: message\n" + event


def lines_after_data(event: bytes) -> bytes:
    return event[:-1] + b"id: 7\nretry: 5\n\n"


def with_crlf(event: bytes) -> bytes:
    return event[:-2] + b"\r\n\r\n"


@pytest.mark.parametrize("change", [lines_before_data, lines_after_data, with_crlf])
@pytest.mark.parametrize("shown", ["none", "final", "every chunk"])
@pytest.mark.parametrize("reads", ["by event", "pairs", "all at once", "bytes"])
def test_event_streams_of_every_form(change: Callable[[bytes], bytes], shown: ShownUsage, reads: str) -> None:
    """Comments, other fields and CRLF pass as they are, and hide no usage, no end and no finish reason."""
    asked = [change(event) for event in events_for(FULL)]
    whole = b"".join(asked)
    parts = {
        "by event": asked,
        "pairs": [b"".join(asked[at : at + 2]) for at in range(0, len(asked), 2)],
        "all at once": [whole],
        "bytes": [whole[at : at + 1] for at in range(len(whole))],
    }[reads]
    stream = single(shown)
    out = relayed(stream, parts)
    direct = [change(event) for event in events_for(OPTIONS[shown])[:-1]]
    assert out == b"".join(direct) + b"data: [DONE]\n\n"
    assert stream.usage == Usage(11, 5)
    assert stream.complete


@pytest.mark.parametrize("change", [lines_before_data, lines_after_data, with_crlf])
def test_one_odd_event_among_plain_ones(change: Callable[[bytes], bytes]) -> None:
    """In one read, an event of several lines is told from the plain ones around it, wherever it comes."""
    plain = events_for(FULL)[1:4]
    for odd in range(3):
        stream = single("none")
        out = stream.feed(b"".join(change(event) if at == odd else event for at, event in enumerate(plain)))
        assert out.count(b'"usage":{"') == 0
        assert stream.usage == Usage(11, 3)


@pytest.mark.parametrize("change", [lines_before_data, lines_after_data, with_crlf])
def test_usage_of_an_odd_event_is_read_at_once(change: Callable[[bytes], bytes]) -> None:
    """What an event of several lines reports is known as soon as it came, as for a plain one."""
    stream = single("none")
    for output, event in enumerate(events_for(FULL)[:4]):
        stream.feed(change(event))
        assert stream.usage == Usage(11, output)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("together", [True, False])
def test_comments_are_never_taken_for_usage(at: int, together: bool) -> None:
    """A comment passes untouched, alone and among other events of one read, even where it reads like usage."""
    comment = b': {"a":1,"usage":{"prompt_tokens":7}}\n\n'
    events = events_for(FULL)[1:3]
    events.insert(at, comment)
    stream = single("none")
    out = stream.feed(b"".join(events)) if together else b"".join(map(stream.feed, events))
    assert comment in out
    assert stream.usage == Usage(11, 2)


@pytest.mark.parametrize(
    "garbled",
    [
        b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":"x"}}\n\n',
        b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens"}}\n\n',
        b'data: {"choices":[{"index":0,"a":"\xff"}],"usage":{"prompt_tokens":\xff}}\n\n',
    ],
)
def test_unreadable_usage_leaves_the_last_one(garbled: bytes) -> None:
    """Usage that cannot be read raises nothing where an account is settled, and loses nothing read before."""
    stream = single("none")
    stream.feed(events_for(FULL)[1])
    assert stream.usage == Usage(11, 1)
    stream.feed(garbled)
    assert stream.usage == Usage(11, 1)
    stream.feed(events_for(FULL)[2])
    assert stream.usage == Usage(11, 2)


@pytest.mark.parametrize("ends_after", [None, 1, 3])
def test_answers_that_end_by_themselves_are_complete(ends_after: int | None) -> None:
    """An answer is complete by its finish reason, whether or not it took all that it was allowed."""
    body = {**CHAT, "stream_options": FULL}
    stream = single("none")
    relayed(stream, stream_events(body, chat=True, ends_after=ends_after))
    assert stream.complete
    assert stream.ended == (ends_after is not None)
    assert stream.usage == Usage(11, ends_after or 5)
    outcome = answer_outcome("chat", whole_answer(CHAT, chat=True, ends_after=ends_after))
    assert (outcome.usage, outcome.ended) == (Usage(11, ends_after or 5), ends_after is not None)


def test_fingerprint_moves_back_to_the_finishing_chunk() -> None:
    """A client that did not ask for usage finds the fingerprint where the engine alone would have put it."""
    out = relayed(single("none"), events_for(FULL))
    last = out.split(b"\n\n")[-3]
    assert json.loads(last[5:])["system_fingerprint"]


def test_done_without_finish_reason_is_not_complete() -> None:
    """``[DONE]`` alone proves nothing: an engine whose core was killed sends it too."""
    stream = single("none")
    events = events_for(FULL)
    for event in (*events[:2], events[-1]):
        stream.feed(event)
    assert stream.done
    assert not stream.complete
    assert not stream.ended


def test_all_choices_must_end_by_themselves() -> None:
    """One choice that was cut off at its maximum says that the answer did not end by itself."""
    body = {**CHAT, "n": 2, "stream_options": FULL}
    whole, cut = stream_events(body, chat=True, ends_after=3), stream_events(body, chat=True)
    stream = StreamFilter("none", 2, 1, HELD)
    for event in (whole[-4], cut[-3]):  # the first choice's last chunk, and the second's
        stream.feed(event)
    assert stream.complete
    assert not stream.ended


def test_an_engine_that_tells_no_usage_owes_its_chunks() -> None:
    """Where a stream is left before any usage was told, its prompt is as held, and each chunk was a token at least."""
    for choices in (1, 2):
        stream = StreamFilter("none", choices, 1, HELD)
        assert stream.usage is None
        for event in events_for(None, n=choices)[choices : choices + 4]:
            stream.feed(event)
        assert stream.usage == Usage(HELD, 4)


def test_engine_error_is_seen_and_passed() -> None:
    """An error event of the engine reaches the client as it is."""
    stream = single("none")
    event = b'data: {"error":{"message":"no","code":500}}\n\n'
    assert stream.feed(event) == event
    assert stream.error_seen
    assert stream.feed(b"data: [DONE]\n\n") + stream.flush() == b""


def test_other_engines_spacing() -> None:
    """Chunks with spaces in their JSON lose their usage too."""
    stream = single("none")
    chunk = {"choices": [{"index": 0, "finish_reason": None}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    out = stream.feed(f"data: {json.dumps(chunk)}\n\n".encode())
    assert json.loads(out[5:]) == {"choices": [{"index": 0, "finish_reason": None}]}
    assert stream.usage == Usage(3, 1)


def test_details_inside_usage_go_with_it() -> None:
    """Usage with nested details is taken out whole, and cached tokens are read from it."""
    told = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    chunk: dict[str, Any] = {
        "choices": [{"index": 0, "delta": {}, "finish_reason": None}],
        "usage": told,
        "prompt_text": None,
    }
    stream = single("none")
    out = stream.feed(f"data: {compact(chunk)}\n\n".encode())
    del chunk["usage"]
    assert out == f"data: {compact(chunk)}\n\n".encode()
    assert stream.usage == Usage(9, 1, 4)


def test_an_endless_event_is_refused() -> None:
    """An event that never ends is given up at the bound, so it cannot fill the memory."""
    stream = StreamFilter("none", 1, 1, HELD, max_event_bytes=1000)
    for _ in range(10):
        assert stream.feed(b"x" * 100) == b""
    with pytest.raises(EventTooLargeError):
        stream.feed(b"x")
