"""The lightest upstream: canned answers in vLLM's wire format, from one protocol class on uvloop.

Streams of all connections are paced by one timer, so that what is measured is the gateway and not this.
``python -m tests.bench.upstream CHUNKS CHUNKS_PER_S`` prints its port.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from tests.support.fake_upstream import stream_events, whole_answer

MODEL = "tiny"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


def http_chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Canned:
    """Answers made before the measurement."""

    def __init__(self, chunks: int) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 200}], "max_tokens": chunks}
        answer = whole_answer({**body, "max_tokens": 16}, chat=True)
        self.whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
            len(answer),
            answer,
        )
        self.stream_head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        usage_everywhere = {"include_usage": True, "continuous_usage_stats": True}
        events = stream_events({**body, "stream_options": usage_everywhere}, chat=True)
        self.stream = [http_chunk(event) for event in events]
        self.stream[-1] += b"0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self, canned: Canned, streams: dict[Upstream, int]) -> None:
        self._canned = canned
        self._streams = streams
        self._received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # TCP gives a Transport

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        if not head.startswith(b"POST "):  # LiteLLM looks what else is there
            self._received = b""
            self.transport.write(NOT_FOUND)
            return
        at = head.lower().index(b"content-length:") + 15
        if len(rest) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        self._received = b""
        if b'"stream":true' in rest:
            self.transport.write(self._canned.stream_head)
            self._streams[self] = 0
        else:
            self.transport.write(self._canned.whole)


async def serve(chunks: int, chunks_per_s: float) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    canned = Canned(chunks)
    streams: dict[Upstream, int] = {}
    server = await loop.create_server(lambda: Upstream(canned, streams), "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    due_s = loop.time()
    while True:
        due_s += 1 / chunks_per_s
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        for stream, position in tuple(streams.items()):
            stream.transport.write(canned.stream[position])
            if position + 1 == len(canned.stream):
                del streams[stream]
            else:
                streams[stream] = position + 1


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), float(sys.argv[2])))
