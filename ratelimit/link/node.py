"""A link to one Redis, opened at the first command and opened anew after a failure, with growing pauses."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ratelimit.link.endpoint import Endpoint, parse_endpoint
from ratelimit.link.pipeline import Command, Pipeline, open_pipeline

#: Pauses between attempts to connect double from the first to the longest; jitter keeps processes apart.
FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 1.0
#: A connection that held this long was good: the pauses begin anew.
STEADY_S: Final = 2.0
#: Commands wait this long without a word from Redis before its connection is given up.
SILENCE_S: Final = 2.0


class Link:
    """One connection at a time to the Redis at ``url``. Raises ValueError for a URL that names none."""

    def __init__(self, url: str, connect_timeout_s: float, silence_s: float = SILENCE_S) -> None:
        self._endpoint = parse_endpoint(url)
        self._name = f"Redis at {self._endpoint}"
        self._connect_timeout_s = connect_timeout_s
        self._silence_s = silence_s
        self._pipeline: Pipeline | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._failure = ""
        self._failures = 0
        self._retry_at_s = 0.0
        self._steady_at_s = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self._name}>"

    async def command(self, key: str, *parts: bytes | str | int) -> Any:  # noqa: ARG002 -- a cluster goes by the key
        """Redis's reply, undecoded; raises the redis-py exception for an error reply.

        ConnectionError: there is no connection, or it broke first. LinkOverloadedError: too much waits already.
        """
        return await self.send(parts)

    async def send(self, *commands: Command) -> Any:
        """Send commands one directly after the other; the reply of the last. Raises as ``command``."""
        pipeline = self._pipeline or await self._connected()
        return await pipeline.request(*commands)

    async def aclose(self) -> None:
        """End the connection for good: what is in flight raises ConnectionError."""
        self._closed = True
        self._failure = "this link is closed"
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        if self._pipeline is not None:
            pipeline = self._pipeline
            pipeline.end(self._failure)
            await pipeline.ended.wait()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything here."""
        return self._connecting is None and (self._pipeline is None or self._pipeline.is_idle)

    async def _locate(self) -> Endpoint:
        """Where to connect now."""
        return self._endpoint

    async def _connected(self) -> Pipeline:
        """The connection, once the attempt under way (or a new one) has made it. Raises ConnectionError."""
        loop = asyncio.get_running_loop()
        if self._connecting is None and not self._closed and loop.time() >= self._retry_at_s:
            self._connecting = loop.create_task(self._connect(), name=f"connect to {self._name}")
        if self._connecting is not None:
            await asyncio.wait((self._connecting,))  # neither our end nor the task's reaches the other
        if self._pipeline is None:
            raise RedisConnectionError(f"no connection to {self._name}: {self._failure}")
        return self._pipeline

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                pipeline = await open_pipeline(await self._locate(), self._silence_s, self._lost)
            self._pipeline = pipeline
            self._steady_at_s = asyncio.get_running_loop().time() + STEADY_S
        except TimeoutError:
            self._failed(f"no answer in {self._connect_timeout_s:g} s")
        except (RedisError, OSError, UnicodeError) as error:  # UnicodeError: a host name that cannot be one
            self._failed(str(error))
        finally:
            self._connecting = None

    def _lost(self, reason: str) -> None:
        """An open connection ended."""
        if self._pipeline is None:
            return  # in its greeting, which raises
        self._pipeline = None
        if asyncio.get_running_loop().time() >= self._steady_at_s:
            self._failures = 0
        self._failed(reason)

    def _failed(self, reason: str) -> None:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._failures)
        self._failures = min(self._failures + 1, 30)
        self._retry_at_s = asyncio.get_running_loop().time() + pause_s * random.uniform(0.5, 1)  # noqa: S311 -- jitter
        self._failure = self._failure if self._closed else reason
