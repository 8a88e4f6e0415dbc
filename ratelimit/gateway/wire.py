"""Requests as they come in and as they go on to an engine. Pure: bytes in, plain values and bytes out.

A body is parsed as far as the gateway needs and no further: the engine validates the rest. The body that goes on is the
client's own, member for member, except for what the gateway owns:

- what only an operator may say to an engine is dropped (``ENGINE_INTERNAL``);
- ``cache_salt`` is one per org, so that the time a prefix-cache hit saves tells nothing across tenants;
- a stream is asked for its usage on every chunk, so that the prompt's length is known with the first one, and what was
  generated is known when a client leaves. ``sse`` takes out again what the client did not ask for.

Members that occur twice reach the engine once, with the value that was checked here (the last one).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ratelimit.gateway.errors import invalid_request

Route = Literal["chat", "completions"]
#: Which usage a client asked to see in its stream.
ShownUsage = Literal["none", "final", "every chunk"]

#: OpenAI's own bound on ``n``.
MAX_CHOICES = 128
#: The most prompts in one completions request.
MAX_PROMPTS = 1024
#: The most answers that one request may have generated over all its prompts: it counts as one in flight, and an engine
#: runs a few hundred sequences at a time.
MAX_GENERATED_CHOICES = 1024
#: Tokens that a chat template puts around one message.
TOKENS_PER_MESSAGE = 4

#: Members of vLLM's requests that are its operator's to set, and dropped from a caller's: they set the order of
#: scheduling, share or move cached prompts and KV blocks between requests, name requests and sessions inside the
#: engine, feed its extensions, bring prompts that are not counted here, or delay the usage that a stream reports.
ENGINE_INTERNAL = frozenset(
    {
        "priority",
        "cache_salt",
        "stream_interval",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "request_id",
        "session_id",
        "prompt_embeds",
        "mm_payload",
        "return_mm_kwargs",
        "routed_experts_prompt_start",
    }
)

_JSON_NULL = b"null"


class StreamOptions(msgspec.Struct):
    """What a client may ask of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Message(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw(_JSON_NULL)
    tool_calls: msgspec.Raw = msgspec.Raw(_JSON_NULL)


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None


class _ChatBody(_Body):
    messages: list[_Message] = []
    tools: msgspec.Raw = msgspec.Raw(_JSON_NULL)


class _CompletionBody(_Body):
    prompt: msgspec.Raw = msgspec.Raw(_JSON_NULL)


class ParsedRequest(msgspec.Struct, frozen=True):
    """What the gateway needs to know of a request.

    ``max_output`` is the largest of the request's maxima for one choice, ``None`` where it sets none. ``choices`` are
    the answers that come back in all, ``prompts`` the prompts they answer. ``generated_choices`` are the most that an
    engine may generate for them: ``best_of`` counts, though vLLM 0.32 ignores it. ``prompt_tokens`` is exact where the
    client sent token ids, and else ``None``.
    """

    model: str
    stream: bool
    shown_usage: ShownUsage
    max_output: int | None
    choices: int
    generated_choices: int
    prompts: int
    prompt_bytes: int
    prompt_tokens: int | None
    messages: int
    members: dict[str, msgspec.Raw]


_chat_decoder = msgspec.json.Decoder(_ChatBody)
_completion_decoder = msgspec.json.Decoder(_CompletionBody)
_members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_any_decoder = msgspec.json.Decoder()


def parse_request(route: Route, body: bytes) -> ParsedRequest:
    """Read a request's body; raises ``Rejection`` (400) saying what is wrong."""
    try:
        parsed = _chat_decoder.decode(body) if route == "chat" else _completion_decoder.decode(body)
        members = _members_decoder.decode(body)
        prompt = _chat_prompt(parsed) if isinstance(parsed, _ChatBody) else _completion_prompt(parsed.prompt)
    except msgspec.ValidationError as error:
        raise invalid_request(f"Invalid request: {error}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_request(f"The request body is not valid JSON: {error}.") from error
    _check_choices(parsed, prompt.count)
    returned = parsed.n or 1
    return ParsedRequest(
        model=parsed.model,
        stream=bool(parsed.stream),
        shown_usage=_shown_usage(parsed.stream_options),
        max_output=_max_output(parsed),
        choices=returned * prompt.count,
        generated_choices=max(returned, parsed.best_of or 1) * prompt.count,
        prompts=prompt.count,
        prompt_bytes=prompt.size,
        prompt_tokens=prompt.tokens,
        messages=prompt.messages,
        members=members,
    )


class _Prompt(msgspec.Struct, frozen=True):
    size: int
    count: int = 1
    tokens: int | None = None
    messages: int = 0


def _chat_prompt(body: _ChatBody) -> _Prompt:
    size = sum(_text_bytes(m.content) + _text_bytes(m.tool_calls) for m in body.messages) + _text_bytes(body.tools)
    return _Prompt(size, messages=len(body.messages))


def _text_bytes(value: msgspec.Raw) -> int:
    """Bytes of a JSON value without its quotes; escapes count as written, so this is at most a little too much."""
    written = bytes(value)
    if written == _JSON_NULL:
        return 0
    return len(written) - 2 if written[:1] == b'"' else len(written)


def _completion_prompt(prompt: msgspec.Raw) -> _Prompt:
    size = _text_bytes(prompt)
    if bytes(memoryview(prompt)[:1]) != b"[":
        return _Prompt(size)
    items: list[Any] = _any_decoder.decode(prompt)
    if len(items) > MAX_PROMPTS and type(items[0]) is not int:
        raise invalid_request(f"'prompt' holds {len(items)} prompts, but at most {MAX_PROMPTS} are accepted.", "prompt")
    if items and all(type(item) is int for item in items):
        return _Prompt(size, tokens=len(items))
    if items and all(type(item) is list for item in items):
        return _Prompt(size, count=len(items), tokens=sum(map(len, items)))
    if items and all(type(item) is str for item in items):
        return _Prompt(sum(len(item.encode()) for item in items), count=len(items))
    raise invalid_request("'prompt' must be a string, or a list of strings, token ids or lists of token ids.", "prompt")


def _check_choices(body: _Body, prompts: int) -> None:
    for name in ("n", "best_of"):
        asked = getattr(body, name)
        if asked is None:
            continue
        if not 1 <= asked <= MAX_CHOICES:
            raise invalid_request(f"'{name}' is {asked}, but must be from 1 to {MAX_CHOICES}.", name)
        if asked * prompts > MAX_GENERATED_CHOICES:
            raise invalid_request(
                f"'{name}' is {asked} for each of {prompts} prompts, {asked * prompts} choices in all, but at most "
                f"{MAX_GENERATED_CHOICES} are accepted in one request. Send fewer prompts or a smaller '{name}'.",
                name,
            )


def _max_output(body: _Body) -> int | None:
    for name in ("max_tokens", "max_completion_tokens"):
        asked = getattr(body, name)
        if asked is not None and asked < 0:
            raise invalid_request(f"'{name}' is {asked}, but must not be negative.", name)
    asked_for = [asked for asked in (body.max_tokens, body.max_completion_tokens) if asked is not None]
    return max(asked_for, default=None)


def _shown_usage(options: StreamOptions | None) -> ShownUsage:
    if options is None or not options.include_usage:
        return "none"
    return "every chunk" if options.continuous_usage_stats else "final"


_STREAM_OPTIONS = msgspec.Raw(b'{"include_usage":true,"continuous_usage_stats":true}')


def upstream_body(request: ParsedRequest, cache_salt: str) -> bytes:
    """The body that goes to the engine: the client's, with the gateway's own members set. Never ``max_tokens``."""
    members = {name: value for name, value in request.members.items() if name not in ENGINE_INTERNAL}
    members["cache_salt"] = msgspec.Raw(msgspec.json.encode(cache_salt))
    if request.stream:
        members["stream_options"] = _STREAM_OPTIONS
    return msgspec.json.encode(members)
