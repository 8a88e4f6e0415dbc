"""A stand-in replica that takes its time: all its answers go on by a token at every beat, and it knows what it said.

Hundreds of answers at once cost it little: one timer paces them all, and equal requests share their events.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any

from tests.support.fake_upstream import answer_of, events_of, output_tokens

#: What is in the event of every token, and in no other but the last of a response.
_TOKEN = b" tok"
#: The text of a token in the events: here as long as most are, so that text tells how many there were.
_TOKEN_TEXT = re.compile(rb' tok\d+ \S+ \\"usage\\":\{\} ')
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


#: What a probe is told: it is well, and has no metrics.
_PROBED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class SlowReplica:
    """One replica. Use as an async context manager.

    ``emitted`` has the output tokens that were sent for each request, by the id that the gateway gave it; those of an
    answer that is not streamed are sent with it, at its end.
    """

    def __init__(self, token_s: float) -> None:
        self.emitted: dict[str, int] = {}
        self.aborted = 0
        self._token_s = token_s
        self._answers: set[_Answer] = set()
        self._connections: set[_Connection] = set()

    async def __aenter__(self) -> SlowReplica:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._beating.cancel()
        with suppress(asyncio.CancelledError):
            await self._beating
        self._server.close()
        for connection in tuple(self._connections):
            connection.transport.abort()

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._answers)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._token_s)
            for answer in tuple(self._answers):
                answer.go_on()

    def begun(self, answer: _Answer) -> None:
        """Answer from the next beat on."""
        self._answers.add(answer)
        self.emitted[answer.request_id] = 0

    def ended(self, answer: _Answer) -> None:
        """The answer is complete, or nobody wants it any more."""
        self._answers.discard(answer)


class _Answer:
    def __init__(self, replica: SlowReplica, connection: _Connection, request_id: str, path: str, body: bytes) -> None:
        self._replica = replica
        self._connection = connection
        self.request_id = request_id
        self._parts, self._tokens = _parts(path, body)
        self._next = 0

    def go_on(self) -> None:
        part, sent = self._parts[self._next]
        self._next += 1
        said = self._replica.emitted[self.request_id] + sent
        self._replica.emitted[self.request_id] = min(self._tokens, said)
        self._connection.transport.write(part)
        if self._next == len(self._parts):
            self._replica.ended(self)
            self._connection.answer = None


@lru_cache(64)
def _parts(path: str, body: bytes) -> tuple[list[tuple[bytes, int]], int]:
    """The bytes of every beat, each with the tokens that it carries, and the tokens of the whole answer."""
    asked: dict[str, Any] = json.loads(body)
    tokens = output_tokens(asked) * int(asked.get("n") or 1)
    if not asked.get("stream"):
        answer = answer_of(path, asked)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer)
        return [*[(b"", 0)] * tokens, (head + answer, tokens)], tokens
    events = [_TOKEN_TEXT.sub(_TOKEN, event) for event in events_of(path, asked)]
    parts = [(b"%x\r\n%s\r\n" % (len(event), event), int(_TOKEN in event)) for event in events]
    (first, told), *rest = parts
    (*middle, (last, last_told)) = rest
    return [(_STREAM_HEAD + first, told), *middle, (last + b"0\r\n\r\n", last_told)], tokens


class _Connection(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self, replica: SlowReplica) -> None:
        self._replica = replica
        self._received = b""
        self.answer: _Answer | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._replica._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._replica._connections.discard(self)
        if self.answer is not None:
            self._replica.aborted += 1
            self._replica.ended(self.answer)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        line, *fields = head.decode().split("\r\n")
        if line.startswith("GET "):
            self._received = b""
            self.transport.write(_PROBED)
            return
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        if len(body) < int(headers["content-length"]):
            return
        self._received = b""
        path = line.split(" ")[1]
        self.answer = _Answer(self._replica, self, headers["x-request-id"], path, body)
        self._replica.begun(self.answer)
