"""The lightest callers: one connection for each request, and what came back of it. No client library, no retries."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import msgspec

CHAT = "/v1/chat/completions"
#: How long a whole answer may take; beyond it a test has hung.
ANSWER_TIMEOUT_S = 60.0
#: Those who are refused ask again after so long, whatever they were told: they mean to be a burden.
HAMMER_S = 0.05
_RETRYABLE = (429, 503, 529)
#: What the last event of a stream has, on each route.
_ENDS = re.compile(rb"data: \[DONE\]\s*$|event: message_stop\b|event: response\.(completed|incomplete)\b")


class Answer(msgspec.Struct, frozen=True):
    """What came back. ``whole``: to its end, by what HTTP says; status 0: nothing came back."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    @property
    def complaint(self) -> str:
        """What an official client could not live with; empty where there is nothing."""
        if self.status in _RETRYABLE:
            timed = all(int(self.headers.get(name, 0)) >= 1 for name in ("retry-after", "retry-after-ms"))
            return "" if timed and self.whole else f"{self.status} without a time to retry: {self}"
        if self.status != 200 or not self.whole or b'"error"' in self.body:
            return f"not served: {self}"
        streamed = self.headers["content-type"].startswith("text/event-stream")
        return f"a stream without an end: {self}" if streamed and not _ENDS.search(self.body) else ""


async def ask(url: str, secret: str, body: dict[str, Any], path: str = CHAT) -> Answer:
    """One request on a connection of its own; cancelled, it leaves at once, as a client that was killed does."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        return await _ask(urlsplit(url), secret, msgspec.json.encode(body), path)


async def _ask(url: Any, secret: str, body: bytes, path: str) -> Answer:
    try:
        reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=2**20)
    except OSError:
        return Answer(0, {}, b"", whole=False)
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: {url.netloc}\r\nauthorization: Bearer {secret}\r\nconnection: close\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        return await _answer(reader)
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> Answer:
    try:
        line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    except (asyncio.IncompleteReadError, OSError):
        return Answer(0, {}, b"", whole=False)
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    body, broken = b"", False
    try:
        body = await reader.read(-1)
    except OSError:
        broken = True
    length = headers.get("content-length")
    whole = len(body) == int(length) if length is not None else body.endswith(b"0\r\n\r\n")
    return Answer(int(line.split(" ")[1]), headers, body.removesuffix(b"\r\n0\r\n\r\n"), whole and not broken)


class Load:
    """Callers that ask without a pause for as long as the block lasts; each takes the bodies in turn.

    ``asked`` counts their requests, ``statuses`` the answers, ``complaints`` says what was wrong with any. Who is
    refused asks again after ``pause_s``.
    """

    def __init__(
        self, url: str, secret: str, callers: int, *bodies: dict[str, Any], path: str = CHAT, pause_s: float = HAMMER_S
    ) -> None:
        self._url = url
        self._pause_s = pause_s
        self._path = path
        self._secret = secret
        self._bodies = bodies
        self._callers = callers
        self._stopping = False
        self.asked = 0
        self.statuses: Counter[int] = Counter()
        self.complaints: list[str] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(self._callers)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let what is being answered end."""
        self._stopping = True
        if kind is not None:
            self.leave()
        await asyncio.wait(self._tasks)
        for task in self._tasks:
            if not task.cancelled() and kind is None:
                task.result()

    def leave(self) -> None:
        """Be gone at once, whatever is being answered."""
        for task in self._tasks:
            task.cancel()

    async def _call(self, number: int) -> None:
        while not self._stopping:
            self.asked += 1
            answer = await ask(self._url, self._secret, self._bodies[number % len(self._bodies)], self._path)
            number += 1
            self.statuses[answer.status] += 1
            if complaint := answer.complaint:
                self.complaints.append(complaint)
            if answer.status != 200:
                await asyncio.sleep(self._pause_s)
