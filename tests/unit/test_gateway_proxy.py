"""One request's life in the proxy, with a replica, a store and a client that misbehave on demand."""

from __future__ import annotations

import asyncio
import re
import tracemalloc
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from ratelimit.gateway import proxy as proxy_module
from ratelimit.gateway.accounting import Ledger
from ratelimit.gateway.asgi import Message
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.drain import Drain
from ratelimit.gateway.forward import Forwarder
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.proxy import Proxy
from ratelimit.gateway.settings import GatewaySettings
from ratelimit.gateway.sse import StreamFilter
from ratelimit.gateway.upstream import UpstreamError
from ratelimit.gateway.wire import Route
from serving.routing import Router
from tests.support.fake_upstream import events_of, stream_events, whole_answer
from tests.support.gateway import MODEL, make_key, publication
from tests.support.limiter import AwayLimiter

URL = "http://replica"
OUTPUT = 8
#: 44 bytes at 0.25 tokens a byte, and 4 for the message: what the gateway estimates.
ESTIMATED_PROMPT = 15
OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


def chat(**more: Any) -> dict[str, Any]:
    """A chat request's body; its prompt is 11 tokens long on the stand-in replica."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": OUTPUT, **more}


EVENTS = stream_events(chat(stream=True, stream_options=OPTIONS), chat=True)


class Replica:
    """A replica and its one answer: ``parts`` come one read at a time, then it hangs if told to."""

    def __init__(self, parts: Sequence[bytes], status: int = 200, hangs: bool = False) -> None:
        self.parts = list(parts)
        self.status = status
        self.content_type = b"text/event-stream"
        self.hangs = hangs
        self.reached = asyncio.Event()
        self.waits = asyncio.Event()
        self.closed = False

    async def open(self, url: str, body: bytes, headers: Mapping[str, str]) -> Replica:
        self.reached.set()
        return self

    async def read_some(self) -> bytes:
        if self.parts:
            return self.parts.pop(0)
        if self.hangs:
            self.waits.set()
            await asyncio.Event().wait()
        return b""

    async def read_all(self) -> bytes:
        return b"".join([part async for part in self._rest()])

    async def _rest(self) -> AsyncIterator[bytes]:
        while part := await self.read_some():
            yield part

    def close(self) -> None:
        self.closed = True


class Client:
    """A client's connection; ``reads`` of its answer's parts are taken, and no more."""

    def __init__(self, body: dict[str, Any], secret: str, reads: int = 10**9) -> None:
        self.scope = {"headers": [(b"authorization", b"Bearer " + secret.encode())]}
        self._body: bytes | None = msgspec.json.encode(body)
        self._reads = reads
        self.got: list[Message] = []

    async def receive(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if len(self.got) >= self._reads:
            await asyncio.Event().wait()
        self.got.append(message)

    @property
    def text(self) -> str:
        """The answer's body so far."""
        return b"".join(message.get("body", b"") for message in self.got).decode()


class Wired:
    """A proxy in front of one replica, and a key."""

    def __init__(self, replica: Replica, request_timeout_s: float = 20.0) -> None:
        self.secret, record = make_key()
        self.record = record
        self.replica = replica
        self.limiter = AwayLimiter()
        self.metrics = GatewayMetrics()
        self.ledger = Ledger(self.metrics, request_timeout_s)
        directory = Directory(None, self.metrics)  # type: ignore[arg-type]  # nothing is read
        directory._swap_publication(msgspec.json.encode(publication([URL])))
        directory._swap_keys({b"": msgspec.json.encode(record)})
        settings = GatewaySettings(redis_url="", request_timeout_s=request_timeout_s, max_body_bytes=2**26)
        forwarder = Forwarder(replica, self.metrics, 20.0, Router(0.0, lambda: 1))
        self.drain = Drain()
        self.proxy = Proxy(
            settings, directory, lambda _: self.limiter, forwarder, self.ledger, self.metrics, self.drain
        )

    async def serve(self, body: dict[str, Any], reads: int = 10**9) -> Client:
        """One request, to its end and its settlement."""
        client = Client(body, self.secret, reads)
        async with asyncio.timeout(20):
            await self.proxy.serve("chat", client.scope, client.receive, client.send)
            await self.ledger.drain(20)
        return client

    def tokens(self) -> list[tuple[int, int]]:
        """Input and output of each settlement."""
        return [(charged["input_tokens"], charged["output_tokens"]) for charged in self.limiter.settled]

    def finished(self, status: int) -> float:
        """Requests counted with this status."""
        labels = {"route": "chat", "model": MODEL, "tier": "pro", "status": str(status)}
        return self.metrics.registry.get_sample_value("penstock_requests_total", labels) or 0.0


