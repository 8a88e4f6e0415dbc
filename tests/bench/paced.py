"""An upstream that takes an engine's time: answers of varying length, that end by themselves, token by token."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tests.bench.upstream import NOT_FOUND, http_chunk
from tests.support.fake_upstream import output_tokens, stream_events, whole_answer
from tests.support.gateway import MAX_MODEL_LEN

#: Tokens of an answer, all lengths between them equally often: 45 on average.
SHORTEST, LONGEST = 10, 80
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_WHOLE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class PacedUpstream:
    """One replica, for chat completions, that takes ``token_s`` for a token. Use as an async context manager.

    ``generated`` counts output tokens by the content of the first message, which tells who asked.
    """

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self.generated: Counter[str] = Counter()
        self._lengths = random.Random(7)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> PacedUpstream:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if not head.startswith(b"post "):  # LiteLLM looks what else is there
                    writer.write(NOT_FOUND)
                    continue
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                await self._answer(writer, json.loads(await reader.readexactly(length)))
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.transport.abort()

    async def _answer(self, writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
        body = {"max_tokens": MAX_MODEL_LEN, **asked}
        length = self._lengths.randint(SHORTEST, LONGEST)
        self.generated[body["messages"][0]["content"]] += output_tokens(body, length)
        if body.get("stream"):
            await self._stream(writer, stream_events(body, True, length))
        else:
            await asyncio.sleep(output_tokens(body, length) * self._token_s)
            answer = whole_answer(body, True, length)
            writer.write(_WHOLE_HEAD % len(answer) + answer)
            await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, events: Sequence[bytes]) -> None:
        writer.write(_STREAM_HEAD)
        for event in events:
            await asyncio.sleep(self._token_s)
            writer.write(http_chunk(event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
