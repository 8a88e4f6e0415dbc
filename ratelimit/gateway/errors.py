"""What a caller is told when a request is not served. A ``Rejection`` holds the meaning; ``dialects`` gives it the form
that the caller's route speaks.

No text depends on which keys exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]

#: Where ``draft-ietf-httpapi-ratelimit-headers`` registers its problem types.
PROBLEM_TYPE_URL = "https://iana.org/assignments/http-problem-types#"
#: A client that would sleep longer than this is told not to retry by itself.
LONGEST_RETRY_US = 60_000_000
_CROWDED_RETRY_US = 1_000_000
#: For an answer that the official clients would ask for again, and would only get again.
FINAL: Headers = ((b"x-should-retry", b"false"),)


class Rejection(Exception):  # noqa: N818 - a refusal is an answer, not an error of the program
    """The answer to a request that is refused.

    ``status``, ``kind``, ``code`` and ``param`` are OpenAI's words for it; ``beside`` are further members of the body.
    ``headers`` do not include the content type and length. ``denied_by`` names what bound, for the metrics.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Headers = (),
        beside: Mapping[str, Any] | None = None,
        denied_by: str = "",
        anthropic_message: str = "",
    ) -> None:
        super().__init__(status)
        self.status = status
        self.kind = kind
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers
        self.beside: Mapping[str, Any] = beside or {}
        self.denied_by = denied_by
        self.anthropic_message = anthropic_message
        """Anthropic's own words, where its clients match them; empty where they are ``message``."""


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> Rejection:
    """400: the request can never be served as it is."""
    return Rejection(400, "invalid_request_error", message, code, param)


def context_length_exceeded(max_model_len: int, asked: str) -> Rejection:
    """400 in the wording that clients match; only for requests that exceed the context whatever the load."""
    message = (
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {asked}. "
        "Please reduce the length of the messages or completion."
    )
    return context_refusal(message, f"{asked} > {max_model_len} maximum")


def output_too_large(member: str, asked: int, max_model_len: int, model: str) -> Rejection:
    """400: the maximum asked for is above the context by itself, whatever the prompt."""
    refused = context_length_exceeded(max_model_len, f"{asked} tokens in the completion")
    refused.param = member
    most = f"which is the maximum allowed number of output tokens for {model[:200]}"
    refused.anthropic_message = f"{member}: {asked} > {max_model_len}, {most}"
    return refused


def context_refusal(message: str, context: str) -> Rejection:
    """The same in the engine's own words; ``context`` says by how much, as ``X tokens > Y maximum``.

    The code stands in the text too: LangChain looks for it only there.
    """
    code, told = "context_length_exceeded", f"prompt is too long: {context}"
    return Rejection(400, "invalid_request_error", f"{message} ({code})", code, "messages", anthropic_message=told)


def unauthorized() -> Rejection:
    """401: the same text for a missing, unknown, expired and revoked key."""
    message = "Incorrect API key provided. Send a valid key as 'Authorization: Bearer <key>' or as 'x-api-key: <key>'."
    headers = ((b"www-authenticate", b"Bearer"),)
    return Rejection(401, "invalid_request_error", message, "invalid_api_key", headers=headers)


def model_not_found(model: str) -> Rejection:
    """404: the model does not exist, or this key may not use it; which of the two is not told."""
    message = f"The model `{model[:200]}` does not exist or you do not have access to it."
    return Rejection(404, "invalid_request_error", message, "model_not_found", "model")


def unknown_route(method: str, path: str) -> Rejection:
    """404: nothing is served at this path."""
    message = f"Unknown request URL: {method} {path[:200]}. Please check the URL for typos."
    return Rejection(404, "invalid_request_error", message, "unknown_url")


def wrong_method(method: str, path: str, allowed: str) -> Rejection:
    """405: the path is served, but not by this method."""
    message = f"Not allowed to {method} on {path[:200]} (allowed: {allowed})."
    headers = ((b"allow", allowed.encode()),)
    return Rejection(405, "invalid_request_error", message, "method_not_allowed", headers=headers)


def body_too_slow(timeout_s: float) -> Rejection:
    """408: the request's body did not arrive in time. Final: the same body would only be late again."""
    message = f"The request body did not arrive within {timeout_s:g} s."
    headers = ((b"connection", b"close"), *FINAL)
    return Rejection(408, "invalid_request_error", message, "timeout", headers=headers)


