"""The bounds on a request's head: what is refused, what is given up, and what is not touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from ratelimit.gateway import http1
from ratelimit.gateway.http1 import MAX_HEAD_BYTES, BoundedHttp, ConnectionsState

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


async def echo_length(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body's length."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"%d;" % size
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


@asynccontextmanager
async def connected(app: Any = echo_length) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of the bounded protocol."""
    config = uvicorn.Config(app, http=BoundedHttp, ws="none", lifespan="off", log_config=None, timeout_keep_alive=60)
    config.load()
    state = ConnectionsState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: BoundedHttp(config, state, {}, loop), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        server.close()
        await asyncio.gather(*state.tasks)


async def answers(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    """The bodies of so many answers."""
    async with asyncio.timeout(10):
        bodies = []
        for _ in range(count):
            await reader.readuntil(b"\r\n\r\n")
            bodies.append(await reader.readuntil(b";"))
        return bodies


async def test_bodies_of_any_size_and_order_are_served() -> None:
    """Only heads are bounded: large bodies, many requests and requests sent ahead are served."""
    size = 3 * MAX_HEAD_BYTES
    async with connected() as (reader, writer):
        writer.write(3 * (REQUEST % size + b"x" * size))
        assert await answers(reader, 3) == 3 * [b"%d;" % size]
        for _ in range(20):
            writer.write(REQUEST % 5000)
            await writer.drain()
            writer.write(b"x" * 5000 + b"POST / HT")
            assert await answers(reader, 1) == [b"5000;"]
            writer.write(b"TP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert await answers(reader, 1) == [b"0;"]


@pytest.mark.parametrize(
    "endless",
    [b"X-Large: " + b"a" * 2**22, b"a" * 2**22, b"X-Many: a\r\n" * 2**18, b"X-Large: " + b"a" * 2**16 + b"\r\n\r\n"],
    ids=["value", "name", "many", "in one read"],
)
@pytest.mark.parametrize("before", [b"", REQUEST % 0])
async def test_a_head_without_end_is_refused(endless: bytes, before: bytes) -> None:
    """A head above the bound is cut off long before it fills the memory, also after a request that was served."""
    async with connected() as (reader, writer):
        if before:
            writer.write(before)
            await answers(reader, 1)
        writer.write(b"POST / HTTP/1.1\r\n" + endless)
        async with asyncio.timeout(10):
            try:
                assert (await reader.readline()).startswith(b"HTTP/1.1 400")
            except ConnectionError:
                return


@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nHost:", b"\r\n\r\n", REQUEST % 0 + b"POST / HTTP/1.1\r\nHost:"]
)
async def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """A connection that says nothing, or only the beginning of a request, is closed."""
    monkeypatch.setattr(http1, "HEAD_TIMEOUT_S", 0.1)
    async with connected() as (reader, writer):
        writer.write(sent)
        async with asyncio.timeout(10):
            answered = await reader.read(-1)
    assert answered.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\nPOST")


async def test_a_slow_body_is_not_the_heads_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a head has come, the time for the body is the application's to give."""
    monkeypatch.setattr(http1, "HEAD_TIMEOUT_S", 0.05)
    async with connected() as (reader, writer):
        writer.write(REQUEST % 3 + b"x")
        await writer.drain()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.3)  # nothing is answered, and the connection stays
        writer.write(b"xx")
        assert await answers(reader, 1) == [b"3;"]


HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
WEBSOCKET = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGVzdA==\r\n"


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("packets", ["one", "two", "bytes"])
async def test_an_offered_upgrade_is_ignored(
    upgrade: bytes, chunked: bool, packets: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that offers another protocol is served with its body, which is never read as a request, unlogged."""
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(HIDDEN)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN) if chunked else HIDDEN
    head = b"POST / HTTP/1.1\r\nHost: x\r\n" + upgrade + framing + b"\r\n\r\n"
    whole = head + body
    parts = {"one": [whole], "two": [head, body], "bytes": [whole[at : at + 1] for at in range(len(whole))]}[packets]
    async with connected() as (reader, writer):
        for part in 2 * parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)  # the server shares this loop, and reads what has come
        writer.write(REQUEST % 3 + b"xxx")
        writer.write_eof()
        async with asyncio.timeout(10):
            assert await answers(reader, 3) == [b"%d;" % len(HIDDEN), b"%d;" % len(HIDDEN), b"3;"]
    assert not caplog.records


async def test_upgrades_sent_ahead_are_each_served_once() -> None:
    """Requests without a body that offer an upgrade, in one packet, are answered one by one."""
    async with connected() as (reader, writer):
        writer.write(50 * (b"GET / HTTP/1.1\r\nHost: x\r\n" + WEBSOCKET + b"\r\n"))
        assert await answers(reader, 50) == 50 * [b"0;"]


async def test_a_tunnel_is_refused() -> None:
    """What follows a CONNECT is not read as a request."""
    async with connected() as (reader, writer):
        writer.write(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN)
        async with asyncio.timeout(10):
            answered = await reader.read(-1)
    assert answered.startswith(b"HTTP/1.1 400")
    assert answered.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(("path", "status"), [(b"/", b"503"), (b"/v1/messages", b"529")])
async def test_a_connection_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch, path: bytes, status: bytes) -> None:
    """Beyond the bound a connection gets one 503 in its caller's form, and is closed."""
    monkeypatch.setattr(http1, "MAX_CONNECTIONS", 0)
    async with connected() as (reader, writer):
        writer.write(2 * (b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path))
        async with asyncio.timeout(10):
            answered = await reader.read(-1)
    assert answered.startswith(b"HTTP/1.1 " + status)
    assert answered.count(b"HTTP/1.1") == 1
    assert b"retry-after: 1\r\n" in answered
    assert b"Too many connections" in answered


async def test_connections_far_beyond_the_bound_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many connections that even refusing them would cost too much are closed unread."""
    monkeypatch.setattr(http1, "MAX_CONNECTIONS", -http1._MAX_REFUSED_CONNECTIONS)
    async with connected() as (reader, _):
        async with asyncio.timeout(10):
            assert await reader.read(-1) == b""


async def two_parts(scope: Any, receive: Any, send: Any) -> None:
    """Answer without a length, in parts."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in (b"one,", b"two;"):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    """It knows none: a stream's end is the connection's, and what has a length is as ever."""
    request = b"POST / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi"
    for app, body in ((two_parts, b"one,two;"), (echo_length, b"2;")):
        async with connected(app) as (reader, writer):
            writer.write(request)
            async with asyncio.timeout(10):
                head, _, told = (await reader.read(-1)).partition(b"\r\n\r\n")
        assert told == body
        assert b"chunked" not in head
        assert b"connection: close" in head
