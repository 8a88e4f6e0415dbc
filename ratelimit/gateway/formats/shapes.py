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
from ratelimit.gateway.formats.media import images_of

#: The most prompts in one completions request.
MAX_PROMPTS = 1024
#: What vLLM generates at most for a completions request that names no maximum.
COMPLETIONS_MAX_TOKENS = 16
#: The most stop strings, and the most bytes of one. OpenAI accepts 4. An engine holds back as much text as the longest
#: has, and so tells nothing of it when a stream is left.
MAX_STOPS = 16
MAX_STOP_BYTES = 256

_NULL = b"null"
_QUOTE = ord('"')
_RAW_NULL = msgspec.Raw(_NULL)
_any_decoder = msgspec.json.Decoder()
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
#: What is around the text of a plain message, and counted by the tokens that a template puts there.
_FRAME_BYTES = len(b'{"role":"user","content":""}')


class Prompt(msgspec.Struct, frozen=True):
    """The prompts of a request: their text's bytes, how many they are, their tokens where known, and messages.

    The bytes are without those of the ``images``. ``truncated``: the engine cuts a prompt that is too long.
    """

    size: int
    count: int = 1
    tokens: int | None = None
    messages: int = 0
    images: int = 0
    truncated: bool = False


class StreamOptions(msgspec.Struct):
    """What a client may ask of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(msgspec.Struct):
    """What all routes have."""

    #: Members that bound the answer's length.
    maxima: ClassVar[tuple[str, ...]] = ()
    #: Members whose text an engine may write into the prompt, beside its messages.
    beside: ClassVar[tuple[str, ...]] = ()

    model: str
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    stream_options: StreamOptions | None = None
    stop: msgspec.Raw = _RAW_NULL
    stop_sequences: msgspec.Raw = _RAW_NULL

    def prompt_shape(self) -> Prompt:
        """The prompt, as far as it counts."""
        raise NotImplementedError

    def most_output(self) -> tuple[int | None, str | None]:
        """The largest of the maxima for one choice, and its name; ``None`` where none is set.

        Raises ``Rejection`` (400).
        """
        asked = {name: getattr(self, name) for name in self.maxima}
        for name, most in asked.items():
            if most is not None and most < 0:
                raise invalid_request(f"'{name}' is {most}, but must not be negative.", name)
        set_ones = [(most, name) for name, most in asked.items() if most is not None]
        return max(set_ones, default=(None, None))

    def beside_bytes(self) -> int:
        """Bytes of what stands beside the messages."""
        return all_bytes(*(getattr(self, name) for name in self.beside))

    def check(self) -> None:
        """Raise ``Rejection`` (400) for what is never served."""
        _check_stops(self.stop, "stop")
        _check_stops(self.stop_sequences, "stop_sequences")


class ChatBody(Body):
    """``/v1/chat/completions``."""

    maxima = ("max_tokens", "max_completion_tokens")
    beside = (
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "documents",
        "chat_template_kwargs",
        "response_format",
        "structured_outputs",
        "reasoning_effort",
    )

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    messages: list[msgspec.Raw] = []
    tools: msgspec.Raw = _RAW_NULL
    tool_choice: msgspec.Raw = _RAW_NULL
    functions: msgspec.Raw = _RAW_NULL
    function_call: msgspec.Raw = _RAW_NULL
    documents: msgspec.Raw = _RAW_NULL
    chat_template_kwargs: msgspec.Raw = _RAW_NULL
    response_format: msgspec.Raw = _RAW_NULL
    structured_outputs: msgspec.Raw = _RAW_NULL
    reasoning_effort: msgspec.Raw = _RAW_NULL

    def prompt_shape(self) -> Prompt:
        """Whole messages, because a template may write any member of one, and what it may write beside them."""
        return _told_in_messages(self.messages, self.beside_bytes())


class CompletionBody(Body):
    """``/v1/completions``."""

    maxima = ("max_tokens",)

    max_tokens: int | None = COMPLETIONS_MAX_TOKENS
    prompt: msgspec.Raw = _RAW_NULL
    truncate_prompt_tokens: int | None = None

    def prompt_shape(self) -> Prompt:
        """A text or token ids, or a list of either."""
        size = text_bytes(self.prompt)
        if bytes(memoryview(self.prompt)[:1]) != b"[":
            return Prompt(size)
        items: list[Any] = _any_decoder.decode(self.prompt)
        if len(items) > MAX_PROMPTS and type(items[0]) is not int:
            told = f"'prompt' holds {len(items)} prompts, but at most {MAX_PROMPTS} are accepted."
            raise invalid_request(told, "prompt")
        listed = _listed_prompts(items, size)
        if self.truncate_prompt_tokens is None or listed.tokens is None:
            return listed
        return msgspec.structs.replace(listed, tokens=self._truncated(items), truncated=True)

    def _truncated(self, items: Sequence[Any]) -> int:
        """Tokens that are left of prompts given as ids. -1 stands for the context, which is not known here."""
        prompts, most = items if type(items[0]) is list else [items], self.truncate_prompt_tokens
        return sum(len(ids) if most is None or most < 0 else min(len(ids), most) for ids in prompts)


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
    beside = (
        "input",
        "instructions",
        "tools",
        "tool_choice",
        "text",
        "reasoning",
        "chat_template_kwargs",
        "structured_outputs",
    )

    max_output_tokens: int | None = None
    input: msgspec.Raw = _RAW_NULL
    instructions: msgspec.Raw = _RAW_NULL
    tools: msgspec.Raw = _RAW_NULL
    tool_choice: msgspec.Raw = _RAW_NULL
    text: msgspec.Raw = _RAW_NULL
    reasoning: msgspec.Raw = _RAW_NULL
    chat_template_kwargs: msgspec.Raw = _RAW_NULL
    structured_outputs: msgspec.Raw = _RAW_NULL
    background: bool | None = None
    previous_response_id: str | None = None

    def prompt_shape(self) -> Prompt:
        """Instructions and input; every item of a list counts as a message."""
        listed = bytes(memoryview(self.input)[:1]) == b"["
        items = _list_decoder.decode(self.input) if listed else [self.input]
        images = images_of(items)
        messages = len(items) + (bytes(self.instructions) != _NULL)
        return Prompt(self.beside_bytes() - images.size, messages=messages, images=images.count)

    def check(self) -> None:
        """Refuse what needs stored answers too."""
        super().check()
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

    maxima: ClassVar[tuple[str, ...]] = ("max_tokens",)
    beside = ("system", "tools", "tool_choice", "thinking", "output_config", "chat_template_kwargs")

    max_tokens: int | None = None
    messages: list[msgspec.Raw] = []
    system: msgspec.Raw = _RAW_NULL
    tools: msgspec.Raw = _RAW_NULL
    tool_choice: msgspec.Raw = _RAW_NULL
    thinking: msgspec.Raw = _RAW_NULL
    output_config: msgspec.Raw = _RAW_NULL
    chat_template_kwargs: msgspec.Raw = _RAW_NULL

    def prompt_shape(self) -> Prompt:
        """System text, whole messages and tools."""
        told = _told_in_messages(self.messages, self.beside_bytes())
        return msgspec.structs.replace(told, messages=told.messages + (bytes(self.system) != _NULL))


class CountTokensBody(MessagesBody):
    """``/v1/messages/count_tokens``: its prompt is counted, and nothing is generated from it."""

    maxima = ()


def _told_in_messages(messages: Sequence[msgspec.Raw], beside: int) -> Prompt:
    told = 0
    for index, message in enumerate(messages):
        written = memoryview(message)
        if bytes(written[:1]) != b"{":
            raise invalid_request(f"Invalid request: Expected `object` - at `$.messages[{index}]`.", "messages")
        told += max(0, written.nbytes - _FRAME_BYTES)
    images = images_of(messages)
    return Prompt(max(0, told - images.size) + beside, messages=len(messages), images=images.count)


def _check_stops(value: msgspec.Raw, name: str) -> None:
    if bytes(memoryview(value)[:1]) not in (b"[", b'"'):
        return
    stops = _any_decoder.decode(value)
    listed = stops if type(stops) is list else [stops]
    if len(listed) > MAX_STOPS:
        raise invalid_request(f"'{name}' has {len(listed)} entries, but at most {MAX_STOPS} are accepted.", name)
    longest = max((len(stop.encode()) for stop in listed if type(stop) is str), default=0)
    if longest > MAX_STOP_BYTES:
        raise invalid_request(f"'{name}' has {longest} bytes, but at most {MAX_STOP_BYTES} are accepted.", name)


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