def body_too_large(max_bytes: int) -> Rejection:
    """413: the request's body is above the bound, by its declaration or as it arrived."""
    message = f"The request body is larger than the {max_bytes} bytes accepted here."
    headers = ((b"connection", b"close"),)
    return Rejection(413, "invalid_request_error", message, "request_too_large", headers=headers)


def retry_headers(wait_us: int) -> Headers:
    """``retry-after`` and ``retry-after-ms``, rounded up, at least 1: zero would trigger a client's blind backoff."""
    seconds = max(1, -(-wait_us // 1_000_000))
    milliseconds = max(1, -(-wait_us // 1_000))
    told = ((b"retry-after", b"%d" % seconds), (b"retry-after-ms", b"%d" % milliseconds))
    return (*told, *FINAL) if wait_us > LONGEST_RETRY_US else told


def over_limit(limit: str, told: str, wait_us: int, estimated: bool, headers: Headers = ()) -> Rejection:
    """429: the caller's own ``limit`` is used up for ``wait_us`` more microseconds.

    ``told`` states the limit in words. A wait that cannot be known exactly is marked as an estimate, both in the body
    and by a header.
    """
    kind = "requests" if limit.rpartition("-")[2] in {"requests", "concurrency"} else "tokens"
    wait_ms = max(1, -(-wait_us // 1_000))
    about = "about " if estimated else ""
    message = f"Rate limit reached: {told}. Please try again in {about}{wait_ms} ms."
    beside = {"limit": limit, "retry_after_ms": wait_ms, "retry_after_estimated": estimated}
    marks: Headers = ((b"x-retry-after-estimated", b"true"),) if estimated else ()
    headers = (*retry_headers(wait_us), *marks, *headers)
    return Rejection(429, kind, message, "rate_limit_exceeded", headers=headers, beside=beside, denied_by=limit)


def with_reset_at(rejection: Rejection, reset_at: str) -> Rejection:
    """The same refusal by a window, which also says when that is over (RFC 3339)."""
    rejection.beside = {**rejection.beside, "reset_at": reset_at}
    rejection.message += f" The window resets at {reset_at}."
    return rejection


def reduced_capacity(detail: str, wait_us: int, denied_by: str, headers: Headers = ()) -> Rejection:
    """503: the fleet is short, not the caller. ``denied_by`` names what bound, for the metrics.

    The members of the IETF problem type ``temporary-reduced-capacity`` stand beside the ``error`` object, never instead
    of it, so that both kinds of client can read the body.
    """
    beside = {
        "type": PROBLEM_TYPE_URL + "temporary-reduced-capacity",
        "title": "Temporary reduced capacity",
        "status": 503,
        "detail": detail,
        "violated-policies": [denied_by],
    }
    headers = (*retry_headers(wait_us), *headers)
    code = "temporary_reduced_capacity"
    return Rejection(503, "server_error", detail, code, headers=headers, beside=beside, denied_by=denied_by)


def too_many_connections() -> Rejection:
    """503: this process holds as many connections as it will, and closes this one."""
    told = "Too many connections are open. Close those you do not use, or try again."
    return reduced_capacity(told, _CROWDED_RETRY_US, "connections", ((b"connection", b"close"),))


def too_many_bodies() -> Rejection:
    """503: the request bodies that this process holds leave no room for this one."""
    told = "The gateway holds as many request bodies as it can at the moment. Please try again."
    return reduced_capacity(told, _CROWDED_RETRY_US, "bodies")


def going_away() -> Rejection:
    """503: this gateway ends, and the time that open requests had is over. Another one takes the request."""
    told = "This gateway is being restarted, and the request was not done in time. Please try again."
    return reduced_capacity(told, _CROWDED_RETRY_US, "drain", ((b"connection", b"close"),))


def answer_too_large(max_bytes: int) -> Rejection:
    """502: a replica's answer was above what is kept of one. Final: it was paid for, and another would be as large."""
    message = f"The model's answer is larger than the {max_bytes} bytes passed on here. Stream it, or ask for less."
    return Rejection(502, "server_error", message, "answer_too_large", headers=FINAL)


def timed_out(timeout_s: float) -> Rejection:
    """504: no answer within the request timeout. Final: it was paid for, and would take as long again."""
    message = f"The model gave no answer within {timeout_s:g} s."
    return Rejection(504, "server_error", message, "timeout", headers=FINAL)


def internal_error() -> Rejection:
    """500: a fault of the gateway's own, which is in its log."""
    return Rejection(500, "server_error", "The gateway failed. This is not your fault.", "internal_error")
