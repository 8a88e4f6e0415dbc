"""Reading the event streams of ``/v1/messages`` and ``/v1/responses`` as they pass through. Pure: bytes in, bytes out.

Both formats name their events, tell the output's tokens only at the end, and pass unchanged:

- ``/v1/messages`` tells the prompt's tokens with ``message_start``, and all of its usage with ``message_delta``, which
  has the ``stop_reason`` too; it ends with ``message_stop``. ``message_stop`` alone proves nothing.
- ``/v1/responses`` tells its usage with its last event, ``response.completed`` (which vLLM sends whatever the
  response's ``status``), ``response.incomplete`` or ``response.failed``.

Until the usage is told, the output is estimated at the upper side: by the deltas that came, each worth what the
caller's whole streams taught; where none did, by their number or their text's bytes times the model's tokens per byte,
whichever is more. It is never more than was asked for. An engine may also generate what it
does not tell yet: it holds back text that a stop string or a tool call may begin in. So where nothing of the answer has
come for longer than ``QUIET_S``, what it may have generated since then is added, at the fastest. A stream that is left
while its text flows owes what came, and one that is left before its text is told does not get it for nothing. Silence
that text has ended counts no more: the text itself tells what was held back. The last event is kept back until the
stream is flushed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from time import monotonic
from typing import Any

import msgspec

from ratelimit.gateway.estimates import TextRates
from ratelimit.gateway.formats.answers import STOPPED_BY_ITSELF
from ratelimit.gateway.formats.usage import MessagesUsage, ResponsesUsage
from ratelimit.gateway.hold import MOST_TOKENS, Usage, generated_at_most
from ratelimit.gateway.sse import EventTooLargeError, data_of

_ANY_EVENT_END = re.compile(rb"\n\n|\r\n\r\n")
_EVENT = b"event:"
_MAX_EVENT_BYTES = 16 * 1024 * 1024
#: Longer than an engine that tells its text as it comes takes for a step, also where it is full.
QUIET_S = 1.0


class Seen(msgspec.Struct):
    """What a stream's events have told so far.

    ``final`` is the usage told at the end, ``prompt`` the prompt's as told before. ``last``: the last event came;
    ``stopped``: the answer says that it is whole; ``ended``: it ended by itself.
    """

    final: Usage | None = None
    prompt: Usage | None = None
    deltas: int = 0
    text_bytes: int = 0
    last: bool = False
    stopped: bool = False
    ended: bool = False
    error: bool = False

    def note_text(self, text: str) -> None:
        """A delta of the answer came."""
        self.deltas += 1
        self.text_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


#: Reads one event (its name, its data) into what was seen.
Reader = Callable[[Seen, bytes, bytes], None]


class EventFilter:
    """The state of one stream; ``held_prompt_tokens`` count until the engine tells the prompt's length.

    ``most_output`` is the most that the request may have generated, ``None`` where that is not known. ``clock`` tells
    seconds; the stream begins when it is made, with the first bytes of the answer.
    """

    __slots__ = (
        "_clock",
        "_held_prompt_tokens",
        "_kept",
        "_most_output",
        "_rates",
        "_read",
        "_seen",
        "_spoke_s",
    )

    def __init__(
        self,
        read: Reader,
        held_prompt_tokens: int,
        rates: TextRates,
        most_output: int | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._read = read
        self._most_output = most_output
        self._held_prompt_tokens = held_prompt_tokens
        self._rates = rates
        self._clock = clock
        self._spoke_s = clock()  # when the latest of the answer came
        self._seen = Seen()
        self._kept = b""  # an event that has not ended, or the last

    @property
    def complete(self) -> bool:
        """The answer is whole: it says so itself."""
        return self._seen.stopped and self._seen.last

    @property
    def ended(self) -> bool:
        """The answer ended by itself, and not at a bound."""
        return self._seen.ended

    @property
    def error_seen(self) -> bool:
        """The engine told an error."""
        return self._seen.error

    @property
    def deltas(self) -> int:
        """The deltas of a whole stream, whose tokens the engine has told; 0 of any other."""
        return self._seen.deltas if self.complete and self._seen.final is not None else 0

    @property
    def usage(self) -> Usage | None:
        """What the engine has told, its output estimated until it does; ``None`` before anything came."""
        seen = self._seen
        if seen.final is not None:
            return seen.final
        untold = self._untold()
        if seen.prompt is None and not seen.deltas and not untold:
            return None
        output = self._rates.tokens(seen.deltas, seen.text_bytes) + untold
        if self._most_output is not None:
            output = min(output, self._most_output)
        if seen.prompt is None:
            return Usage(self._held_prompt_tokens, output)
        return Usage(seen.prompt.prompt_tokens, max(output, seen.prompt.output_tokens), seen.prompt.cached_tokens)

    def _untold(self) -> int:
        """Tokens that may have been generated since the latest of the answer came."""
        quiet_s = self._clock() - self._spoke_s
        return generated_at_most(quiet_s, 1, MOST_TOKENS) if quiet_s > QUIET_S else 0

    def feed(self, data: bytes) -> bytes:
        """The bytes to pass on for the bytes that came: whole events, without the last.

        Raises ``EventTooLargeError``, and ``msgspec.DecodeError`` for an event that is not JSON.
        """
        data = self._kept + data if self._kept else data
        start = 0
        for found in _ANY_EVENT_END.finditer(data):
            if self._seen.last:
                break
            self._event(data[start : found.end()])
            if not self._seen.last:
                start = found.end()
        self._kept = data[start:]
        if len(self._kept) > _MAX_EVENT_BYTES:
            raise EventTooLargeError(f"an event is larger than {_MAX_EVENT_BYTES} bytes")
        return data[:start] if self._kept else data

    def flush(self) -> bytes:
        """What is still held when the stream ends."""
        kept, self._kept = self._kept, b""
        return kept

    def _event(self, event: bytes) -> None:
        told = data_of(event)
        if told:
            deltas = self._seen.deltas
            name = next((line[len(_EVENT) :].strip() for line in event.splitlines() if line.startswith(_EVENT)), b"")
            self._read(self._seen, name, told)
            if self._seen.deltas != deltas:
                self._spoke_s = self._clock()


class _Delta(msgspec.Struct):
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _MessagesStart(msgspec.Struct):
    usage: MessagesUsage | None = None


class _MessagesEvent(msgspec.Struct):
    message: _MessagesStart | None = None
    delta: _Delta | None = None
    usage: MessagesUsage | None = None
    error: Any = None


_messages_decoder = msgspec.json.Decoder(_MessagesEvent)


def read_messages_event(seen: Seen, name: bytes, data: bytes) -> None:
    """``/v1/messages``."""
    event = _messages_decoder.decode(data)
    if name == b"content_block_delta" and event.delta is not None:
        seen.note_text(event.delta.text + event.delta.thinking + event.delta.partial_json)
    elif name == b"message_start" and event.message is not None and event.message.usage is not None:
        seen.prompt = event.message.usage.usage()
    elif name == b"message_delta":
        _note_message_end(seen, event)
    elif name == b"message_stop":
        seen.last = True
    elif name == b"error" or event.error is not None:
        seen.error = True


def _note_message_end(seen: Seen, event: _MessagesEvent) -> None:
    if event.usage is not None:
        told = event.usage.usage()
        prompt = told if event.usage.input_tokens is not None or seen.prompt is None else seen.prompt
        seen.final = Usage(prompt.prompt_tokens, told.output_tokens, prompt.cached_tokens)
    if event.delta is not None and event.delta.stop_reason is not None:
        seen.stopped = True
        seen.ended = event.delta.stop_reason in STOPPED_BY_ITSELF


class _Response(msgspec.Struct):
    status: str = ""
    usage: ResponsesUsage | None = None


class _ResponsesEvent(msgspec.Struct):
    delta: Any = None
    response: _Response | None = None
    error: Any = None


_responses_decoder = msgspec.json.Decoder(_ResponsesEvent)
_RESPONSE_ENDS = frozenset({b"response.completed", b"response.incomplete", b"response.failed"})


def read_responses_event(seen: Seen, name: bytes, data: bytes) -> None:
    """``/v1/responses``."""
    event = _responses_decoder.decode(data)
    if isinstance(event.delta, str):
        seen.note_text(event.delta)
    elif name in _RESPONSE_ENDS:
        seen.last = seen.stopped = True
        if event.response is not None:
            seen.ended = event.response.status == "completed" and name == b"response.completed"
            seen.final = event.response.usage.usage() if event.response.usage else None
    elif name == b"error" or event.error is not None:
        seen.error = True
