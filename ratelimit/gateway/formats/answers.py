"""What an answer that is not streamed tells of itself, by route. Pure: bytes in, plain values out."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ratelimit.gateway.formats.fields import Route
from ratelimit.gateway.formats.usage import MessagesUsage, ResponsesUsage, WireUsage
from ratelimit.gateway.hold import Usage

#: Finish reasons of OpenAI's answers that ended by themselves, and not at a bound.
ENDED_BY_ITSELF = frozenset({"stop", "tool_calls", "function_call"})
#: The same of Anthropic's.
STOPPED_BY_ITSELF = frozenset({"end_turn", "stop_sequence", "tool_use"})


class Outcome(msgspec.Struct, frozen=True):
    """What was used, as far as it is told, and whether the answer ended by itself."""

    usage: Usage | None
    ended: bool


_UNKNOWN = Outcome(None, False)


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Choices(msgspec.Struct):
    choices: list[_Choice] = []
    usage: WireUsage | None = None

    def outcome(self) -> Outcome:
        ended = bool(self.choices) and all(choice.finish_reason in ENDED_BY_ITSELF for choice in self.choices)
        return Outcome(self.usage.usage() if self.usage else None, ended)


class _Response(msgspec.Struct):
    status: str = ""
    usage: ResponsesUsage | None = None

    def outcome(self) -> Outcome:
        return Outcome(self.usage.usage() if self.usage else None, self.status == "completed")


class _Message(msgspec.Struct):
    stop_reason: str | None = None
    usage: MessagesUsage | None = None

    def outcome(self) -> Outcome:
        return Outcome(self.usage.usage() if self.usage else None, self.stop_reason in STOPPED_BY_ITSELF)


class _Count(msgspec.Struct):
    def outcome(self) -> Outcome:
        return Outcome(Usage(0, 0), False)  # what was counted was not generated from


def _reader(
    kind: type[_Choices] | type[_Response] | type[_Message] | type[_Count],
) -> Callable[[bytes], Outcome]:
    decoder = msgspec.json.Decoder(kind)

    def read(body: bytes) -> Outcome:
        try:
            return decoder.decode(body).outcome()
        except (msgspec.DecodeError, UnicodeDecodeError):
            return _UNKNOWN

    return read


_READERS: dict[Route, Callable[[bytes], Outcome]] = {
    "chat": _reader(_Choices),
    "completions": _reader(_Choices),
    "responses": _reader(_Response),
    "messages": _reader(_Message),
    "count_tokens": _reader(_Count),
}


def answer_outcome(route: Route, body: bytes) -> Outcome:
    """What an answer tells; no usage where it has none, or is not such an answer."""
    return _READERS[route](body)
