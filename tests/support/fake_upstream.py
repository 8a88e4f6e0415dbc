"""A stand-in for one vLLM server: its wire format to the byte, with failures on demand. Raw asyncio, no framework.

It answers the routes that a gateway forwards in the form of vLLM 0.32 (``fake_formats`` has those of ``/v1/messages``
and ``/v1/responses``): one token a chunk, usage where the request asks for it, ``system_fingerprint`` on the last chunk
that vLLM puts it on. Several prompts are answered each by itself, and a chunk tells the usage of its own prompt and
choice. Ids and times are constant, so that two answers to the same request are equal.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from tests.support.fake_formats import (
    compact,
    count_answer,
    messages_answer,
    messages_events,
    responses_answer,
    responses_events,
    token_text,
)

Failure = Literal["busy", "bad request", "broken", "die before", "die after", "no finish", "engine error", "silent"]

FINGERPRINT = "vllm-0.32.0-0123abcd"
DEFAULT_OUTPUT = 16
#: Chunks that a stream sends before a failure "after" begins.
CHUNKS_BEFORE_FAILURE = 3


def text_tokens(text: Any) -> int:
    """The length of a text on this engine: its bytes over four, at least 1."""
    return max(1, len(str(text).encode()) // 4)


def prompt_lengths(body: dict[str, Any]) -> list[int]:
    """Tokens of each prompt."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        return [text_tokens(each) for each in prompt]
    if prompt is not None:
        return [text_tokens(prompt)]
    told = [body.get("system"), body.get("instructions"), *_contents(body.get("input"))]
    told += [message.get("content") for message in body.get("messages", ())]
    return [text_tokens("".join(str(text) for text in told if text is not None))]


def _contents(sent: Any) -> list[Any]:
    return [item.get("content") for item in sent] if isinstance(sent, list) else [sent]