async def test_a_timeout_refunds_nothing_of_an_answer() -> None:
    """A replica that worked until the request timeout was used: all that was held stays charged."""
    wired = Wired(Replica([], hangs=True), request_timeout_s=0.1)
    client = await wired.serve(chat())
    assert client.got[0]["status"] == 504
    assert wired.tokens() == [(ESTIMATED_PROMPT, OUTPUT)]
    assert wired.replica.closed


async def test_a_timeout_before_the_first_chunk_owes_the_prompt() -> None:
    """A stream that timed out before anything came pays for its prompt."""
    wired = Wired(Replica([], hangs=True), request_timeout_s=0.1)
    client = await wired.serve(chat(stream=True))
    assert client.got[0]["status"] == 504
    assert wired.tokens() == [(ESTIMATED_PROMPT, 0)]


@pytest.mark.parametrize("reads", [0, 1, 2])
async def test_a_client_that_stops_reading_lets_go_at_the_deadline(monkeypatch: pytest.MonkeyPatch, reads: int) -> None:
    """At the deadline the replica's work is aborted and settled, and the connection is given up soon after."""
    monkeypatch.setattr(proxy_module, "LAST_SEND_S", 0.05)
    wired = Wired(Replica(EVENTS[:3], hangs=True), request_timeout_s=0.2)
    client = await wired.serve(chat(stream=True), reads=reads)
    assert len(client.got) == reads
    assert wired.replica.closed
    assert [output <= 2 for _, output in wired.tokens()] == [True]
    assert wired.finished(499) == 1


class SlowReader(Client):
    """A client that reads a head and one part, and goes on to read when the time of its request is over."""

    def __init__(self, body: dict[str, Any], secret: str) -> None:
        super().__init__(body, secret)
        self.waits = asyncio.Event()

    async def send(self, message: Message) -> None:
        """As uvicorn: the wait for room comes first, and a part whose wait is ended is lost."""
        if len(self.got) == 2 and not self.waits.is_set():
            self.waits.set()
            await asyncio.Event().wait()
        self.got.append(message)


@pytest.mark.parametrize("is_cut_off", [True, False], ids=["drain", "deadline"])
@pytest.mark.parametrize(
    ("route", "path", "prompt"),
    [
        ("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": OUTPUT}),
        ("completions", "/v1/completions", {"prompt": "x", "max_tokens": OUTPUT}),
        ("responses", "/v1/responses", {"input": "x", "max_output_tokens": OUTPUT}),
        ("messages", "/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": OUTPUT}),
    ],
)
async def test_a_slow_reader_is_told_that_its_answer_is_not_whole(
    route: Route, path: str, prompt: dict[str, Any], is_cut_off: bool
) -> None:
    """An answer that came whole and could not be sent whole has no good end, and is recorded as cut."""
    body = {"model": MODEL, "stream": True, **prompt}
    told = {**body, "stream_options": OPTIONS} if route in ("chat", "completions") else body
    events = events_of(path, told)
    wired = Wired(Replica([events[0], b"".join(events[1:])]), request_timeout_s=20.0 if is_cut_off else 0.2)
    client = SlowReader(body, wired.secret)
    async with asyncio.timeout(20):
        serving = asyncio.create_task(wired.proxy.serve(route, client.scope, client.receive, client.send))
        await client.waits.wait()
        if is_cut_off:
            wired.drain.cut_off()
        await serving
        await wired.ledger.drain(20)
    assert f"({'gateway ended' if is_cut_off else 'timeout'})" in client.text
    assert not any(end in client.text for end in ("[DONE]", "response.completed", "message_stop"))
    assert [record.outcome for record in wired.limiter.records] == ["cut"]


async def test_what_was_lost_with_a_garbled_part_is_no_whole_answer() -> None:
    """The last words of an answer, in one read with what cannot be read, are lost, and the client is told."""
    wired = Wired(Replica([*EVENTS[:3], b"".join(EVENTS[3:-1]) + b"data: {garbled}\n\n"]))
    client = await wired.serve(chat(stream=True))
    assert "(garbled)" in client.text
    assert "[DONE]" not in client.text


async def test_the_replica_is_let_go_before_the_last_part_is_sent() -> None:
    """A stream's end waits for a slow client without holding the replica."""
    wired = Wired(Replica(EVENTS))
    client = Client(chat(stream=True), wired.secret)
    closed_at: list[bool] = []

    async def send(message: Message) -> None:
        closed_at.append(wired.replica.closed)
        await client.send(message)

    await wired.proxy.serve("chat", client.scope, client.receive, send)
    await wired.ledger.drain(20)
    assert closed_at[-1]
    assert not any(closed_at[:-1])


