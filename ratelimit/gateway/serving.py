"""The gateway's HTTP servers, and the order in which one ends.

On SIGTERM nothing is shut at once. A load balancer takes a while to hear that a gateway leaves, and sends it new
connections until then; a pooled client sends its next request on a connection that it has open. So:

1. ``leave``: every answer whose head is not sent yet carries ``Connection: close``; clients and proxies go elsewhere
   by themselves. Connections are accepted for ``drain_delay_s`` more.
2. The listener closes, after all who are connected were accepted. Idle connections are closed, but for one that has
   just come, or whose next request has arrived. Open requests go on for ``drain_s``.
3. What is then still open is cut off: streams end with an error event, other requests with a 503, and are settled.
   Connections without a request, or with the beginning of one, are closed: there is nobody to tell.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import uvicorn

from ratelimit.gateway.drain import Drain
from ratelimit.gateway.http1 import BoundedHttp, ConnectionsState
from ratelimit.gateway.settings import LAST_WORDS_S

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_TICK_S = 0.05
#: For requests that were cancelled, since they did not heed the end of their time, to undo what they hold.
_CANCEL_S = 1.0


class GatewayServer(uvicorn.Server):
    """One listening socket's server. It leaves the process's signals alone: two of them run here, and one decides."""

    def __init__(self, app: object, drain: Drain, drain_s: float, drain_delay_s: float = 0.0) -> None:
        super().__init__(_uvicorn_config(app))
        self.server_state: ConnectionsState = ConnectionsState()
        self._drain = drain
        self._drain_s = drain_s
        self._drain_delay_s = drain_delay_s

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def leave(self) -> None:
        """Begin to end; a second time: without the delay."""
        if self._drain.has_begun or not self._drain_delay_s:
            self.should_exit = True
        else:
            asyncio.get_running_loop().call_later(self._drain_delay_s, setattr, self, "should_exit", True)
        self._drain.begin()
        self.server_state.leaving = True
        for connection in self.server_state.connections:
            if isinstance(connection, BoundedHttp):
                connection.leave()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Steps 2 and 3 above."""
        await self._close_listeners(sockets or [])
        if not await self._are_closed_within(self._drain_s):
            if self.server_state.tasks:
                log.warning(
                    "cutting off %d requests: they had %g s to end", len(self.server_state.tasks), self._drain_s
                )
            self._drain.cut_off()
            for connection in list(self.server_state.connections):
                if isinstance(connection, BoundedHttp):
                    connection.cut_off()
            if not await self._are_closed_within(LAST_WORDS_S):
                await self._abort()

    async def _close_listeners(self, listeners: list[socket.socket]) -> None:
        """Close them, but serve who was connected already: the kernel would reset those whom nobody has accepted."""
        queued = [each for listener in listeners for each in _accept_all(listener)]
        for server in self.servers:
            server.close()
        for listener in listeners:
            listener.close()
        loop = asyncio.get_running_loop()
        for each in queued:
            await loop.connect_accepted_socket(self._connection, each)

    def _connection(self) -> BoundedHttp:
        return BoundedHttp(self.config, self.server_state, self.lifespan.state)

    async def _are_closed_within(self, timeout_s: float) -> bool:
        """Close connections as they become idle; whether all have ended in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        state = self.server_state
        while True:
            for connection in list(state.connections):
                connection.shutdown()
            if not state.connections and not state.tasks:
                return True
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(_TICK_S)

    async def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)


def _accept_all(listener: socket.socket) -> Iterator[socket.socket]:
    """Every connection that waits to be accepted; an event loop takes one at a turn, and a busy one has few turns."""
    while True:
        try:
            accepted, _ = listener.accept()
        except OSError:  # BlockingIOError: there is none left
            return
        accepted.setblocking(False)
        yield accepted


def _uvicorn_config(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # uvicorn wants its own ASGI types; ours are wider
        loop="none",
        http=BoundedHttp,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
