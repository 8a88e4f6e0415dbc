"""Malformed HTTP on a bare socket: each request is refused or harmless, and none reaches a replica twice or unkeyed."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from ratelimit.gateway.hold import Usage
from tests.integration.gateway_bench import Bench
from tests.support.gateway import MODEL, make_key

PATH = "/v1/completions"
BODY = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 2}).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
READ_S = 10.0


def head(bench: Bench, *fields: bytes, key: str | None = None, path: str = PATH, connection: bytes = b"close") -> bytes:
    """A request's head with the bench's key and these fields."""
    secret = (bench.secret if key is None else key).encode()
    about = b"Connection: " + connection, b"Authorization: Bearer " + secret
    lines = (b"POST %s HTTP/1.1" % path.encode(), b"Host: x", *about, *fields)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def length(size: int = len(BODY)) -> bytes:
    """The field that tells the body's length."""
    return b"Content-Length: %d" % size


async def exchange(bench: Bench, sent: bytes, leaves: bool = False) -> list[int]:
    """Send this on one connection, and read until the server closes it; the answers' statuses."""
    settings = bench.gateway.settings
    reader, writer = await asyncio.open_connection(settings.host, settings.port)
    try:
        writer.write(sent)
        await writer.drain()
        if leaves:
            writer.write_eof()
        answered = await asyncio.wait_for(reader.read(-1), READ_S)
    except ConnectionError:
        return []
    finally:
        writer.close()
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answered)]


async def reached(bench: Bench) -> list[dict[str, Any]]:
    """What reached the replica, once nothing is under way."""
    await bench.idle()
    return bench.upstream.bodies


@pytest.mark.parametrize(
    "fields",
    [
        [length(), length(3)],
        [length(3), length()],
        [b"Content-Length: %d, 3" % len(BODY)],
        [b"Content-Length: +%d" % len(BODY)],
        [b"Content-Length: -1"],
        [b"Content-Length: 0x10"],
        [b"Content-Length: 99999999999999999999999"],
        [length(), b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", length()],
        [b"Transfer-Encoding: chunked, identity"],
        [b"Transfer-Encoding: xchunked"],
        [b"Content-Length : %d" % len(BODY)],
        [b"X-Folded: a\r\n b", length()],
        [b"no colon at all", length()],
        [b"X-Nul: a\x00b", length()],
        [b"X\x01Name: a", length()],
    ],
    ids=lambda fields: repr(fields)[:50],
)
async def test_ambiguous_heads_are_refused_or_harmless(bench: Bench, fields: list[bytes]) -> None:
    """Where a body ends is never a matter of taste: at most this one request is served, and never what follows it."""
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    statuses = await exchange(bench, head(bench, *fields) + BODY + smuggled)
    assert 500 not in statuses
    bodies = await reached(bench)
    assert len(bodies) <= 1
    assert len(bodies) == statuses.count(200)
    assert all(body["prompt"] == "hello" for body in bodies)


@pytest.mark.parametrize(
    "fields",
    [
        [length(), length(3)],
        [b"Content-Length: %d, 3" % len(BODY)],
        [length(), b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", length()],
        [b"Transfer-Encoding: chunked, identity"],
        [b"Content-Length : %d" % len(BODY)],
    ],
    ids=lambda fields: repr(fields)[:50],
)
async def test_two_ways_to_end_a_body_are_refused(bench: Bench, fields: list[bytes]) -> None:
    """The forms that request smuggling is made of get a 400 and nothing else, and the connection is closed."""
    assert await exchange(bench, head(bench, *fields) + CHUNKED) == [400]
    assert await reached(bench) == []


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"-1\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\n" + BODY,
        b"3\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"%x;a=b\r\n%s0\r\n\r\n" % (len(BODY), BODY),
    ],
)
async def test_garbled_chunks_are_refused(bench: Bench, chunks: bytes) -> None:
    """A chunked body that does not add up never becomes a request."""
    statuses = await exchange(bench, head(bench, b"Transfer-Encoding: chunked") + chunks)
    assert 200 not in statuses
    assert 500 not in statuses
    assert await reached(bench) == []


async def test_a_body_that_ends_early_is_no_request(bench: Bench) -> None:
    """A client that closes in the middle of its body has asked for nothing."""
    assert await exchange(bench, head(bench, length(len(BODY) + 10)) + BODY, leaves=True) == []
    assert await exchange(bench, head(bench, b"Transfer-Encoding: chunked") + CHUNKED[:-5], leaves=True) == []
    assert await reached(bench) == []


