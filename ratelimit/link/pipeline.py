"""One connection to a Redis: the commands of one turn of the event loop leave in one write, replies return in order.

Nobody's wait can shift the replies: the reply of a caller who has gone is read and dropped. A command whose caller
went before it was written is not sent. What is held for a slow server is bounded (LinkOverloadedError), and a server
that is silent while commands wait loses the connection.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias, cast

import hiredis
from redis.connection import DefaultParser
from redis.exceptions import (
    BusyLoadingError,
    InvalidResponse,
    MasterDownError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.link.endpoint import Endpoint

Command: TypeAlias = tuple[bytes | str | int, ...]
#: Told once why a connection ended.
OnEnd: TypeAlias = Callable[[str], None]

#: Commands that may wait for their replies. Redis answers some 28,000 a second: more would wait over 100 ms.
MOST_WAITING: Final = 4096
#: Bytes that may wait to be written.
MOST_UNSENT_BYTES: Final = 8 * 1024 * 1024
#: The name of our connections in CLIENT LIST.
CLIENT_NAME: Final = "penstock"
#: Replies that say that this server cannot serve us now: another may have its address at the next connect.
_UNUSABLE: Final = (ReadOnlyError, BusyLoadingError, MasterDownError)
_INCOMPLETE: Final = object()
#: Its stub takes tuples of one only.
_PACK: Final = cast("Callable[[Command], bytes]", hiredis.pack_command)
#: How Redis 6 wraps what a command said inside a script.
_IN_SCRIPT: Final = re.compile(
    r"^(?:ERR )?Error running script .*?: -?((?:READONLY|OOM|MISCONF|NOREPLICAS) .*)$", re.DOTALL
)


class LinkOverloadedError(RedisError):
    """More commands wait for Redis than may; this one was not sent."""


def reply_error(text: str) -> Exception:
    """The exception for an error reply, of redis-py's class for its first word."""
    wrapped = _IN_SCRIPT.match(text)
    error: Exception = DefaultParser.parse_error(wrapped[1] if wrapped else text)  # type: ignore[no-untyped-call] # so in redis-py
    return error


def is_unusable(error: object) -> bool:
    """Whether a reply says that this server cannot serve us now, also one that redis-py made of it."""
    if isinstance(error, _UNUSABLE):
        return True
    return isinstance(error, ResponseError) and isinstance(reply_error(str(error)), _UNUSABLE)


class Pipeline(asyncio.Protocol):
    """An open connection. Not reopened once it has ended."""

    def __init__(self, silence_s: float, on_end: OnEnd) -> None:
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=reply_error, notEnoughData=_INCOMPLETE)
        self._on_end = on_end
        #: None while the connection is open.
        self.end_reason: str | None = None
        self._transport: asyncio.Transport | None = None
        self._writable = True
        self._flush_is_due = False
        #: Each with the bytes to write, and how many replies come before the one that is awaited.
        self._unsent: list[tuple[asyncio.Future[Any], bytes, int]] = []
        self._unsent_bytes = 0
        #: In the order of the replies; None: a reply that nobody awaits.
        self._unanswered: deque[asyncio.Future[Any] | None] = deque()
        self._silence = _Silence(silence_s / 2, self)

    def request(self, *commands: Command) -> asyncio.Future[Any]:
        """Send commands one directly after the other; the reply of the last.

        Raises LinkOverloadedError, and ConnectionError where the connection has ended; the future raises what Redis
        answers, and ConnectionError where the connection ends first.
        """
        if self.end_reason is not None:
            raise RedisConnectionError(self.end_reason)
        packed = b"".join(map(_PACK, commands))
        waiting = len(self._unsent) + len(self._unanswered)
        if waiting >= MOST_WAITING or self._unsent_bytes + len(packed) > MOST_UNSENT_BYTES:
            raise LinkOverloadedError(f"{waiting} commands wait for Redis already: it is slow, or stopped")
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._unsent.append((reply, packed, len(commands) - 1))
        self._unsent_bytes += len(packed)
        if not self._flush_is_due and self._writable:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)
        return reply

    def end(self, reason: str) -> None:
        """Break the connection: everything in flight raises ConnectionError(reason). Idempotent."""
        if self.end_reason is not None:
            return
        self.end_reason = reason
        self._silence.forget()
        if self._transport is not None:
            self._transport.abort()
        for reply in (*self._unanswered, *(entry[0] for entry in self._unsent)):
            if reply is not None and not reply.done():
                reply.set_exception(RedisConnectionError(reason))
        self._unanswered.clear()
        self._unsent.clear()
        self._on_end(reason)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(f"the connection broke: {exc}" if exc else "Redis closed the connection")
        self.ended.set()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._silence.broken = True
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                self._answer(reply)
        except (RedisError, ValueError, IndexError) as error:  # IndexError: a reply that nobody asked for
            self.end(f"Redis sent what is no reply ({type(error).__name__})")

    def _answer(self, reply: object) -> None:
        waiting = self._unanswered.popleft()
        if waiting is not None and not waiting.done():
            if isinstance(reply, Exception):
                waiting.set_exception(reply)
            else:
                waiting.set_result(reply)
        if is_unusable(reply):
            self.end(f"Redis cannot serve now: {type(reply).__name__}: {reply}")

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._transport is None or not self._writable or self.end_reason is not None:
            return
        wanted = [entry for entry in self._unsent if not entry[0].done()]
        self._unsent.clear()
        self._unsent_bytes = 0
        for reply, _, unawaited in wanted:
            self._unanswered.extend([None] * unawaited)
            self._unanswered.append(reply)
        if wanted:
            self._transport.write(b"".join([packed for _, packed, _ in wanted]))
            self._silence.watch()

    @property
    def is_idle(self) -> bool:
        """Whether Redis has answered every command."""
        return not self._unanswered and not self._unsent


