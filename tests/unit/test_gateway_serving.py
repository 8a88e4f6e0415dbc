"""The order in which a gateway's server ends, on real sockets and with an application of the test's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest

from ratelimit.gateway import server as server_module
from ratelimit.gateway import serving
from ratelimit.gateway.drain import Drain
from ratelimit.gateway.server import listening_socket
from ratelimit.gateway.serving import GatewayServer

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
WITHIN_S = 20.0
#: Longer than any test may last: what waits for it has failed.
NEVER_S = 600.0


class Bench:
    """A server, and an application that answers when the gate is open; past cutting off it answers 503."""

    def __init__(self, drain_s: float, delay_s: float) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.drain = Drain()
        self.heeds_the_end = True
        self.entered = 0
        self.server = GatewayServer(self, self.drain, drain_s, delay_s)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Wait for the gate, for as long as there is time."""
        self.entered += 1
        status = 200
        try:
            async with self.drain.until(None):
                await self.gate.wait()
        except TimeoutError:
            status = 503
            if not self.heeds_the_end:
                await asyncio.sleep(NEVER_S)
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it."""
        return await asyncio.open_connection(*self.address)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """The server's task, which must have ended when the block does."""
        with listening_socket("127.0.0.1", 0, shared=False) as listener:
            self.address = listener.getsockname()
            serving = asyncio.create_task(self.server.serve([listener]))
            async with asyncio.timeout(WITHIN_S):
                while not self.server.started:  # noqa: ASYNC110 -- uvicorn has no event for it
                    await asyncio.sleep(0.01)
                yield serving
                await serving


