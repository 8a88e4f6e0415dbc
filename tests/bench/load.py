"""The lightest load: keep-alive connections that ask, count and ask again, from one protocol class on uvloop."""

from __future__ import annotations

import asyncio
from time import perf_counter
from urllib.parse import urlsplit

import msgspec

from tests.bench.upstream import MODEL


class Asked(msgspec.Struct):
    """What came back: answers, and chunks of those that were streams; how long it took, and every latency."""

    answers: int = 0
    chunks: int = 0
    errors: int = 0
    elapsed_s: float = 0.0
    latencies_s: list[float] = msgspec.field(default_factory=list)

    def latency_ms(self, share: float) -> float:
        """A quantile of the latencies in milliseconds."""
        ordered = sorted(self.latencies_s)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def request_bytes(url: str, secret: str, stream: bool, max_tokens: int) -> bytes:
    """A chat request as it goes on the wire."""
    body = msgspec.json.encode(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "x" * 200}],
            "max_tokens": max_tokens,
            "stream": stream,
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\nauthorization: Bearer {secret}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Asker(asyncio.Protocol):
    """One connection, which asks again as soon as it is answered, until told to stop."""

    def __init__(self, request: bytes, asked: Asked) -> None:
        self._request = request
        self._asked = asked
        self._received = b""
        self._sent_at = 0.0
        self.stopping = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # TCP gives a Transport
        self._ask()

    def _ask(self) -> None:
        self._sent_at = perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 ") and data[9:12] != b"200":
            self._asked.errors += 1
        self._asked.chunks += data.count(b"data: {")
        self._received = (self._received if len(self._received) < 4096 else self._received[-64:]) + data
        if self._is_complete():
            self._received = b""
            self._asked.answers += 1
            self._asked.latencies_s.append(perf_counter() - self._sent_at)
            if self.stopping:
                self._transport.close()
            else:
                self._ask()

    def _is_complete(self) -> bool:
        if self._received.endswith(b"\r\n0\r\n\r\n"):
            return True
        head, found, body = self._received.partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length:")
        return bool(found) and at > 0 and len(body) >= int(head[at + 15 :].split(b"\r\n", 1)[0])

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._asked.errors += 1
        if not self.ended.done():
            self.ended.set_result(None)


async def ask_for(url: str, secret: str, connections: int, seconds: float) -> Asked:
    """Closed loop: ``connections`` of them for ``seconds``, answers that are not streamed."""
    asked = Asked()
    askers = await _connect(url, request_bytes(url, secret, stream=False, max_tokens=16), asked, connections)
    started = perf_counter()
    asked.answers = 0
    asked.latencies_s.clear()
    await asyncio.sleep(seconds)
    asked.elapsed_s = perf_counter() - started
    answers = asked.answers
    await _end(askers)
    asked.answers = answers
    return asked


async def open_streams(url: str, secret: str, streams: int, chunks: int) -> tuple[list[Asker], Asked]:
    """``streams`` at once, each to be awaited by ``ended``; they ask once."""
    asked = Asked()
    askers = await _connect(url, request_bytes(url, secret, stream=True, max_tokens=chunks), asked, streams)
    for asker in askers:
        asker.stopping = True
    return askers, asked


async def _connect(url: str, request: bytes, asked: Asked, connections: int) -> list[Asker]:
    loop = asyncio.get_running_loop()
    host, _, port = urlsplit(url).netloc.partition(":")
    made = []
    for _ in range(connections):
        _, asker = await loop.create_connection(lambda: Asker(request, asked), host, int(port))
        made.append(asker)
    return made


async def _end(askers: list[Asker]) -> None:
    for asker in askers:
        asker.stopping = True
    await asyncio.wait({asker.ended for asker in askers}, timeout=10)
