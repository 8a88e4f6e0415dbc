"""The forms in which callers read refusals and broken streams: OpenAI's and Anthropic's. Pure: values in, bytes out.

``/v1/messages`` and what is below it speak Anthropic's, everything else OpenAI's. What an engine refuses passes as it
wrote it, with two exceptions: on Anthropic's routes it gets their form, and a prompt above the context gets the code or
the wording that clients look for.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from ratelimit.gateway.errors import FINAL, Headers, Rejection, context_refusal

Dialect = Literal["openai", "anthropic"]

#: Anthropic's own status for a fleet that is short.
_OVERLOADED = 529
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    _OVERLOADED: "overloaded_error",
}
#: What the official clients ask for again by themselves, and an engine says for good: a conflict, a method that it does
#: not implement.
_FINAL_STATUSES = frozenset({408, 409, 501, 505})
_ENGINE_CONTEXT = re.compile(r"maximum context length is (\d+) tokens\b.*?(\d+) (input tokens|characters)", re.DOTALL)


def dialect_of(path: str) -> Dialect:
    """The form that a path's callers read."""
    return "anthropic" if path == "/v1/messages" or path.startswith("/v1/messages/") else "openai"


class Told(msgspec.Struct, frozen=True):
    """An answer as it is sent; ``headers`` do not include the content type and length."""

    status: int
    headers: Headers
    body: bytes


def id_headers(dialect: Dialect, request_id: bytes) -> Headers:
    """The request's id under the names that the dialect's clients know."""
    ours = (b"x-request-id", request_id)
    return (ours, (b"request-id", request_id)) if dialect == "anthropic" else (ours,)


def rendered(rejection: Rejection, dialect: Dialect, request_id: bytes) -> Told:
    """A refusal in the caller's form."""
    headers = (*id_headers(dialect, request_id), *rejection.headers)
    if dialect == "anthropic":
        status = _OVERLOADED if rejection.status == 503 else rejection.status
        return Told(status, headers, msgspec.json.encode(_anthropic_body(rejection, status, request_id)))
    error = {
        "message": rejection.message,
        "type": rejection.kind,
        "param": rejection.param,
        "code": rejection.code,
    }
    return Told(rejection.status, headers, msgspec.json.encode({"error": error, **rejection.beside}))


def _anthropic_body(rejection: Rejection, status: int, request_id: bytes) -> dict[str, Any]:
    message = rejection.anthropic_message or rejection.message
    # The problem members of a 503 have a `type` and a `status` of their own, which would take this form's place.
    beside = {} if rejection.status == 503 else rejection.beside
    return {**_anthropic_error(_anthropic_type(status), message, request_id), **beside}


def _anthropic_error(kind: str, message: str, request_id: bytes) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id.decode()}


def _anthropic_type(status: int) -> str:
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def chat_stream_error(message: str) -> bytes:
    """The event that ends a broken stream, in the form that OpenAI's clients raise on."""
    error = {"message": message, "type": "server_error", "param": None, "code": "stream_interrupted"}
    return b"data: " + msgspec.json.encode({"error": error}) + b"\n\n"


def responses_stream_error(message: str) -> bytes:
    """The same as an ``error`` event of the Responses format; OpenAI's clients raise on its ``error`` member."""
    told = {"type": "error", "code": "stream_interrupted", "message": message, "param": None}
    error = {"message": message, "type": "server_error", "param": None, "code": "stream_interrupted"}
    return b"event: error\ndata: " + msgspec.json.encode({**told, "error": error}) + b"\n\n"


def messages_stream_error(message: str, request_id: bytes) -> bytes:
    """The same as Anthropic's clients raise on."""
    return b"event: error\ndata: " + msgspec.json.encode(_anthropic_error("api_error", message, request_id)) + b"\n\n"


class _EngineError(msgspec.Struct):
    message: str = ""


class _EngineRefusal(msgspec.Struct):
    error: _EngineError


_refusal_decoder = msgspec.json.Decoder(_EngineRefusal)


def engine_refusal(status: int, body: bytes, dialect: Dialect, request_id: bytes) -> Told:
    """An engine's own refusal (400 and above) in the caller's form."""
    final: Headers = FINAL if status in _FINAL_STATUSES else ()
    headers = (*id_headers(dialect, request_id), *final)
    message = _engine_message(body)
    if status == 400 and (refused := context_refused(message)):
        return rendered(refused, dialect, request_id)
    if dialect == "openai":
        return Told(status, headers, body)
    kind = _anthropic_type(status)
    text = message or f"The model refused the request ({status})."
    return Told(status, headers, msgspec.json.encode(_anthropic_error(kind, text, request_id)))


def context_refused(message: str) -> Rejection | None:
    """The refusal that an engine's message means, where it is one of a prompt above the context."""
    found = _ENGINE_CONTEXT.search(message)
    if found is None:
        return None
    most, asked, unit = found.groups()
    return context_refusal(message, f"{asked} {unit.replace('input ', '')} > {most} maximum")


def _engine_message(body: bytes) -> str:
    try:
        return _refusal_decoder.decode(body).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