async def answer(reader: asyncio.StreamReader) -> bytes:
    """The head of the next answer, once its body has come too."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(2) == b"ok"
    return head


async def test_open_connections_are_asked_to_go() -> None:
    """While it is leaving, new and old connections are served, each for one more answer, which closes it."""
    bench = Bench(drain_s=NEVER_S, delay_s=NEVER_S)
    async with bench.running():
        reader, writer = await bench.connect()
        writer.write(REQUEST)
        assert b"connection: close" not in await answer(reader)
        bench.server.leave()
        fresh = await bench.connect()
        for each, (inward, outward) in enumerate([(reader, writer), fresh]):
            outward.write(REQUEST)
            assert b"connection: close" in await answer(inward), each
            assert await inward.read() == b""
            outward.close()
        bench.server.leave()  # told twice: at once


async def test_an_answer_under_way_tells_its_client_to_go() -> None:
    """A request that waits for its answer when the end begins gets it whole, with the word to close."""
    bench = Bench(drain_s=NEVER_S, delay_s=0)
    async with bench.running():
        bench.gate.clear()
        reader, writer = await bench.connect()
        writer.write(REQUEST)
        while not bench.entered:  # noqa: ASYNC110 -- the application has no event for it
            await asyncio.sleep(0.01)
        bench.server.leave()
        await _refused(bench)
        bench.gate.set()
        head = await answer(reader)
        assert (head.split()[1], b"connection: close" in head) == (b"200", True)
        writer.close()


async def _refused(bench: Bench) -> None:
    """Wait until no connection is accepted any more."""
    while True:
        try:
            _, writer = await bench.connect()
        except OSError:
            return
        writer.close()
        await asyncio.sleep(0.01)


async def test_idle_connections_are_closed_and_begun_requests_are_not() -> None:
    """Without a delay: a connection that has nothing to say is closed; one whose head has begun is served."""
    bench = Bench(drain_s=NEVER_S, delay_s=0)
    async with bench.running():
        idle, idle_writer = await bench.connect()
        idle_writer.write(REQUEST)
        await answer(idle)
        begun, begun_writer = await bench.connect()
        begun_writer.write(REQUEST + REQUEST[:20])
        await answer(begun)
        bench.server.leave()
        assert await idle.read() == b""
        begun_writer.write(REQUEST[20:])
        assert b"connection: close" in await answer(begun)
        assert await begun.read() == b""
        for writer in (idle_writer, begun_writer):
            writer.close()


async def test_who_was_connected_is_served() -> None:
    """Connections that the kernel has made, and that the event loop has had no turn to accept, are not reset."""
    bench = Bench(drain_s=WITHIN_S, delay_s=0)
    with listening_socket("127.0.0.1", 0, shared=False) as listener, ExitStack() as clients:
        bench.server.config.load()
        bench.server.lifespan = bench.server.config.lifespan_class(bench.server.config)
        await bench.server.startup([listener])
        address = listener.getsockname()
        waiting = [clients.enter_context(socket.create_connection(address, WITHIN_S)) for _ in range(5)]
        for client in waiting:
            client.sendall(REQUEST)
        bench.server.leave()
        await bench.server.shutdown([listener])
        answers = [client.recv(1000) for client in waiting]
    assert {told.split()[1] for told in answers} == {b"200"}
    assert all(b"connection: close" in told for told in answers)


@pytest.mark.parametrize("heeds_the_end", [True, False])
async def test_what_does_not_end_in_time_is_cut_off(monkeypatch: pytest.MonkeyPatch, heeds_the_end: bool) -> None:
    """Requests still open are told so and may answer; one that does not heed it is cancelled, and the server ends."""
    monkeypatch.setattr(serving, "LAST_WORDS_S", WITHIN_S if heeds_the_end else 0.1)
    bench = Bench(drain_s=0.1, delay_s=0)
    bench.heeds_the_end = heeds_the_end
    async with bench.running():
        bench.gate.clear()
        reader, writer = await bench.connect()
        writer.write(REQUEST)
        while not bench.entered:  # noqa: ASYNC110 -- the application has no event for it
            await asyncio.sleep(0.01)
        bench.server.leave()
        told = await reader.read()
        assert told.startswith(b"HTTP/1.1 503" if heeds_the_end else b"")
        assert heeds_the_end == bool(told)
        writer.close()
    assert not bench.server.server_state.tasks


@pytest.mark.parametrize("begun", [b"", REQUEST[:20]], ids=["silent", "half a head"])
async def test_connections_without_a_request_get_no_last_words(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    """When the time of open requests is over, whoever has not asked for anything is not waited for."""
    monkeypatch.setattr(serving, "LAST_WORDS_S", NEVER_S)
    bench = Bench(drain_s=0.1, delay_s=0)
    async with bench.running():
        reader, writer = await bench.connect()
        writer.write(REQUEST + begun)
        await answer(reader)
        bench.server.leave()
        assert await reader.read() == b""
        writer.close()


async def test_the_admin_port_ends_beside_the_settlements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape that does not end takes nothing from the time for settlements: they do not wait for it."""
    monkeypatch.setattr(serving, "LAST_WORDS_S", WITHIN_S)
    data, admin = Bench(drain_s=0.1, delay_s=0), Bench(drain_s=NEVER_S, delay_s=0)
    admin.gate.clear()

    async def settle() -> None:
        admin.gate.set()

    with listening_socket("127.0.0.1", 0, False) as data_socket, listening_socket("127.0.0.1", 0, False) as socket_:
        admin.address = socket_.getsockname()
        async with asyncio.timeout(WITHIN_S):
            ending = asyncio.create_task(server_module._serve(data.server, data_socket, admin.server, socket_, settle))
            while not (admin.server.started and data.server.started):  # noqa: ASYNC110 -- uvicorn has no event for it
                await asyncio.sleep(0.01)
            reader, writer = await admin.connect()
            writer.write(REQUEST)
            while not admin.entered:  # noqa: ASYNC110 -- the application has no event for it
                await asyncio.sleep(0.01)
            data.server.leave()
            assert (await answer(reader)).startswith(b"HTTP/1.1 200")
            await ending
            writer.close()
