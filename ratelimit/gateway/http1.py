"""uvicorn's HTTP/1.1 with bounds on a request's head, which it does not have: its size, and how long it may take."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: The most bytes of a request's headers; what one read brings may come on top while they are parsed.
MAX_HEAD_BYTES = 64 * 1024
#: From a connection's start, or a request's first byte, to the end of its head.
HEAD_TIMEOUT_S = 20.0


class _HeadTooLargeError(ValueError):
    """Ends the parsing of a head that passed the bound."""


class BoundedHttp(HttpToolsProtocol):
    """One connection: a head that is too large gets a 400, and one that is too slow gets its connection closed."""

    _in_head = False  # a request has begun, and its head has not ended
    _unparsed_bytes = 0  # came since then, in reads that ended no head: what the parser may have to keep
    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """A connection that says nothing is not kept."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._await_no_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, as long as a head that has not ended is within its bounds."""
        was_in_head = self._in_head
        super().data_received(data)
        if self._in_head and was_in_head:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's head is too large.")
        if self._late is None and (self._in_head or not self._answering):
            self._await_head()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
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
        """A request's head is complete."""
        self._in_head = False
        self._await_no_head()
        super().on_headers_complete()

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
