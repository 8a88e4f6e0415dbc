"""The stream filter: what a client gets is what the engine would have sent it directly."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.hold import Usage
from ratelimit.gateway.sse import EventTooLargeError, StreamFilter, answer_usage
from ratelimit.gateway.wire import ShownUsage
from tests.support.fake_upstream import compact, stream_events

OPTIONS: dict[ShownUsage, dict[str, bool] | None] = {
    "none": None,
    "final": {"include_usage": True},
    "every chunk": {"include_usage": True, "continuous_usage_stats": True},
}
FULL = {"include_usage": True, "continuous_usage_stats": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": 5}


def relayed(stream: StreamFilter, parts: list[bytes]) -> bytes:
    """What a client gets of these reads, the end as the proxy makes it for a complete stream."""
    passed = b"".join(stream.feed(part) for part in parts) + stream.flush()
    return passed + b"data: [DONE]\n\n" if stream.done else passed


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
    assert relayed(StreamFilter(shown), asked) == direct


@given(shown=st.sampled_from(list(OPTIONS)), cuts=st.lists(st.integers(0, 3000), max_size=40), n=st.integers(1, 3))
def test_split_points_change_nothing(shown: ShownUsage, cuts: list[int], n: int) -> None:
    """However the network cuts the stream, the client's bytes, the usage and completeness are the same."""
    events = events_for(FULL, n=n)
    whole = b"".join(events)
    bounds = [0, *sorted(cut % len(whole) for cut in cuts), len(whole)]
    parts = [whole[a:b] for a, b in pairwise(bounds) if a < b]
    by_event, by_part = StreamFilter(shown, choices=n), StreamFilter(shown, choices=n)
    assert relayed(by_part, parts) == relayed(by_event, events)
    assert by_part.usage == by_event.usage == Usage(11, 5 * n)
    assert by_part.complete


def test_every_single_byte_boundary() -> None:
    """A stream cut in two at any byte comes out the same."""
    whole = b"".join(events_for(FULL))
    direct = b"".join(events_for(None))
    for cut in range(1, len(whole)):
        assert relayed(StreamFilter("none"), [whole[:cut], whole[cut:]]) == direct


def test_byte_by_byte() -> None:
    """A stream that arrives one byte at a time comes out the same."""
    whole = b"".join(events_for(FULL))
    parts = [whole[i : i + 1] for i in range(len(whole))]
    assert relayed(StreamFilter("none"), parts) == b"".join(events_for(None))


def test_usage_is_known_along_the_way() -> None:
    """The prompt's length is known after the first chunk, and the output so far after each later one."""
    stream = StreamFilter("none")
    events = events_for(FULL)
    stream.feed(events[0])
    assert stream.usage == Usage(11, 0)
    stream.feed(events[1])
    stream.feed(events[2])
    assert stream.usage == Usage(11, 2)
    assert not stream.complete


def test_usage_of_several_choices_adds_up() -> None:
    """Each choice's chunks tell its own output; what the request used so far is their sum."""
    stream = StreamFilter("none", choices=2)
    for event in events_for(FULL, n=2)[:6]:
        stream.feed(event)
    assert stream.usage == Usage(11, 4)


def test_several_prompts_add_up() -> None:
    """Prompts of one completions request are each counted once, whatever the number of choices."""
    stream = StreamFilter("none", choices=4, prompts=2)
    for index, prompt in ((0, 10), (1, 10), (2, 7), (3, 7)):
        choice = {"index": index, "text": "a", "finish_reason": None}
        told = {"prompt_tokens": prompt, "completion_tokens": 1}
        stream.feed(f"data: {compact({'choices': [choice], 'usage': told})}\n\n".encode())
    assert stream.usage == Usage(17, 4)


def test_fingerprint_moves_back_to_the_finishing_chunk() -> None:
    """A client that did not ask for usage finds the fingerprint where the engine alone would have put it."""
    out = relayed(StreamFilter("none"), events_for(FULL))
    last = out.split(b"\n\n")[-3]
    assert json.loads(last[5:])["system_fingerprint"]


def test_done_without_finish_reason_is_not_complete() -> None:
    """``[DONE]`` alone proves nothing: an engine whose core was killed sends it too."""
    stream = StreamFilter("none")
    events = events_for(FULL)
    for event in (*events[:2], events[-1]):
        stream.feed(event)
    assert stream.done
    assert not stream.complete


def test_engine_error_is_seen_and_passed() -> None:
    """An error event of the engine reaches the client as it is."""
    stream = StreamFilter("none")
    event = b'data: {"error":{"message":"no","code":500}}\n\n'
    assert stream.feed(event) == event
    assert stream.error_seen


def test_other_engines_spacing() -> None:
    """Chunks with spaces in their JSON lose their usage too."""
    stream = StreamFilter("none")
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
    stream = StreamFilter("none")
    out = stream.feed(f"data: {compact(chunk)}\n\n".encode())
    del chunk["usage"]
    assert out == f"data: {compact(chunk)}\n\n".encode()
    assert stream.usage == Usage(9, 1, 4)


def test_an_endless_event_is_refused() -> None:
    """An event that never ends is given up at the bound, so it cannot fill the memory."""
    stream = StreamFilter("none", max_event_bytes=1000)
    for _ in range(10):
        assert stream.feed(b"x" * 100) == b""
    with pytest.raises(EventTooLargeError):
        stream.feed(b"x")


def test_usage_of_a_whole_answer() -> None:
    """An answer's usage is read; what is no answer has none."""
    body = b'{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"prompt_tokens_details":null}}'
    assert answer_usage(body) == Usage(9, 4)
    assert answer_usage(b"not json") is None
    assert answer_usage(b'{"usage":null}') is None
