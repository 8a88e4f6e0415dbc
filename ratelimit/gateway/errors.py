"""What a caller is told when a request is not served: status, headers and an OpenAI error body.

A refusal that the fleet causes (503) also carries the members of the IETF problem type
``temporary-reduced-capacity`` beside the ``error`` object, never instead of it, so that both kinds of client can read
it. No text depends on which keys exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

Headers = tuple[tuple[bytes, bytes], ...]

#: Where ``draft-ietf-httpapi-ratelimit-headers`` registers its problem types.
PROBLEM_TYPE_URL = "https://iana.org/assignments/http-problem-types#"
#: A client that would sleep longer than this is told not to retry by itself.
LONGEST_RETRY_US = 60_000_000


class Rejection(Exception):  # noqa: N818 - a refusal is an answer, not an error of the program
    """The answer to a request that is refused; ``headers`` do not include the content type and length."""

    def __init__(self, status: int, body: bytes, headers: Headers = (), denied_by: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = headers
        self.denied_by = denied_by


def error_object(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The value of the ``error`` member as OpenAI's clients read it."""
    return {"message": message, "type": kind, "param": param, "code": code}


def error_body(
    message: str, kind: str, code: str | None, param: str | None = None, beside: Mapping[str, Any] | None = None
) -> bytes:
    """A JSON body with an ``error`` object, and further members beside it."""
    return msgspec.json.encode({"error": error_object(message, kind, code, param), **(beside or {})})


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> Rejection:
    """400: the request can never be served as it is."""
    return Rejection(400, error_body(message, "invalid_request_error", code, param))


def context_length_exceeded(max_model_len: int, asked: str) -> Rejection:
    """400 in the wording that clients match; only for requests that exceed the context whatever the load."""
    message = (
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {asked}. "
        "Please reduce the length of the messages or completion."
    )
    return invalid_request(message, "messages", "context_length_exceeded")


def unauthorized() -> Rejection:
    """401: the same text for a missing, unknown, expired and revoked key."""
    message = "Incorrect API key provided. Send a valid key as 'Authorization: Bearer <key>'."
    body = error_body(message, "invalid_request_error", "invalid_api_key")
    return Rejection(401, body, ((b"www-authenticate", b"Bearer"),))


def model_not_found(model: str) -> Rejection:
    """404: the model does not exist, or this key may not use it; which of the two is not told."""
    message = f"The model `{model[:200]}` does not exist or you do not have access to it."
    return Rejection(404, error_body(message, "invalid_request_error", "model_not_found", "model"))


def unknown_route(method: str, path: str) -> Rejection:
    """404: nothing is served at this path."""
    message = f"Unknown request URL: {method} {path[:200]}. Please check the URL for typos."
    return Rejection(404, error_body(message, "invalid_request_error", "unknown_url"))


def wrong_method(method: str, path: str, allowed: str) -> Rejection:
    """405: the path is served, but not by this method."""
    body = error_body(
        f"Not allowed to {method} on {path[:200]} (allowed: {allowed}).", "invalid_request_error", "method_not_allowed"
    )
    return Rejection(405, body, ((b"allow", allowed.encode()),))


def body_too_slow(timeout_s: float) -> Rejection:
    """408: the request's body did not arrive in time."""
    body = error_body(f"The request body did not arrive within {timeout_s:g} s.", "invalid_request_error", "timeout")
    return Rejection(408, body, ((b"connection", b"close"),))


def body_too_large(max_bytes: int) -> Rejection:
    """413: the request's body is above the bound, by its declaration or as it arrived."""
    body = error_body(
        f"The request body is larger than the {max_bytes} bytes accepted here.",
        "invalid_request_error",
        "request_too_large",
    )
    return Rejection(413, body, ((b"connection", b"close"),))


def retry_headers(wait_us: int) -> Headers:
    """``retry-after`` and ``retry-after-ms``, rounded up, at least 1: zero would trigger a client's blind backoff."""
    seconds = max(1, -(-wait_us // 1_000_000))
    milliseconds = max(1, -(-wait_us // 1_000))
    told = ((b"retry-after", b"%d" % seconds), (b"retry-after-ms", b"%d" % milliseconds))
    return (*told, (b"x-should-retry", b"false")) if wait_us > LONGEST_RETRY_US else told


def over_limit(limit: str, told: str, wait_us: int, estimated: bool, headers: Headers = ()) -> Rejection:
    """429: the caller's own ``limit`` is used up for ``wait_us`` more microseconds.

    ``told`` states the limit in words. A wait that cannot be known exactly is marked as an estimate, both in the body
    and by a header.
    """
    kind = "requests" if limit in {"requests", "concurrency"} else "tokens"
    wait_ms = max(1, -(-wait_us // 1_000))
    about = "about " if estimated else ""
    message = f"Rate limit reached: {told}. Please try again in {about}{wait_ms} ms."
    beside = {"limit": limit, "retry_after_ms": wait_ms, "retry_after_estimated": estimated}
    marks: Headers = ((b"x-retry-after-estimated", b"true"),) if estimated else ()
    body = error_body(message, kind, "rate_limit_exceeded", beside=beside)
    return Rejection(429, body, (*retry_headers(wait_us), *marks, *headers), denied_by=limit)


def reduced_capacity(detail: str, wait_us: int, denied_by: str, headers: Headers = ()) -> Rejection:
    """503: the fleet is short, not the caller. ``denied_by`` names what bound, for the metrics."""
    beside = {
        "type": PROBLEM_TYPE_URL + "temporary-reduced-capacity",
        "title": "Temporary reduced capacity",
        "status": 503,
        "detail": detail,
        "violated-policies": [denied_by],
    }
    body = error_body(detail, "server_error", "temporary_reduced_capacity", beside=beside)
    return Rejection(503, body, (*retry_headers(wait_us), *headers), denied_by=denied_by)


def timed_out(timeout_s: float) -> Rejection:
    """504: no answer within the request timeout."""
    return Rejection(504, error_body(f"The model gave no answer within {timeout_s:g} s.", "server_error", "timeout"))


def internal_error() -> Rejection:
    """500: a fault of the gateway's own, which is in its log."""
    return Rejection(500, error_body("The gateway failed. This is not your fault.", "server_error", "internal_error"))


def stream_error(message: str) -> bytes:
    """The event that ends a broken stream, in the form that OpenAI's clients raise on."""
    return b"data: " + error_body(message, "server_error", "stream_interrupted") + b"\n\n"
