"""Requests as they come in and as they go on to an engine. Pure: bytes in, plain values and bytes out.

The body that goes on is the client's own, member for member, except for what the gateway owns:

- ``cache_salt`` is one per org, so that the time a prefix-cache hit saves tells nothing across tenants;
- ``priority`` is the tier's, where the engine schedules by it;
- a stream is asked for its usage on every chunk, so that the prompt's length is known with the first one, and what was
  generated is known when a client leaves. ``sse`` takes out again what the client did not ask for. (Anthropic's format
  tells the prompt first and the output last, the Responses format all of it last, and neither can be asked for more.)
- a response is never stored.

Only members that ``formats.fields`` lists pass, and none twice.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ratelimit.gateway.errors import invalid_request
from ratelimit.gateway.formats.fields import ALLOWED, OWNED, Route
from ratelimit.gateway.formats.media import IMAGE_TOKENS
from ratelimit.gateway.formats.shapes import DECODERS, MAX_PROMPTS, Body, StreamOptions
from ratelimit.gateway.formats.strict import MAX_PARTS, MAX_PARTS_WITH_TOKEN_IDS, read_members

__all__ = ["MAX_PROMPTS", "PATHS", "ROUTES", "ParsedRequest", "Route", "ShownUsage", "parse_request", "upstream_body"]

#: The paths of the routes, here and on a replica.
PATHS: dict[Route, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
}
ROUTES: dict[str, Route] = {path: route for route, path in PATHS.items()}

#: Which usage a client asked to see in its stream.
ShownUsage = Literal["none", "final", "every chunk"]

#: OpenAI's own bound on ``n``.
MAX_CHOICES = 128
#: The most answers that one request may have generated over all its prompts: it counts as one in flight, and an engine
#: runs a few hundred sequences at a time.
MAX_GENERATED_CHOICES = 1024
#: Tokens that a chat template puts around one message.
TOKENS_PER_MESSAGE = 4
#: vLLM takes a request's priority from here before its body, and on ``/v1/messages`` from nowhere else.
PRIORITY_HEADER = "X-Vllm-Priority"

#: Routes whose streams can be asked for their usage on every chunk.
_ASKED_FOR_USAGE = frozenset({"chat", "completions"})
_NAMED_ERROR_CHARACTERS = 200


class ParsedRequest(msgspec.Struct, frozen=True):
    """What the gateway needs to know of a request.

    ``max_output`` is the largest of the request's maxima for one choice, ``None`` where it sets none. ``choices`` are
    the answers that come back in all, ``prompts`` the prompts they answer. ``generated_choices`` are the most that an
    engine may generate for them: ``best_of`` counts, though vLLM 0.32 ignores it. ``prompt_tokens`` is exact where the
    client sent token ids, and else ``None``; ``prompt_truncated``: they may be more than the context holds, because the
    engine cuts them. ``prompt_bytes`` are without those of the ``images``. ``max_output_member`` is where the client
    set the maximum.
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
    route: Route = "chat"
    images: int = 0
    prompt_truncated: bool = False
    max_output_member: str | None = None

    @property
    def template_tokens(self) -> int:
        """Tokens of the prompt that its bytes do not tell: around messages, and of images."""
        return TOKENS_PER_MESSAGE * self.messages + IMAGE_TOKENS * self.images


def parse_request(route: Route, body: bytes) -> ParsedRequest:
    """Read a request's body; raises ``Rejection`` (400) saying what is wrong."""
    members = read_members(body, MAX_PARTS_WITH_TOKEN_IDS if route == "completions" else MAX_PARTS)
    _check_members(route, members)
    try:
        parsed = DECODERS[route].decode(body)
        prompt = parsed.prompt_shape()
    except msgspec.ValidationError as error:
        raise invalid_request(f"Invalid request: {error}.") from error
    parsed.check()
    _check_choices(parsed, prompt.count)
    returned = parsed.n or 1
    max_output, max_output_member = parsed.most_output()
    return ParsedRequest(
        model=parsed.model,
        stream=bool(parsed.stream),
        shown_usage=_shown_usage(parsed.stream_options),
        max_output=max_output,
        choices=returned * prompt.count,
        generated_choices=max(returned, parsed.best_of or 1) * prompt.count,
        prompts=prompt.count,
        prompt_bytes=prompt.size,
        prompt_tokens=prompt.tokens,
        messages=prompt.messages,
        members=members,
        route=route,
        images=prompt.images,
        prompt_truncated=prompt.truncated,
        max_output_member=max_output_member,
    )


def _check_members(route: Route, members: dict[str, msgspec.Raw]) -> None:
    allowed = ALLOWED[route]
    for name in members:
        if name not in allowed:
            told = name[:_NAMED_ERROR_CHARACTERS]
            raise invalid_request(f"Unrecognized request argument supplied: {told}", told)


def _check_choices(body: Body, prompts: int) -> None:
    for name, asked in (("n", body.n), ("best_of", body.best_of)):
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


def _shown_usage(options: StreamOptions | None) -> ShownUsage:
    if options is None or not options.include_usage:
        return "none"
    return "every chunk" if options.continuous_usage_stats else "final"


_STREAM_OPTIONS = msgspec.Raw(b'{"include_usage":true,"continuous_usage_stats":true}')
_FALSE = msgspec.Raw(b"false")


def upstream_body(request: ParsedRequest, cache_salt: str, priority: int | None) -> bytes:
    """The body that goes to the engine: the client's, with the gateway's own members set. Never a maximum.

    ``priority`` is vLLM's, lower first; ``None`` where the engine does not schedule by it.
    """
    members = {name: value for name, value in request.members.items() if name not in OWNED}
    if request.route == "count_tokens":
        return msgspec.json.encode(members)
    members["cache_salt"] = msgspec.Raw(msgspec.json.encode(cache_salt))
    if priority is not None and request.route != "messages":
        members["priority"] = msgspec.Raw(b"%d" % priority)
    if request.route in _ASKED_FOR_USAGE and request.stream:
        members["stream_options"] = _STREAM_OPTIONS
    if request.route == "responses":
        members["store"] = _FALSE
        members.pop("stream_options", None)
    return msgspec.json.encode(members)


def upstream_headers(route: Route, request_id: str, priority: int | None) -> dict[str, str]:
    """The headers that go to the engine; none of the client's do."""
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    if priority is not None and route == "messages":
        headers[PRIORITY_HEADER] = str(priority)
    return headers
