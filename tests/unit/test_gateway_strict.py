"""Bodies that would take long to read: what is refused before it is built, and what is not touched."""

from __future__ import annotations

import json
import re
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.formats.strict import MAX_PARTS, read_members
from ratelimit.gateway.wire import Route, parse_request

_MIB = 2**20
HEAD = b'{"model":"m",'


def refused(route: Route, body: bytes) -> str:
    """Why a body is refused."""
    with pytest.raises(Rejection) as caught:
        parse_request(route, body)
    assert caught.value.status == 400
    return caught.value.message


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("responses", HEAD + b'"input":[[]' + b",[]" * MAX_PARTS + b"]}"),
        ("chat", HEAD + b'"messages":[{}' + b",{}" * MAX_PARTS + b"]}"),
        ("messages", HEAD + b'"messages":[""' + b',""' * MAX_PARTS + b"]}"),
        ("chat", HEAD + b'"user":"\\\\","stop":[""' + b',"\\""' * MAX_PARTS + b"]}"),
        ("completions", HEAD + b'"prompt":[1' + b",1" * 10 * MAX_PARTS + b"]}"),
    ],
    ids=["lists", "objects", "strings", "quotes", "token ids"],
)
def test_a_body_of_too_many_parts_is_refused_before_it_is_built(route: Route, body: bytes) -> None:
    """Parts cost far more than their bytes, so they are counted first."""
    assert "elements and members" in refused(route, body)


def test_text_is_not_parts() -> None:
    """However much of a text looks like JSON, it is one string."""
    text = 'a, [b], {"c": "\\\\"},' * MAX_PARTS
    for spaced in ((", ", ": "), (",", ":")):
        body = json.dumps({"model": "m", "prompt": text}, separators=spaced).encode()
        assert parse_request("completions", body).prompt_bytes >= len(text)


def test_a_prompt_of_token_ids_may_be_long() -> None:
    """A prompt as token ids has one part a token, and a context may have a million."""
    body = json.dumps({"model": "m", "prompt": [7] * 5 * MAX_PARTS}).encode()
    assert parse_request("completions", body).prompt_tokens == 5 * MAX_PARTS


@given(st.recursive(st.text(alphabet='",[{\\a:') | st.none(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_parts_are_counted_as_they_are(value: Any) -> None:
    """A body is refused exactly from one part above the bound, whatever its strings hold."""
    body = json.dumps({"a": value}).encode()
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", body.decode())
    parts = sum(bare.count(mark) for mark in "[{,")
    read_members(body, parts)
    with pytest.raises(Rejection):
        read_members(body, parts - 1)


@pytest.mark.parametrize("unit", [b"a", b"\\n"], ids=["plain", "escaped"])
def test_a_long_name_costs_what_it_holds(unit: bytes) -> None:
    """A name is not read with a memory of every character."""
    body = b'{ "' + unit * (4 * _MIB // len(unit)) + b'":1}'
    tracemalloc.start()
    try:
        assert "name is longer" in refused("chat", body)
        assert tracemalloc.get_traced_memory()[1] < 40 * _MIB
    finally:
        tracemalloc.stop()


def test_many_members_are_refused_at_once() -> None:
    """No route has a thousand members."""
    members = b",".join(b'"%d":1' % number for number in range(50_000))
    assert "members of its own" in refused("chat", b"{" + members + b',"0":1}')


def test_a_repeated_name_is_told_without_reading_all_again() -> None:
    """The name is found where the bodies part, and told in short."""
    body = b'{"model":"m","prompt":"%s", "user":"a","prompt":1}' % (b"x" * 4 * _MIB)
    tracemalloc.start()
    try:
        assert refused("completions", body) == "'prompt' occurs twice in the request body."
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()
