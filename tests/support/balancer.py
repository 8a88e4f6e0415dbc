"""A balancer of TCP connections that goes by readiness, as a Kubernetes Service does. It repairs nothing.

New connections go in turn to the gateways whose last probe said 200; those that are open stay where they are. A gateway
that leaves gets new connections until its next probe, and one that refuses them loses its callers theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import httpx

from tests.support.gateway import GatewayProcess


class Balancer:
    """Use as an async context manager; ``url`` is where callers connect."""

    def __init__(self, probe_every_s: float) -> None:
        self.ready: list[str] = []
        self.refused = 0
        self._probed: Sequence[GatewayProcess] = ()
        self._probe_every_s = probe_every_s
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Balancer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._prober = asyncio.create_task(self._probe())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in (self._prober, *self._tasks):
            task.cancel()
        await asyncio.gather(self._prober, *self._tasks, return_exceptions=True)

    def follow(self, gateways: Sequence[GatewayProcess]) -> None:
        """From now on these are probed."""
        self._probed = tuple(gateways)

    async def _probe(self) -> None:
        async with httpx.AsyncClient(timeout=5) as http:
            while True:
                probed = self._probed
                answers = await asyncio.gather(*(self._is_ready(http, gateway) for gateway in probed))
                self.ready = [gateway.url for gateway, ready in zip(probed, answers, strict=True) if ready]
                await asyncio.sleep(self._probe_every_s)

    @staticmethod
    async def _is_ready(http: httpx.AsyncClient, gateway: GatewayProcess) -> bool:
        try:
            return (await http.get(gateway.admin_url + "/health")).status_code == 200
        except httpx.TransportError:
            return False

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self._turn += 1
            chosen = urlsplit(self.ready[self._turn % len(self.ready)])
            inward, outward = await asyncio.open_connection(chosen.hostname, chosen.port)
        except (OSError, ZeroDivisionError):
            self.refused += 1
            writer.transport.abort()
            return
        try:
            await asyncio.gather(_copy(reader, outward), _copy(inward, writer))
        finally:
            for each in (outward, writer):
                each.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