def output_tokens(body: dict[str, Any], ends_after: int | None = None) -> int:
    """The length of each answer: what the request allows, unless it ends by itself before."""
    named = (body.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    allowed = next((int(most) for most in named if most), DEFAULT_OUTPUT)
    return allowed if ends_after is None else min(allowed, ends_after)


def finish_reason(body: dict[str, Any], ends_after: int | None = None) -> str:
    """Why answers end: by themselves, or at what the request allows."""
    return "stop" if output_tokens(body, ends_after) < output_tokens(body) else "length"


def usage(prompt: int, output: int) -> dict[str, int]:
    """Usage as vLLM writes it."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}


def stream_events(body: dict[str, Any], chat: bool, ends_after: int | None = None) -> list[bytes]:
    """Every event of a stream, as vLLM sends them for these options; every choice stops at ``ends_after`` tokens."""
    options = body.get("stream_options") or {}
    asked = bool(options.get("include_usage"))
    every_chunk = asked and bool(options.get("continuous_usage_stats"))
    prompts, output, n = prompt_lengths(body), output_tokens(body, ends_after), int(body.get("n") or 1)
    reason = finish_reason(body, ends_after)
    events: list[bytes] = []

    def chunk(choices: list[dict[str, Any]], counted: int | None, **more: Any) -> None:
        prompt = prompts[choices[0]["index"] // n] if choices else sum(prompts)
        told = {"usage": usage(prompt, counted)} if counted is not None else {}
        head = {"id": "cmpl-1", "object": "chunk", "created": 1, "model": body["model"], "choices": choices}
        events.append(f"data: {compact({**head, **told, **more})}\n\n".encode())

    if chat:
        for index in range(n):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunk([choice], 0 if every_chunk else None, prompt_token_ids=None, prompt_text=None)
    for token in range(1, output + 1):
        for index in range(n * len(prompts)):
            text = token_text(token)
            finish = reason if token == output else None
            said = {"delta": {"content": text}} if chat else {"text": text}
            more = {"system_fingerprint": FINGERPRINT} if finish and not asked else {}
            chunk(
                [{"index": index, **said, "logprobs": None, "finish_reason": finish}],
                token if every_chunk else None,
                **more,
            )
    if asked:
        chunk([], n * len(prompts) * output, system_fingerprint=FINGERPRINT)
    return [*events, b"data: [DONE]\n\n"]


def whole_answer(body: dict[str, Any], chat: bool, ends_after: int | None = None) -> bytes:
    """The answer that is not streamed; every choice stops at ``ends_after`` tokens."""
    prompts, output = prompt_lengths(body), output_tokens(body, ends_after)
    count = int(body.get("n") or 1) * len(prompts)
    said: dict[str, Any] = {"message": {"role": "assistant", "content": "tok"}} if chat else {"text": "tok"}
    reason = finish_reason(body, ends_after)
    choices = [{"index": index, **said, "finish_reason": reason} for index in range(count)]
    head = {"id": "cmpl-1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": choices}
    return compact({**head, "usage": usage(sum(prompts), count * output)}).encode()


def events_of(path: str, body: dict[str, Any], ends_after: int | None = None) -> list[bytes]:
    """Every event of a stream on this path."""
    (prompt, *_), output = prompt_lengths(body), output_tokens(body, ends_after)
    stopped = finish_reason(body, ends_after) == "stop"
    if path == "/v1/messages":
        return messages_events(body["model"], prompt, output, "end_turn" if stopped else "max_tokens")
    if path == "/v1/responses":
        return responses_events(body, prompt, output, "completed" if stopped else "incomplete")
    return stream_events(body, "chat" in path, ends_after)


def answer_of(path: str, body: dict[str, Any], ends_after: int | None = None) -> bytes:
    """The answer on this path that is not streamed."""
    (prompt, *_), output = prompt_lengths(body), output_tokens(body, ends_after)
    stopped = finish_reason(body, ends_after) == "stop"
    if path == "/v1/messages/count_tokens":
        return count_answer(prompt)
    if path == "/v1/messages":
        return messages_answer(body["model"], prompt, output, "end_turn" if stopped else "max_tokens")
    if path == "/v1/responses":
        return responses_answer(body, prompt, output, "completed" if stopped else "incomplete")
    return whole_answer(body, "chat" in path, ends_after)


#: How an engine's own error looks in the middle of a stream; a responses stream just breaks off.
_ENGINE_ERRORS = {
    "/v1/messages": (
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"engine died"}}\n\n'
    ),
}
_CHAT_ENGINE_ERROR = b'data: {"error":{"message":"engine died","code":500}}\n\n'


@dataclass
class FakeUpstream:
    """One replica. Use as an async context manager; ``failures`` are taken one per request, in order.

    While ``gate`` is cleared, streams stop after ``CHUNKS_BEFORE_FAILURE`` chunks and wait for it, and other answers
    wait before they begin. Answers stop by themselves at ``ends_after`` tokens, where it is set and the request allows
    more. ``refusal`` is what its refusals say, where it is set.
    """

    failures: deque[Failure] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    ends_after: int | None = None
    refusal: str = ""
    open_requests: int = 0
    aborted: int = 0

    async def __aenter__(self) -> FakeUpstream:
        self.gate.set()
        self._tasks: set[asyncio.Task[None]] = set()
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
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.transport.abort()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *fields = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        path = line.split(" ")[1]
        self.bodies.append(body)
        self.headers.append(headers)
        self.paths.append(path)
        self.open_requests += 1
        answering = asyncio.create_task(self._answer(writer, path, body))
        leaving = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.aborted += 1
                return False
            return answering.result()
        finally:
            self.open_requests -= 1
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> bool:
        failure = self.failures.popleft() if self.failures else None
        if failure == "die before":
            return False
        if failure == "silent":
            await asyncio.Event().wait()
        refusals: dict[Failure | None, int] = {"busy": 503, "bad request": 400, "broken": 500}
        if failure in refusals:
            refused = {"message": self.refusal or failure, "type": "x", "param": None, "code": None}
            return await _send_whole(writer, refusals[failure], compact({"error": refused}).encode())
        if body.get("stream"):
            engine_error = _ENGINE_ERRORS.get(path, _CHAT_ENGINE_ERROR)
            return await self._stream(writer, events_of(path, body, self.ends_after), failure, engine_error)
        await self.gate.wait()
        return await _send_whole(writer, 200, answer_of(path, body, self.ends_after))

    async def _stream(
        self, writer: asyncio.StreamWriter, events: Sequence[bytes], failure: Failure | None, engine_error: bytes
    ) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n")
        for position, event in enumerate(events):
            if position == CHUNKS_BEFORE_FAILURE:
                if failure == "die after":
                    await writer.drain()
                    return False
                await self.gate.wait()
                if failure == "no finish":
                    if b"response.completed" not in events[-1]:  # which is the finish itself
                        _write_chunk(writer, events[-1])
                    break
                if failure == "engine error":
                    _write_chunk(writer, engine_error)
                    _write_chunk(writer, events[-1])
                    break
            _write_chunk(writer, event)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


async def _send_whole(writer: asyncio.StreamWriter, status: int, body: bytes) -> bool:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return True
