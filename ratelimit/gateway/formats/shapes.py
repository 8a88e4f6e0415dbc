"""What the gateway needs to know of a request, read from the body of each route. Pure: bytes in, plain values out.

A body is read as far as the gateway needs and no further: the engine validates the rest. All of the members below are
optional, also where the engine requires them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from ratelimit.gateway.errors import invalid_request
from ratelimit.gateway.formats.fields import Route

#: The most prompts in one completions request.
MAX_PROMPTS = 1024
#: What vLLM generates at most for a completions request that names no maximum.
COMPLETIONS_MAX_TOKENS = 16

_NULL = b"null"
_QUOTE = ord('"')
_RAW_NULL = msgspec.Raw(_NULL)
_any_decoder = msgspec.json.Decoder()


class Prompt(msgspec.Struct, frozen=True):
    """The prompts of a request: their text's bytes, how many they are, their tokens where known, and messages."""

    size: int
    count: int = 1
    tokens: int | None = None
    messages: int = 0


class StreamOptions(msgspec.Struct):
    """What a client may ask of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(msgspec.Struct):
    """What all routes have."""

    #: Members that bound the answer's length.
    maxima: ClassVar[tuple[str, ...]] = ()

    model: str
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    stream_options: StreamOptions | None = None

    def prompt_shape(self) -> Prompt:
        """The prompt, as far as it counts."""
        raise NotImplementedError

    def most_output(self) -> int | None:
        """The largest of the maxima for one choice; ``None`` where none is set. Raises ``Rejection`` (400)."""
        asked = {name: getattr(self, name) for name in self.maxima}
        for name, most in asked.items():
            if most is not None and most < 0:
                raise invalid_request(f"'{name}' is {most}, but must not be negative.", name)
        return max((most for most in asked.values() if most is not None), default=None)

    def check(self) -> None:
        """Raise ``Rejection`` (400) for what is never served."""


class _Message(msgspec.Struct):
    content: msgspec.Raw = _RAW_NULL
    tool_calls: msgspec.Raw = _RAW_NULL


class ChatBody(Body):
    """``/v1/chat/completions``."""

    maxima = ("max_tokens", "max_completion_tokens")

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    messages: list[_Message] = []
    tools: msgspec.Raw = _RAW_NULL
    functions: msgspec.Raw = _RAW_NULL
    documents: msgspec.Raw = _RAW_NULL
    chat_template_kwargs: msgspec.Raw = _RAW_NULL

    def prompt_shape(self) -> Prompt:
        """Messages with their tool calls, and what a template may write beside them."""
        told = sum(text_bytes(m.content) + text_bytes(m.tool_calls) for m in self.messages)
        beside = all_bytes(self.tools, self.functions, self.documents, self.chat_template_kwargs)
        return Prompt(told + beside, messages=len(self.messages))


class CompletionBody(Body):
    """``/v1/completions``."""

    maxima = ("max_tokens",)

    max_tokens: int | None = COMPLETIONS_MAX_TOKENS
    prompt: msgspec.Raw = _RAW_NULL

    def prompt_shape(self) -> Prompt:
        """A text or token ids, or a list of either."""
        size = text_bytes(self.prompt)
        if bytes(memoryview(self.prompt)[:1]) != b"[":
            return Prompt(size)
        items: list[Any] = _any_decoder.decode(self.prompt)
        if len(items) > MAX_PROMPTS and type(items[0]) is not int:
            told = f"'prompt' holds {len(items)} prompts, but at most {MAX_PROMPTS} are accepted."
            raise invalid_request(told, "prompt")
        return _listed_prompts(items, size)


def _listed_prompts(items: Sequence[Any], size: int) -> Prompt:
    if items and all(type(item) is int for item in items):
        return Prompt(size, tokens=len(items))
    if items and all(type(item) is list for item in items):
        return Prompt(size, count=len(items), tokens=sum(map(len, items)))
    if items and all(type(item) is str for item in items):
        return Prompt(sum(len(item.encode()) for item in items), count=len(items))
    raise invalid_request("'prompt' must be a string, or a list of strings, token ids or lists of token ids.", "prompt")


class ResponsesBody(Body):
    """``/v1/responses``. Answers are not stored, so nothing that refers to a stored one can be served."""

    maxima = ("max_output_tokens",)

    max_output_tokens: int | None = None
    input: msgspec.Raw = _RAW_NULL
    instructions: msgspec.Raw = _RAW_NULL
    tools: msgspec.Raw = _RAW_NULL
    chat_template_kwargs: msgspec.Raw = _RAW_NULL
    background: bool | None = None
    previous_response_id: str | None = None

    def prompt_shape(self) -> Prompt:
        """Instructions and input; every item of a list counts as a message."""
        size = all_bytes(self.input, self.instructions, self.tools, self.chat_template_kwargs)
        listed = bytes(memoryview(self.input)[:1]) == b"["
        items = len(_any_decoder.decode(self.input)) if listed else 1
        return Prompt(size, messages=items + (bytes(self.instructions) != _NULL))

    def check(self) -> None:
        """Refuse what needs stored answers."""
        if self.background:
            told = "'background' is not served here: answers are not stored. Stream the response instead."
            raise invalid_request(told, "background")
        if self.previous_response_id is not None:
            told = (
                "'previous_response_id' is not served here: answers are not stored. Send the earlier items in 'input'."
            )
            raise invalid_request(told, "previous_response_id")


class MessagesBody(Body):
    """``/v1/messages``."""

    maxima = ("max_tokens",)

    max_tokens: int | None = None
    messages: list[_Message] = []
    system: msgspec.Raw = _RAW_NULL
    tools: msgspec.Raw = _RAW_NULL
    chat_template_kwargs: msgspec.Raw = _RAW_NULL

    def prompt_shape(self) -> Prompt:
        """System text, messages and tools."""
        told = sum(text_bytes(message.content) for message in self.messages)
        beside = all_bytes(self.system, self.tools, self.chat_template_kwargs)
        return Prompt(told + beside, messages=len(self.messages) + (bytes(self.system) != _NULL))


class CountTokensBody(Body):
    """``/v1/messages/count_tokens``: its prompt is counted, and nothing is generated from it."""

    def prompt_shape(self) -> Prompt:
        """None that takes tokens."""
        return Prompt(0)


def text_bytes(value: msgspec.Raw) -> int:
    """Bytes of a JSON value without its quotes; escapes count as written, so this is at most a little too much."""
    written = memoryview(value)
    if bytes(written[:5]) == _NULL:
        return 0
    return written.nbytes - 2 if written[0] == _QUOTE else written.nbytes


def all_bytes(*values: msgspec.Raw) -> int:
    """The same of several values together."""
    return sum(map(text_bytes, values))


DECODERS: dict[Route, msgspec.json.Decoder[Body]] = {
    "chat": msgspec.json.Decoder(ChatBody),
    "completions": msgspec.json.Decoder(CompletionBody),
    "responses": msgspec.json.Decoder(ResponsesBody),
    "messages": msgspec.json.Decoder(MessagesBody),
    "count_tokens": msgspec.json.Decoder(CountTokensBody),
}
