"""A stream on its way from a replica to a client, and how it is told to end.

The end is kept back until the account is settled. Only a client that was sent all that came is told a good end: where
the time was over while a part waited for a client that reads slowly, that part is lost, however whole the answer is.
"""

from __future__ import annotations

import asyncio
import logging

from ratelimit.gateway.accounting import Account
from ratelimit.gateway.asgi import ClientLeftError, Message, Send, send_within
from ratelimit.gateway.drain import Drain
from ratelimit.gateway.formats.streams import AnswerStream
from ratelimit.gateway.forward import Call
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.upstream import UpstreamError

log = logging.getLogger(__name__)

#: Chunks between two looks at a stream's usage, for output beyond what was held.
_CHUNKS_PER_LOOK = 128
#: The engine told of an error, in an event of its own that the client was sent.
_ENGINE_ERROR = "engine error"


class Relay:
    """One stream, passed on once."""

    def __init__(self, account: Account, call: Call, stream: AnswerStream, send: Send) -> None:
        self._account = account
        self._call = call
        self._stream = stream
        self._send = send
        self._is_ahead = False  # of what came, a part was read and not sent
        self._broken = ""

    @property
    def is_whole(self) -> bool:
        """Whether the client was sent all of a whole answer, but for its end."""
        return self._stream.complete and not self._is_ahead

    async def run(self, head: Message, drain: Drain, deadline: float, request_id: str) -> None:
        """Pass the stream on until its end, the deadline or the gateway's end, and settle what it used.

        Raises ``ClientLeftError`` where the client makes no room for the head before the deadline.
        """
        try:
            await send_within(self._send, deadline - asyncio.get_running_loop().time(), head)
            async with drain.until(deadline):
                await self._pump()
        except UpstreamError as error:
            self._broken = error.reason
        except TimeoutError:
            self._broken = "gateway ended" if drain.is_over else "timeout"
        except ClientLeftError:
            raise
        except Exception as error:  # whatever a replica sends: counted, and told to the client
            log.warning("request %s: cannot read the stream: %r", request_id, error)
            self._broken = "garbled"
        finally:
            self._settle()

    async def _pump(self) -> None:
        read, feed, send = self._call.answer.read_some, self._stream.feed, self._send
        data = self._call.first
        look_in = 1
        while data:
            self._is_ahead = True
            out = feed(data)
            look_in -= 1
            if not look_in:
                look_in = _CHUNKS_PER_LOOK
                if usage := self._stream.usage:
                    self._account.correct(usage)
            if out:
                await send({"type": "http.response.body", "body": out, "more_body": True})
            self._is_ahead = False
            data = await read()

    def _settle(self) -> None:
        """Settle, and let go of the replica before anything that waits for the client."""
        stream = self._stream
        ended = stream.ended and not self._is_ahead
        self._account.settle_used(_usage_of(stream), ended, self.is_whole, stream.deltas)
        self._call.close()

    @property
    def broke_off(self) -> str:
        """Why the client is told no good end, in a few words; empty where it is told one."""
        if self._stream.error_seen and not self._is_ahead:
            return _ENGINE_ERROR
        return "" if self.is_whole else self._broken or "unfinished"

    def ending(self, error: bytes) -> bytes:
        """The last bytes: the stream's own end, or ``error`` in its place where nothing has told the client of one."""
        return self._stream.flush() if self.broke_off in ("", _ENGINE_ERROR) else error


def _usage_of(stream: AnswerStream) -> Usage | None:
    """What a stream has told of its usage; ``None`` where that cannot be read."""
    try:
        return stream.usage
    except (ValueError, RecursionError):  # msgspec's are ValueErrors too
        return None
