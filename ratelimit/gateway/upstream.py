"""Talking to a replica: open a request, read its answer as it comes, abort it. One small interface, one aiohttp client.

Silence is watched for all streams together by one coarse timer, so that a chunk costs no timer of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import aiohttp
from yarl import URL

#: Below the 5 s for which vLLM keeps an idle connection, so that none is reused as the replica closes it.
_KEEPALIVE_S = 3.0
_SWEEPS_PER_TIMEOUT = 4


class UpstreamError(Exception):
    """A replica gave no answer, or broke it off.

    ``reached`` tells whether it may have begun to work on the request; ``reason`` is a word for the metrics.
    """

    def __init__(self, reason: str, reached: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reached = reached


class AnswerTooLargeError(Exception):
    """A replica's answer that is not streamed is above ``max_bytes``; another replica would give no smaller one."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the answer is larger than {max_bytes} bytes")
        self.max_bytes = max_bytes


class UpstreamAnswer(Protocol):
    """A replica's answer, its body still to come."""

    status: int
    content_type: bytes

    async def read_some(self) -> bytes:
        """Whatever has arrived, at least a byte; empty at the end. Raises ``UpstreamError``."""

    async def read_all(self) -> bytes:
        """The whole body. Raises ``UpstreamError``, or ``AnswerTooLargeError`` as soon as it passes the bound."""

    def close(self) -> None:
        """Let go; an answer that has not ended is aborted."""


class Upstream(Protocol):
    """Opens requests on replicas."""

    async def open(self, url: str, body: bytes, headers: Mapping[str, str]) -> UpstreamAnswer:
        """POST ``body``; returns when the status and headers have come. Raises ``UpstreamError``."""


class AiohttpAnswer:
    """An answer through aiohttp."""

    __slots__ = ("_content", "_max_bytes", "_open", "_response", "_silent_sweeps", "content_type", "status")

    def __init__(self, response: aiohttp.ClientResponse, open_answers: set[AiohttpAnswer], max_bytes: int) -> None:
        self._response = response
        self._content = response.content
        self._open = open_answers
        self._max_bytes = max_bytes
        self._silent_sweeps = -1  # below 0: nobody is reading
        self.status = response.status
        self.content_type = response.headers.get("Content-Type", "application/json").encode("latin-1")
        open_answers.add(self)

    async def read_some(self) -> bytes:
        self._silent_sweeps = 0
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(error) from error
        finally:
            self._silent_sweeps = -1

    async def read_all(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            while size <= self._max_bytes:
                part = await self._content.readany()
                if not part:
                    return parts[0] if len(parts) == 1 else b"".join(parts)
                parts.append(part)
                size += len(part)
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(error) from error
        raise AnswerTooLargeError(self._max_bytes)

    def _broken(self, error: Exception) -> UpstreamError:
        return UpstreamError("silent" if isinstance(error, _SilentError) else "broken", reached=True)

    def close(self) -> None:
        self._open.discard(self)
        self._response.close()  # returns an ended answer's connection to the pool, and closes any other

    def sweep(self, limit: int) -> None:
        """Count one sweep of silence; past ``limit`` the reader gets an error."""
        if self._silent_sweeps >= 0:
            self._silent_sweeps += 1
            if self._silent_sweeps > limit:
                self._content.set_exception(_SilentError("no chunk in time"))


class _SilentError(aiohttp.ClientError):
    """Nothing came for the chunk timeout."""


class AiohttpUpstream:
    """Connections to all replicas, kept open between requests. Use as an async context manager."""

    def __init__(self, connect_timeout_s: float, chunk_timeout_s: float, max_answer_bytes: int) -> None:
        self._max_answer_bytes = max_answer_bytes
        self._connect_timeout_s = connect_timeout_s
        self._sweep_interval_s = chunk_timeout_s / _SWEEPS_PER_TIMEOUT
        self._open: set[AiohttpAnswer] = set()
        self._parsed_url = lru_cache(4096)(URL)

    async def __aenter__(self) -> AiohttpUpstream:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent",),
            headers={"Accept-Encoding": "identity"},  # what a proxy before a replica compresses would pass as it is
            auto_decompress=False,
        )
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sweeper.cancel()
        await asyncio.wait({self._sweeper})
        await self._session.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_interval_s)
            for answer in tuple(self._open):
                answer.sweep(_SWEEPS_PER_TIMEOUT)

    async def open(self, url: str, body: bytes, headers: Mapping[str, str]) -> AiohttpAnswer:
        """POST ``body``; returns when the status and headers have come. Raises ``UpstreamError``."""
        try:
            response = await self._session.post(
                self._parsed_url(url), data=body, headers=headers, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as error:
            raise UpstreamError("refused", reached=False) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise UpstreamError("connect timeout", reached=False) from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("broken", reached=True) from error
        return AiohttpAnswer(response, self._open, self._max_answer_bytes)
