"""Reading one streamed answer as a client does. Pure: lines in, what they amount to out."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

_DATA = b"data:"
_DONE = b"[DONE]"
_WHOLE_SECONDS = re.compile(r"[0-9]+\Z")


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_decoder = msgspec.json.Decoder(_Chunk)

Event = Literal["content", "nothing"]


class StreamedAnswer:
    """The state of one answer as its lines arrive. Tokens are counted from usage, never from chunks."""

    def __init__(self) -> None:
        self.input_tokens = 0
        self.output_tokens = 0
        self.finished = False
        self.problem: str | None = None

    def read(self, line: bytes) -> Event:
        """Take one line of the stream; whether it carried generated text."""
        if not line.startswith(_DATA):
            return "nothing"
        data = line[len(_DATA) :].strip()
        if data == _DONE:
            return "nothing"
        try:
            chunk = _decoder.decode(data)
        except msgspec.MsgspecError as error:
            self.problem = f"a chunk that is none: {error}"
            return "nothing"
        if bytes(chunk.error) != b"null":
            self.problem = f"an error in the stream: {bytes(chunk.error)[:200].decode(errors='replace')}"
        if chunk.usage is not None:
            self.input_tokens = chunk.usage.prompt_tokens
            self.output_tokens = chunk.usage.completion_tokens
        self.finished = self.finished or any(choice.finish_reason for choice in chunk.choices)
        return "content" if any(choice.delta and choice.delta.content for choice in chunk.choices) else "nothing"

    def incomplete(self, output_tokens: int) -> str | None:
        """What is wrong with the answer now that the stream has ended, None where it is whole and as long as asked."""
        if self.problem:
            return self.problem
        if not self.finished:
            return "the stream ended without a finish_reason"
        if self.output_tokens != output_tokens:
            return f"usage says {self.output_tokens} output tokens, {output_tokens} were asked for"
        return None


def retry_after_s(headers: dict[str, str]) -> float | None:
    """The wait that a refusal tells; None unless ``Retry-After`` is a whole number of seconds of at least 1.

    ``retry-after-ms`` is the finer of the two where it is there, and must not promise more than ``Retry-After``.
    """
    seconds = headers.get("retry-after", "")
    if not _WHOLE_SECONDS.match(seconds) or int(seconds) < 1:
        return None
    milliseconds = headers.get("retry-after-ms")
    if milliseconds is None:
        return float(seconds)
    if not _WHOLE_SECONDS.match(milliseconds) or not 1 <= int(milliseconds) <= int(seconds) * 1000:
        return None
    return int(milliseconds) / 1000
