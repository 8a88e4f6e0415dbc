"""The HTTP of the data plane, on bare ASGI: reading a bounded body, noticing that a client left, sending an answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from secrets import token_hex
from typing import Any

from ratelimit.gateway.dialects import Dialect, rendered
from ratelimit.gateway.errors import Rejection, body_too_large, body_too_slow, too_many_bodies

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_CREDENTIAL_HEADERS = (b"authorization", b"x-api-key")
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
#: What is still read, and thrown away, of a body that was refused: a client that is cut off while it writes never
#: sees the answer.
_LINGER_BYTES = 64 * 1024 * 1024
_LINGER_S = 5.0
#: How long a client may take to make room for the last part of its answer.
LAST_SEND_S = 5.0


class ClientLeftError(Exception):
    """The client closed its connection, or has long stopped reading from it."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this (lower-case) name."""
    return next((value for key, value in scope["headers"] if key == name), None)


def credential(scope: Scope) -> str | None:
    """The API key of a request, from ``Authorization: Bearer`` or ``x-api-key``; ``None`` without one.

    The same key in both is one key; two that differ are none, and so is any other kind of authorization.
    """
    given = {_key_in(name, value) for name, value in scope["headers"] if name in _CREDENTIAL_HEADERS}
    key = given.pop() if len(given) == 1 else b""
    return key.decode("latin-1") if key else None


def _key_in(name: bytes, value: bytes) -> bytes:
    if name == b"x-api-key":
        return value.strip()
    return value[7:].strip() if value[:7].lower() == b"bearer " else b""


def request_id_for(scope: Scope, ours: str) -> bytes:
    """The id to answer with: the client's if it is short and plain, else ours."""
    given = header(scope, b"x-request-id")
    return given if given is not None and _SANE_REQUEST_ID.fullmatch(given) else ours.encode()


def new_request_id() -> str:
    """An id that nobody else uses."""
    return token_hex(16)


class BodyRoom:
    """Room for the bytes of the request bodies that one process holds at a time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    def has(self, size: int) -> bool:
        """Whether so many bytes more may come."""
        return self._held_bytes + size <= self._max_bytes

    def change(self, size: int) -> None:
        """So many bytes have come; fewer than none have gone."""
        self._held_bytes += size


class HeldBody:
    """What one request takes of the room, from the first byte that came to ``release``."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self._size = 0

    def expect(self, size: int) -> None:
        """Raise ``Rejection`` (503) where there is no room for so many bytes more."""
        if not self._room.has(size):
            raise too_many_bodies()

    def grow(self, size: int) -> None:
        """Take so many bytes; raises as ``expect`` does."""
        self.expect(size)
        self._size += size
        self._room.change(size)

    def release(self) -> None:
        """The body is not kept any longer."""
        self._room.change(-self._size)
        self._size = 0


async def read_body(scope: Scope, receive: Receive, max_bytes: int, timeout_s: float, held: HeldBody) -> bytes:
    """The whole body. Raises ``Rejection`` (413, 408, or 503 without room) or ``ClientLeftError``.

    A body that declares its length is refused before any of it is read; any other as soon as it passes the bound.
    Only what has come takes room, so that a slow body holds nothing that it has not sent.
    """
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit():
        if int(declared) > max_bytes:
            raise body_too_large(max_bytes)
        held.expect(int(declared))
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_parts(receive, max_bytes, held)
    except TimeoutError as error:
        raise body_too_slow(timeout_s) from error


async def _read_parts(receive: Receive, max_bytes: int, held: HeldBody) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise body_too_large(max_bytes)
        held.grow(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def send_within(send: Send, timeout_s: float, *messages: Message) -> None:
    """Send parts of an answer; raises ``ClientLeftError`` where the client makes no room for them in time."""
    try:
        async with asyncio.timeout(timeout_s):
            for message in messages:
                await send(message)
    except TimeoutError as error:
        raise ClientLeftError from error


async def send_rejection(
    receive: Receive, send: Send, rejection: Rejection, dialect: Dialect, request_id: bytes
) -> None:
    """Answer with a refusal. What is left of a refused body is read and thrown away, within bounds."""
    told = rendered(rejection, dialect, request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(told.body)), *told.headers]
    lingers = told.status in (408, 413)
    start = {"type": "http.response.start", "status": told.status, "headers": headers}
    with suppress(ClientLeftError):
        body = {"type": "http.response.body", "body": told.body, "more_body": lingers}
        await send_within(send, LAST_SEND_S, start, body)
        if lingers:
            await _linger(receive)
            await send_within(send, LAST_SEND_S, {"type": "http.response.body", "body": b"", "more_body": False})


async def _linger(receive: Receive) -> None:
    left = _LINGER_BYTES
    try:
        async with asyncio.timeout(_LINGER_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def send_whole(send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
    """Send an answer that is all there. Raises ``ClientLeftError`` where the client does not read."""
    told = [(b"content-length", b"%d" % len(body)), *headers]
    start = {"type": "http.response.start", "status": status, "headers": told}
    await send_within(send, LAST_SEND_S, start, {"type": "http.response.body", "body": body, "more_body": False})


class ClientWatch:
    """Cancels the work inside the ``async with`` when the client leaves, and raises ``ClientLeftError`` there.

    Call ``stop`` before the answer's last part is sent: its end looks like a client that left.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False

    async def __aenter__(self) -> ClientWatch:
        work = asyncio.current_task()
        if work is None:
            raise RuntimeError("a ClientWatch needs a task to cancel")
        self._work = work
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._work.cancel()

    def stop(self) -> None:
        """From now on the client may leave."""
        self._watcher.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._watcher.cancel()
        if self._left and self._work.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientLeftError from error
