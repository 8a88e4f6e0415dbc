"""The bytes of request bodies that one process holds at a time: what is refused for them, and when they are let go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from ratelimit.gateway import proxy as proxy_module
from ratelimit.gateway.asgi import BodyRoom, HeldBody, Message, Receive, read_body
from ratelimit.gateway.errors import Rejection
from tests.unit.test_gateway_proxy import EVENTS, Client, Replica, Wired, chat


def client_of(parts: Sequence[bytes], reads: list[int] | None = None) -> Receive:
    """A client that sends these parts; ``reads`` gets the size of each that was asked for."""
    left = list(parts)

    async def receive() -> Message:
        part = left.pop(0)
        if reads is not None:
            reads.append(len(part))
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    return receive


async def read(room: BodyRoom, *parts: bytes, declared: bool = True, reads: list[int] | None = None) -> HeldBody:
    """Read one body and keep it."""
    held = HeldBody(room)
    length = (b"content-length", b"%d" % sum(map(len, parts)))
    await read_body({"headers": [length] if declared else []}, client_of(parts, reads), 100, 10, held)
    return held


async def test_bodies_beyond_the_room_are_refused_unread() -> None:
    """A body that says its length is refused before its first byte, and served once there is room."""
    room = BodyRoom(150)
    first = await read(room, b"x" * 50, b"x" * 50)
    reads: list[int] = []
    with pytest.raises(Rejection) as caught:
        await read(room, b"x" * 60, reads=reads)
    assert caught.value.status == 503
    assert dict(caught.value.headers)[b"retry-after"] == b"1"
    assert reads == []
    second = await read(room, b"x" * 50)
    first.release()
    first.release()  # a second time is nothing
    await read(room, b"x" * 100)
    second.release()


async def test_a_body_of_unknown_length_is_refused_where_room_ends() -> None:
    """What does not say its length is counted as it comes."""
    room = BodyRoom(150)
    await read(room, b"x" * 100)
    reads: list[int] = []
    with pytest.raises(Rejection, match="503"):
        await read(room, b"x" * 30, b"x" * 30, b"x" * 30, declared=False, reads=reads)
    assert reads == [30, 30]


async def test_a_body_takes_room_until_a_replica_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an answer comes the request's body takes none, and a refused request gives back what it took."""
    monkeypatch.setattr(proxy_module, "_LARGEST_BODIES", 1 / 2**26)  # room for one byte
    full = Wired(Replica([]))
    refused = await full.serve(chat())
    assert refused.got[0]["status"] == 503
    monkeypatch.setattr(proxy_module, "_LARGEST_BODIES", 150 / 2**26)
    wired = Wired(Replica(EVENTS[:1], hangs=True))
    client = Client(chat(stream=True), wired.secret)
    serving = asyncio.create_task(wired.proxy.serve("chat", client.scope, client.receive, client.send))
    async with asyncio.timeout(10):
        await wired.replica.waits.wait()
    assert wired.proxy._bodies._held_bytes == 0
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    unkeyed = await wired.serve({"no": "model"})
    assert unkeyed.got[0]["status"] == 400
    assert wired.proxy._bodies._held_bytes == 0
    await wired.ledger.drain(20)