class _Silence:
    """Ends a connection that says nothing for two checks in a row while it owes replies.

    Two, so that a busy event loop of our own, which reads late, is not taken for a silent server.
    """

    def __init__(self, check_every_s: float, pipeline: Pipeline) -> None:
        self.broken = False
        self._check_every_s = check_every_s
        self._pipeline = pipeline
        self._silent_checks = 0
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        if self._timer is None:
            self.broken = True
            self._schedule()

    def forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._check_every_s, self._check)

    def _check(self) -> None:
        self._timer = None
        if self._pipeline.is_idle:
            return
        self._silent_checks = 0 if self.broken else self._silent_checks + 1
        self.broken = False
        if self._silent_checks >= 2:
            self._pipeline.end(f"Redis answered nothing for {2 * self._check_every_s:g} s")
        else:
            self._schedule()


async def open_pipeline(endpoint: Endpoint, silence_s: float, on_end: OnEnd) -> Pipeline:
    """Connect and greet; raises OSError and RedisError."""
    loop = asyncio.get_running_loop()
    make = partial(Pipeline, silence_s, on_end)
    if endpoint.path:
        _, pipeline = await loop.create_unix_connection(make, endpoint.path)
    else:
        host, port = endpoint.address
        _, pipeline = await loop.create_connection(make, host, port, ssl=endpoint.tls)
    try:
        await _greet(pipeline, endpoint)
    except BaseException:
        pipeline.end("the greeting failed")
        raise
    if pipeline.end_reason is not None:  # right behind the last greeting's reply
        raise RedisConnectionError(pipeline.end_reason)
    return pipeline


async def _greet(pipeline: Pipeline, endpoint: Endpoint) -> None:
    """AUTH, SELECT and a name for the connection, in one write; the first refusal is raised."""
    greetings: list[Command] = []
    if endpoint.password:
        user = (endpoint.username,) if endpoint.username else ()
        greetings.append(("AUTH", *user, endpoint.password))
    if endpoint.db:
        greetings.append(("SELECT", endpoint.db))
    greetings.append(("CLIENT", "SETNAME", CLIENT_NAME))
    replies = await asyncio.gather(*map(pipeline.request, greetings), return_exceptions=True)
    for greeting, reply in zip(greetings, replies, strict=True):
        unnamed = greeting[0] == "CLIENT" and isinstance(reply, ResponseError)  # a user who may not name itself
        if isinstance(reply, BaseException) and not unnamed:
            raise reply
