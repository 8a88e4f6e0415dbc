"""uvicorn's HTTP/1.1 with what it does not have: bounds on a request's head and on connections, and no upgrades.

A server may ignore that a client offers to upgrade, and this one does: Java's own client offers HTTP/2 with every
request. The parser would not: it takes the body of such a request for the new protocol's bytes, and uvicorn would go on
to read them as a request of its own.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ratelimit.gateway.asgi import Receive, Scope, Send, new_request_id, request_id_for, send_rejection
from ratelimit.gateway.dialects import dialect_of
from ratelimit.gateway.errors import too_many_connections

#: The most bytes of a request's headers; what one read brings may come on top while they are parsed.
MAX_HEAD_BYTES = 64 * 1024
#: From a connection's start, or a request's first byte, to the end of its head.
HEAD_TIMEOUT_S = 20.0
#: Connections beyond this many, per process, have their first request answered with 503 and are closed.
MAX_CONNECTIONS = 8192
#: Connections beyond these are closed at once: so many may be on their way to their 503.
_MAX_REFUSED_CONNECTIONS = 1024
#: A connection this young is about to bring its first request.
_FIRST_REQUEST_S = 1.0


class ConnectionsState(ServerState):
    """What the connections of one server share; once it is ``leaving``, each ends with its next answer."""

    leaving = False


class _HeadTooLargeError(ValueError):
    """Ends the parsing of a head that passed the bound."""


async def _refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    request_id = request_id_for(scope, new_request_id())
    await send_rejection(receive, send, too_many_connections(), dialect_of(scope["path"]), request_id)


class BoundedHttp(HttpToolsProtocol):
    """One connection: a head that is too large gets a 400, and one that is too slow gets its connection closed."""

    server_state: ConnectionsState
    _in_head = False  # a request has begun, and its head has not ended
    _unparsed_bytes = 0  # came since then, in reads that ended no head: what the parser may have to keep
    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None
    _expected_until_s = 0.0  # a first request that has not begun

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """A connection that says nothing is not kept."""
        super().connection_made(transport)
        self._expected_until_s = self.loop.time() + _FIRST_REQUEST_S
        if len(self.connections) > MAX_CONNECTIONS:
            self.app: Any = _refuse_connection
            if len(self.connections) > MAX_CONNECTIONS + _MAX_REFUSED_CONNECTIONS:
                transport.close()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._await_no_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, as long as a head that has not ended is within its bounds."""
        was_in_head = self._in_head
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._in_head and was_in_head:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's head is too large.")
        if self._late is None and (self._in_head or not self._answering):
            self._await_head()

    def _parse(self, data: bytes) -> None:
        left = memoryview(data)
        while True:
            try:
                self.parser.feed_data(left)
            except httptools.HttpParserUpgrade as offered:
                left = left[offered.args[0] :]
                head = self._head_without_upgrade()
                self.parser = _new_parser(self)
                self.parser.feed_data(head)
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        """The head that was just parsed, as the client would have sent it had it offered nothing."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise httptools.HttpParserError("tunnels are not served")
        fields = [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
        lines = [b"%s %s HTTP/%s" % (method, self.url, version), *fields]
        if any(b"\r" in line or b"\n" in line for line in lines):
            raise httptools.HttpParserError("a line within a line")
        return b"\r\n".join(lines) + b"\r\n\r\n"

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        self._expected_until_s = 0.0
        self._unparsed_bytes = self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request's line is there."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLargeError

    def on_headers_complete(self) -> None:
        """A request's head is complete; one that offers an upgrade will come once more, without."""
        if self.parser.should_upgrade():
            return
        self._in_head = False
        self._await_no_head()
        super().on_headers_complete()
        if self.cycle.scope["http_version"] == "1.0":
            self.cycle.send = _without_chunks(self.cycle)  # type: ignore[assignment,method-assign]  # our wider types
        if self.server_state.leaving:
            self.cycle.keep_alive = False

    def leave(self) -> None:
        """Let the client go with its next answer; where that one's head is on its way already, with the one after."""
        if self._answering and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close the connection, or after its answer where one is under way; not where a request comes in just now."""
        is_expected = self._in_head or self.loop.time() < self._expected_until_s
        if self._answering or not (is_expected or self._has_arrived()):
            super().shutdown()

    def cut_off(self) -> None:
        """Close the connection, unless a request is being answered: the time for all else is over."""
        if not self._answering:
            self.transport.close()

    def _has_arrived(self) -> bool:
        """Whether bytes are there that the event loop has not brought yet: closing would answer them with a reset."""
        connected = self.transport.get_extra_info("socket")
        if connected is None or self.transport.is_closing():
            return False
        poll = select.poll()
        poll.register(connected.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def on_message_complete(self) -> None:
        """A request is complete."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _await_head(self) -> None:
        self._late = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _await_no_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self._answering:
            self._await_head()  # a request sent ahead waits for the answer to the one before anyway
        else:
            self.transport.close()


def _without_chunks(cycle: RequestResponseCycle) -> Send:
    """Send as HTTP/1.0 has it, where there are no chunks: what has no length ends with its connection.

    uvicorn closes such a connection after its answer; but it would chunk the answer, and take any other for too long.
    """
    as_told = cycle.send
    cycle.chunked_encoding = False

    async def send(message: Any) -> None:
        cycle.expected_content_length = len(message.get("body", b""))
        await as_told(message)

    return send


def _new_parser(connection: BoundedHttp) -> httptools.HttpRequestParser:
    """A parser as uvicorn makes them: requests behind one that closes the connection are no error."""
    parser = httptools.HttpRequestParser(connection)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