@pytest.mark.parametrize("swapped", [False, True])
async def test_two_keys_are_no_key(bench: Bench, swapped: bool) -> None:
    """Of two keys none is taken, in whatever order and headers they come."""
    secret, other = make_key()
    await bench.publish(None, other)
    first, second = (bench.secret, secret) if swapped else (secret, bench.secret)
    for field in (b"Authorization: Bearer ", b"authorization: bearer ", b"X-Api-Key: "):
        request = head(bench, length(), field + second.encode(), key=first) + BODY
        assert await exchange(bench, request) == [401]
    assert await reached(bench) == []


async def test_pipelined_requests_are_each_served_once(bench: Bench) -> None:
    """Requests sent at once on one connection are answered in order, each with its own key."""
    good = head(bench, length(), connection=b"keep-alive") + BODY
    bad = head(bench, length(), key="pn-unknown", connection=b"keep-alive") + BODY
    last = head(bench, length()) + BODY
    assert await exchange(bench, good + bad + last) == [200, 401, 200]
    assert len(await reached(bench)) == 2


@pytest.mark.parametrize(
    "fields",
    [
        [b"X-Large: " + b"a" * 1_000_000],
        [b"X-%d: a" % number for number in range(100_000)],
        [b"A" * 1_000_000 + b": b"],
    ],
    ids=["value", "many", "name"],
)
async def test_oversized_headers_are_refused(bench: Bench, fields: list[bytes]) -> None:
    """A head without end is cut off with a 4xx, or the connection, and never becomes a request."""
    statuses = await exchange(bench, head(bench, *fields, length()) + BODY)
    assert all(400 <= status < 500 for status in statuses)
    assert await reached(bench) == []


async def test_a_clients_headers_never_reach_the_replica(bench: Bench) -> None:
    """What would steer an engine, or another server on the way, stays here, and so does the key."""
    fields = (
        b"X-Vllm-Priority: -1",
        b"X-Session-Id: s",
        b"X-data-parallel-rank: 1",
        b"X-Request-Id: trace-1",
        b"Cookie: a=b",
        b"X-Forwarded-For: 1.2.3.4",
        b"Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"X-Custom: 1",
        b"Expect: 100-continue",
    )
    request = head(bench, *fields, length(), connection=b"close, X-Custom") + BODY
    assert await exchange(bench, request) == [100, 200]
    assert await reached(bench)
    headers = bench.upstream.headers[0]
    assert set(headers) == {"host", "accept", "accept-encoding", "content-type", "x-request-id", "content-length"}
    assert headers["x-request-id"] != "trace-1"
    assert bench.secret not in str(headers)
    await bench.settled(Usage(1, 2))


async def test_a_slow_head_holds_nothing_up(bench: Bench) -> None:
    """A head that is never finished takes no capacity, and others are served meanwhile."""
    settings = bench.gateway.settings
    _, writer = await asyncio.open_connection(settings.host, settings.port)
    try:
        writer.write(head(bench, length())[:-4])
        await writer.drain()
        assert await exchange(bench, head(bench, length()) + BODY) == [200]
        assert len(await reached(bench)) == 1
    finally:
        writer.close()
        await writer.wait_closed()
    await bench.settled(Usage(1, 2))


async def test_a_slow_body_is_given_up(bench: Bench) -> None:
    """A body that is never finished gets its 408, and the connection is closed."""
    request = head(bench, length(len(BODY) + 1)) + BODY
    assert await exchange(bench, request) == [408]
    assert await reached(bench) == []


@pytest.mark.parametrize(
    "path", [PATH + "/", "/v1//completions", "/v1/%63ompletions", PATH + "?a=b", "/V1/completions"]
)
async def test_other_spellings_of_a_path(bench: Bench, path: str) -> None:
    """A path that is spelt otherwise is the same route or none; the replica only ever sees the route's own."""
    statuses = await exchange(bench, head(bench, length(), path=path) + BODY)
    assert statuses in ([200], [404])
    await bench.idle()
    assert set(bench.upstream.paths) <= {PATH}


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
async def test_an_offered_upgrade_hides_no_request(bench: Bench, upgrade: bytes) -> None:
    """The head that Java's own client sends is served, and a body is never taken for a second request."""
    fields = (b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA", b"Upgrade: " + upgrade)
    offered = b"Upgrade, HTTP2-Settings"
    last = head(bench, length()) + BODY
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % bench.secret.encode()
    good = head(bench, *fields, length(), connection=offered) + BODY
    bad = head(bench, *fields, length(len(smuggled)), connection=offered) + smuggled
    assert await exchange(bench, good + bad + last) == [200, 400, 200]
    assert len(await reached(bench)) == 2
    assert "nsupported upgrade" not in bench.gateway.log()
