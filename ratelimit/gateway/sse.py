r"""Reading and filtering an engine's event stream as it passes through. Pure: bytes in, bytes out.

The gateway asks an engine for its usage on every chunk (``wire``). This filter reads that usage and gives the client
the stream that the engine would have sent it directly, byte for byte:

- the ``usage`` member of a chunk goes, unless the client asked for it on every chunk;
- the last chunk, which carries usage and no choices, goes unless the client asked for it;
- ``system_fingerprint``, which vLLM puts on the finishing chunk, or on the usage chunk where there is one, moves back.
  (With several choices, on the chunk that finishes the last of them.)

A chunk as vLLM writes it, one line, compact and with its usage, is handled by a few searches in its bytes and never
parsed, and so are several in one read. All else (a chunk cut in two, several choices, another engine's spacing, events
of several lines, the end of the stream) takes the general way, event by event. Events end with a blank line; lines end
with ``\n`` or ``\r\n``.

An answer is complete when every choice has a ``finish_reason``. ``[DONE]`` alone proves nothing: an engine whose core
was killed still sends it.

This is the stream of ``/v1/chat/completions`` and ``/v1/completions``; ``formats.events`` reads the others.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import msgspec

from ratelimit.gateway.formats.answers import ENDED_BY_ITSELF
from ratelimit.gateway.formats.usage import WireUsage
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.wire import ShownUsage

_EVENT_END = b"\n\n"
_ANY_EVENT_END = re.compile(rb"\n\n|\r\n\r\n")
_DATA = b"data:"
_NEXT_DATA = b"\n\ndata:"
_DONE = b"[DONE]"
_DONE_EVENT = b"data: [DONE]\n\n"
_FINISHED = b'"finish_reason":"'
_USAGE = b',"usage":{'
_NO_CHOICES = b"[]"
_EMPTY_CHOICES = b'"choices":[]'

#: An unescaped ``"usage"`` can only be a member's name: inside a JSON string its quotes would be escaped. Its value
#: holds numbers, nulls and objects of those. (The comma goes with it; a chunk never begins with its usage.)
_USAGE_MEMBER = re.compile(rb',\s*"usage"\s*:\s*(?:null|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
#: The same as vLLM writes it in a chunk, with numbers only.
_PLAIN_USAGE = re.compile(rb',"usage":\{[^{}]*\}')


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: WireUsage | None = None
    system_fingerprint: str | None = None
    error: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


class EventTooLargeError(ValueError):
    """An event grew past the bound without ending."""


class StreamFilter:
    """The state of one stream. ``choices`` answers are expected in all, over ``prompts`` prompts.

    A prompt that has not reported its length yet counts with its share of ``held_prompt_tokens``.
    """

    __slots__ = (
        "_by_choice",
        "_choices",
        "_ended",
        "_final",
        "_held",
        "_held_prompt_tokens",
        "_latest",
        "_max_event_bytes",
        "_per_prompt",
        "_prompts",
        "_reported",
        "_shown",
        "_tail",
        "_untold",
        "done",
        "error_seen",
        "finished",
    )

    def __init__(
        self,
        shown_usage: ShownUsage,
        choices: int,
        prompts: int,
        held_prompt_tokens: int,
        max_event_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        self._shown = shown_usage
        self._choices = choices
        self._prompts = prompts
        self._per_prompt = max(1, choices // prompts)
        self._held_prompt_tokens = held_prompt_tokens
        self._max_event_bytes = max_event_bytes
        self._tail = b""  # an event that has not ended
        self._held: bytes | None = None  # the finishing chunk, until the fingerprint is known
        self._latest = b""  # the newest event that told a single choice's usage, not parsed yet
        self._reported: Usage | None = None  # a single choice's usage as it was last read
        self._by_choice: dict[int, WireUsage] = {}
        self._final: Usage | None = None
        self._ended = 0
        self._untold = 0  # pieces of the answer that came without any usage
        self.finished = 0
        self.done = False
        self.error_seen = False

    @property
    def complete(self) -> bool:
        """Every choice has a finish reason."""
        return self.finished >= self._choices

    @property
    def deltas(self) -> int:
        """None that say anything: the usage is told along the way."""
        return 0

    @property
    def ended(self) -> bool:
        """Every choice ended by itself."""
        return self._ended >= self._choices

    @property
    def usage(self) -> Usage | None:
        """What the engine has reported so far; what cannot be read of it leaves the usage read before."""
        if self._final is not None:
            return self._final
        if self._choices == 1:
            return self._single_usage() or self._untold_usage()
        if not self._by_choice:
            return self._untold_usage()
        prompts = {index // self._per_prompt: each.prompt_tokens for index, each in self._by_choice.items()}
        output = sum(each.completion_tokens or 0 for each in self._by_choice.values())
        return Usage(sum(prompts.values()) + self._held_for(self._prompts - len(prompts)), output)

    def _untold_usage(self) -> Usage | None:
        """For an engine that tells its usage only at the end: at least a token for every piece."""
        return Usage(self._held_prompt_tokens, self._untold) if self._untold else None

    def _held_for(self, prompts: int) -> int:
        return -(-self._held_prompt_tokens * max(0, prompts) // self._prompts)

    def _single_usage(self) -> Usage | None:
        latest, self._latest = self._latest, b""
        if latest:
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                if told := _chunk_decoder.decode(latest[len(_DATA) :]).usage:
                    self._reported = told.usage()
        return self._reported

    def feed(self, data: bytes) -> bytes:
        """The bytes to pass on for the bytes that came; ``[DONE]`` is kept back, and ``done`` set.

        Raises ``EventTooLargeError``, and ``msgspec.DecodeError`` for an event that is not JSON.
        """
        one_line = data.find(b"\n") == len(data) - 2 and data.endswith(_EVENT_END) and data.startswith(_DATA)
        if one_line and not self._tail and self._held is None and self._choices == 1:
            at = data.rfind(_USAGE)
            if at > 0 and data[at - 2 : at] != _NO_CHOICES and _FINISHED not in data:
                self._latest = data
                if self._shown == "every chunk":
                    return data
                close = data.find(b"}", at)
                if data.find(b"{", at + len(_USAGE), close) < 0:
                    return data[:at] + data[close + 1 :]
        return self._plain_events(data) or self._general(data)

    def _plain_events(self, data: bytes) -> bytes | None:
        """Several whole chunks of a single choice in one read, none of them special; ``None`` for anything else."""
        if self._tail or self._held is not None or self._choices != 1 or not data.endswith(_EVENT_END):
            return None
        events = data.count(_EVENT_END)
        if not data.startswith(_DATA) or data.count(_NEXT_DATA) != events - 1 or data.count(b"\n") != 2 * events:
            return None
        if data.count(_USAGE) != events or _FINISHED in data or _EMPTY_CHOICES in data:
            return None
        stripped, found = _PLAIN_USAGE.subn(b"", data)
        if found != events:
            return None
        self._latest = data[data.rfind(_EVENT_END, 0, -2) + 2 :] if found > 1 else data
        return data if self._shown == "every chunk" else stripped

    def flush(self) -> bytes:
        """What is still held when the stream ends, and ``[DONE]`` where it came and no error did."""
        done = _DONE_EVENT if self.done and not self.error_seen else b""
        return self._release() + self._take_tail() + done

    def _take_tail(self) -> bytes:
        tail, self._tail = self._tail, b""
        return tail

    def _general(self, data: bytes) -> bytes:
        data = self._take_tail() + data
        passed, start = [], 0
        for end in _ANY_EVENT_END.finditer(data):
            passed.append(self._event(data[start : end.end()]))
            start = end.end()
        self._tail = data[start:]
        if len(self._tail) > self._max_event_bytes:
            raise EventTooLargeError(f"an event is larger than {self._max_event_bytes} bytes")
        return b"".join(passed)

    def _event(self, event: bytes) -> bytes:
        told = data_of(event)
        if told == _DONE:
            self.done = True
            return self._release()
        if not told:
            return self._release() + event
        chunk = _chunk_decoder.decode(told)
        if chunk.error is not None:
            self.error_seen = True
        if not chunk.choices and chunk.usage is not None:
            return self._usage_event(event, chunk, chunk.usage)
        if chunk.usage is not None:
            self._note_usage(chunk, chunk.usage)
        else:
            self._untold += len(chunk.choices)
        self._note_finished(chunk.choices)
        released = self._release()
        if self._shown == "none" and self.complete and chunk.usage is not None and chunk.system_fingerprint is None:
            self._held = event
            return released
        return released + self._stripped(event, chunk)

    def _note_finished(self, choices: list[_Choice]) -> None:
        for choice in choices:
            if choice.finish_reason is not None:
                self.finished += 1
                self._ended += choice.finish_reason in ENDED_BY_ITSELF

    def _note_usage(self, chunk: _Chunk, usage: WireUsage) -> None:
        if self._choices == 1:
            self._latest, self._reported = b"", usage.usage()
        else:
            for choice in chunk.choices:
                self._by_choice[choice.index] = usage

    def _stripped(self, event: bytes, chunk: _Chunk) -> bytes:
        if self._shown == "every chunk" or (self._shown == "final" and chunk.usage is None):
            return event
        return _replace_usage(event, b"")

    def _usage_event(self, event: bytes, chunk: _Chunk, usage: WireUsage) -> bytes:
        self._final = usage.usage()
        if self._shown != "none":
            return self._release() + event
        fingerprint = chunk.system_fingerprint
        return self._release(b'"system_fingerprint":' + msgspec.json.encode(fingerprint) if fingerprint else b"")

    def _release(self, fingerprint: bytes = b"") -> bytes:
        """The held chunk, with the fingerprint where its usage was: that is where vLLM writes it."""
        held, self._held = self._held, None
        if held is None:
            return b""
        return _replace_usage(held, b"," + fingerprint if fingerprint else b"")


def data_of(event: bytes) -> bytes:
    """The data of an event, without its comments and other fields; empty where it has none."""
    lines = [line[len(_DATA) :].strip() for line in event.splitlines() if line.startswith(_DATA)]
    return b"\n".join(lines)


def _replace_usage(event: bytes, member: bytes) -> bytes:
    found = list(_USAGE_MEMBER.finditer(event))
    if not found:
        return event
    last = found[-1]  # what comes before may be a member of a choice
    return event[: last.start()] + member + event[last.end() :]