@pytest.mark.parametrize("first", [b"data: {garbled}\n\n", b"data: \xff\n\n", b"data: " + 100_000 * b"[" + b"\n\n"])
async def test_a_garbled_first_chunk_is_an_error_event(first: bytes) -> None:
    """However a stream begins, the client gets an answer with a request id that ends with an error event."""
    wired = Wired(Replica([first]))
    client = await wired.serve(chat(stream=True))
    assert client.got[0]["status"] == 200
    assert b"x-request-id" in dict(client.got[0]["headers"])
    assert "(garbled)" in client.text
    assert client.got[-1]["more_body"] is False
    assert wired.tokens() == [(ESTIMATED_PROMPT, 0)]
    assert wired.replica.closed


async def test_a_fault_of_the_filter_settles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with a stream's bytes, the account is settled and the replica let go."""

    def fail(_: StreamFilter, data: bytes) -> bytes:
        raise ZeroDivisionError(data)

    monkeypatch.setattr(StreamFilter, "feed", fail)
    wired = Wired(Replica(EVENTS))
    client = await wired.serve(chat(stream=True))
    assert "broke off" in client.text
    assert wired.tokens() == [(ESTIMATED_PROMPT, 0)]
    assert wired.replica.closed


async def test_a_large_request_is_not_kept_while_its_answer_comes() -> None:
    """Once a replica has begun to answer, the gateway keeps neither the body that came nor the one it sent."""
    wired = Wired(Replica(EVENTS[:1], hangs=True))
    large = 4_000_000
    client = Client(chat(stream=True, user="x" * large), wired.secret)
    tracemalloc.start()
    try:
        serving = asyncio.create_task(wired.proxy.serve("chat", client.scope, client.receive, client.send))
        await asyncio.wait_for(wired.replica.waits.wait(), 20)
        assert tracemalloc.get_traced_memory()[0] < large / 4
        assert tracemalloc.get_traced_memory()[1] > large
    finally:
        tracemalloc.stop()
    serving.cancel()
    await asyncio.wait({serving})
    await wired.ledger.drain(20)


async def test_only_served_requests_tell_how_long_one_takes() -> None:
    """What the engine refuses at once says nothing about the wait for a place in flight."""
    refused = Wired(Replica([b"{}"], status=400))
    assert (await refused.serve(chat())).got[0]["status"] == 400
    assert refused.proxy._durations.mean_us((refused.record.id, MODEL)) == 1_000_000
    served = Wired(Replica([whole_answer(chat(), chat=True)]))
    assert (await served.serve(chat())).got[0]["status"] == 200
    assert served.proxy._durations.mean_us((served.record.id, MODEL)) < 1_000_000


class Breaking(Replica):
    """A replica that breaks off before it answers, ``reached`` where it was at work on the request."""

    def __init__(self, reached: bool) -> None:
        super().__init__([])
        self._reached = reached

    async def open(self, url: str, body: bytes, headers: Mapping[str, str]) -> Replica:
        raise UpstreamError("broken", reached=self._reached)


@pytest.mark.parametrize(("reached", "owed"), [(True, (1, ESTIMATED_PROMPT, 0)), (False, (0, 0, 0))])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_brings_replicas_down_is_not_free(
    reached: bool, owed: tuple[int, int, int], stream: bool
) -> None:
    """Where a replica may have been at work, the request and its prompt are paid; where none was, nothing is."""
    wired = Wired(Breaking(reached))
    client = await wired.serve(chat(stream=stream))
    assert client.got[0]["status"] == 503
    [charged] = wired.limiter.settled
    assert (charged["requests"], charged["input_tokens"], charged["output_tokens"]) == owed
    assert [record.outcome for record in wired.limiter.records] == ["cut" if reached else "unserved"]


@pytest.mark.parametrize("stream", [True, False])
async def test_nonsense_usage_is_charged_as_unknown(stream: bool) -> None:
    """A replica that reports what cannot be fails no request, and bars no caller: all that was held is charged."""
    sent = chat(stream=stream, stream_options=OPTIONS) if stream else chat()
    parts = [*stream_events(sent, chat=True)] if stream else [whole_answer(sent, chat=True)]
    for count in (b"1000000000000", b"-7"):
        nonsense = [re.sub(rb'"completion_tokens": ?\d+', b'"completion_tokens":' + count, part) for part in parts]
        assert nonsense != parts
        wired = Wired(Replica(nonsense))
        client = await wired.serve(sent)
        assert client.got[0]["status"] == 200
        assert wired.tokens() == [(ESTIMATED_PROMPT, OUTPUT)]
        assert [record.outcome for record in wired.limiter.records] == ["unknown"]
        assert (wired.metrics.registry.get_sample_value("penstock_impossible_usage_total", {"model": MODEL}) or 0) >= 1
