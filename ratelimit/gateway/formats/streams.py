"""The stream of each route: what reads it, and how its end is told where it breaks off. Pure."""

from __future__ import annotations

from typing import Protocol

from ratelimit.gateway.dialects import chat_stream_error, messages_stream_error, responses_stream_error
from ratelimit.gateway.estimates import TextRates
from ratelimit.gateway.formats.events import EventFilter, read_messages_event, read_responses_event
from ratelimit.gateway.formats.fields import Route
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.sse import StreamFilter
from ratelimit.gateway.wire import ParsedRequest


class AnswerStream(Protocol):
    """An engine's stream as it passes through; its end is kept back until it is flushed."""

    @property
    def complete(self) -> bool:
        """Whether the answer is whole."""

    @property
    def ended(self) -> bool:
        """Whether the answer ended by itself, and not at a bound."""

    @property
    def error_seen(self) -> bool:
        """Whether the engine told an error."""

    @property
    def deltas(self) -> int:
        """The deltas of a whole stream that told its usage only at its end; 0 of any other."""

    @property
    def usage(self) -> Usage | None:
        """What was used so far, as far as that is known; ``None`` where nothing is."""

    def feed(self, data: bytes) -> bytes:
        """The bytes to pass on for the bytes that came. Raises ``ValueError`` for what cannot be read."""

    def flush(self) -> bytes:
        """What is still held when the stream ends."""


def answer_stream(
    request: ParsedRequest, held_prompt_tokens: int, rates: TextRates, most_output: int | None = None
) -> AnswerStream:
    """The filter for a request's stream; ``most_output`` bounds what a stream that is cut may be taken to have had."""
    most = request.max_output if most_output is None else most_output
    if request.route == "messages":
        return EventFilter(read_messages_event, held_prompt_tokens, rates, most)
    if request.route == "responses":
        return EventFilter(read_responses_event, held_prompt_tokens, rates, most)
    return StreamFilter(request.shown_usage, request.choices, request.prompts, held_prompt_tokens)


def stream_error(route: Route, message: str, request_id: bytes) -> bytes:
    """The event that ends a broken stream, in the form that the route's clients raise on."""
    if route == "messages":
        return messages_stream_error(message, request_id)
    if route == "responses":
        return responses_stream_error(message)
    return chat_stream_error(message)
