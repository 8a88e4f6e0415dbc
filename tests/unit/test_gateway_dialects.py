"""Refusals in the forms that OpenAI's and Anthropic's clients read, and the keys that requests present."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ratelimit.gateway import errors
from ratelimit.gateway.asgi import credential
from ratelimit.gateway.dialects import (
    Dialect,
    chat_stream_error,
    context_refused,
    dialect_of,
    engine_refusal,
    messages_stream_error,
    rendered,
    responses_stream_error,
)
from ratelimit.gateway.errors import Rejection

CONTEXT = (
    "This model's maximum context length is 4096 tokens. However, your prompt contains at least 4097 input tokens, "
    "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
)


def told(rejection: Rejection, dialect: Dialect) -> tuple[int, Any, dict[bytes, bytes]]:
    """Status, body and headers of a refusal."""
    answer = rendered(rejection, dialect, b"id-1")
    return answer.status, json.loads(answer.body), dict(answer.headers)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/messages/batches", "anthropic"),
        ("/v1/messagesx", "openai"),
        ("/v1/chat/completions", "openai"),
        ("/v1/models", "openai"),
    ],
)
def test_the_path_says_who_reads(path: str, dialect: Dialect) -> None:
    """Everything below Anthropic's route is read by Anthropic's clients, also what is not served."""
    assert dialect_of(path) == dialect


@pytest.mark.parametrize(
    ("rejection", "status", "kind"),
    [
        (errors.invalid_request("no"), 400, "invalid_request_error"),
        (errors.unauthorized(), 401, "authentication_error"),
        (errors.model_not_found("m"), 404, "not_found_error"),
        (errors.wrong_method("GET", "/v1/messages", "POST"), 405, "invalid_request_error"),
        (errors.body_too_slow(1), 408, "timeout_error"),
        (errors.body_too_large(1), 413, "request_too_large"),
        (errors.over_limit("requests", "at most 1", 1_000, estimated=False), 429, "rate_limit_error"),
        (errors.internal_error(), 500, "api_error"),
        (errors.answer_too_large(1), 502, "api_error"),
        (errors.reduced_capacity("short", 2_000_000, "pool"), 529, "overloaded_error"),
        (errors.timed_out(1), 504, "timeout_error"),
    ],
)
def test_refusals_as_anthropics_clients_read_them(rejection: Rejection, status: int, kind: str) -> None:
    """Type, message and request id stand where Anthropic's clients look, with the same meaning and wait."""
    answered, body, headers = told(rejection, "anthropic")
    assert answered == status
    assert body["type"] == "error"
    assert body["error"] == {"type": kind, "message": rejection.message}
    assert body["request_id"] == "id-1"
    assert headers[b"request-id"] == headers[b"x-request-id"] == b"id-1"
    openai_status, openai_body, openai_headers = told(rejection, "openai")
    assert openai_status == rejection.status
    assert openai_body["error"]["message"] == rejection.message
    assert b"request-id" not in openai_headers
    for name in (b"retry-after", b"retry-after-ms", b"x-should-retry"):
        assert headers.get(name) == openai_headers.get(name)


def test_the_fleets_shortage_in_both_forms() -> None:
    """OpenAI's clients find the problem's members beside the error; Anthropic's find an overload and its wait."""
    rejection = errors.reduced_capacity("short", 2_500_000, "pool")
    status, body, headers = told(rejection, "openai")
    assert (status, body["status"], body["error"]["code"]) == (503, 503, "temporary_reduced_capacity")
    assert body["violated-policies"] == ["pool"]
    status, body, headers = told(rejection, "anthropic")
    assert set(body) == {"type", "error", "request_id"}
    assert (status, headers[b"retry-after"], headers[b"retry-after-ms"]) == (529, b"3", b"2500")


def test_a_windows_reset_is_told_beside_the_wait() -> None:
    """A refusal by a long window says when that is over, in both forms, and is not to be retried by itself."""
    rejection = errors.over_limit("output_tokens", "at most 9", 86_400_000_000, estimated=False)
    rejection = errors.with_reset_at(rejection, "2026-01-02T00:00:00Z")
    for dialect in ("openai", "anthropic"):
        status, body, headers = told(rejection, dialect)
        assert (status, body["reset_at"]) == (429, "2026-01-02T00:00:00Z")
        assert body["retry_after_ms"] == 86_400_000
        assert "2026-01-02T00:00:00Z" in body["error"]["message"]
        assert headers[b"x-should-retry"] == b"false"


@pytest.mark.parametrize("rejection", [errors.body_too_slow(1), errors.answer_too_large(1), errors.timed_out(1)])
def test_final_answers_that_clients_would_repeat_say_so(rejection: Rejection) -> None:
    """What would only come out the same again is marked as not to be retried."""
    assert dict(rejection.headers)[b"x-should-retry"] == b"false"


def test_a_maximum_above_the_context_in_both_wordings() -> None:
    """OpenAI's clients look for the code, Anthropic's for the words."""
    rejection = errors.context_length_exceeded(4096, "5000 tokens in the completion")
    _, body, _ = told(rejection, "openai")
    assert body["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 4096 tokens" in body["error"]["message"]
    _, body, _ = told(rejection, "anthropic")
    assert body["error"]["message"] == "prompt is too long: 5000 tokens in the completion > 4096 maximum"


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": CONTEXT, "type": "BadRequestError", "param": "input_tokens", "code": 400}},
        {"type": "error", "error": {"type": "BadRequestError", "message": CONTEXT}},
    ],
)
def test_an_engines_word_for_the_context_becomes_the_clients(body: dict[str, Any]) -> None:
    """A prompt that only the engine could measure is refused in the wording that clients match."""
    written = json.dumps(body).encode()
    answer = engine_refusal(400, written, "openai", b"id-1")
    error = json.loads(answer.body)["error"]
    assert (error["code"], error["message"]) == ("context_length_exceeded", CONTEXT + " (context_length_exceeded)")
    answer = engine_refusal(400, written, "anthropic", b"id-1")
    error = json.loads(answer.body)["error"]
    assert error == {"type": "invalid_request_error", "message": "prompt is too long: 4097 tokens > 4096 maximum"}


def test_an_engines_refusal_by_characters_is_one_of_the_context() -> None:
    """A text so long that the engine does not count its tokens is too long all the same."""
    message = (
        "This model's maximum context length is 4096 tokens. However, your prompt contains 90000 characters (more than "
        "8192 characters, which is the upper bound for 4096 input tokens). Please reduce the length."
    )
    refused = context_refused(message)
    assert refused is not None
    assert refused.anthropic_message == "prompt is too long: 90000 characters > 4096 maximum"


def test_an_output_above_the_context_is_told_as_such() -> None:
    """Anthropic's clients are not told of their prompt, and OpenAI's of the member that they set."""
    rejection = errors.output_too_large("max_tokens", 8192, 4096, "m")
    _, body, _ = told(rejection, "openai")
    assert (body["error"]["code"], body["error"]["param"]) == ("context_length_exceeded", "max_tokens")
    _, body, _ = told(rejection, "anthropic")
    most = "max_tokens: 8192 > 4096, which is the maximum allowed number of output tokens for m"
    assert body["error"]["message"] == most


@pytest.mark.parametrize("body", [b'{"error":{"message":"no"}}', b"<html>", b"[]", b"\xff", b'{"error":"no"}'])
def test_other_refusals_of_an_engine(body: bytes) -> None:
    """On OpenAI's routes they pass byte for byte; on Anthropic's they get the form that its clients read."""
    assert engine_refusal(404, body, "openai", b"id-1").body == body
    answer = json.loads(engine_refusal(404, body, "anthropic", b"id-1").body)
    assert answer["error"]["type"] == "not_found_error"
    assert answer["error"]["message"] == ("no" if b'no"}}' in body else "The model refused the request (404).")


@pytest.mark.parametrize(("status", "final"), [(400, False), (409, True), (500, False), (501, True)])
def test_an_engines_final_refusals_are_not_repeated(status: int, final: bool) -> None:
    """What the clients would ask for again in vain is marked."""
    headers = dict(engine_refusal(status, b"{}", "openai", b"id-1").headers)
    assert (headers.get(b"x-should-retry") == b"false") == final


def test_broken_streams_in_the_form_of_each_route() -> None:
    """Each client finds an error where it looks for one."""
    assert json.loads(chat_stream_error("broke")[6:])["error"]["message"] == "broke"
    for written in (responses_stream_error("broke"), messages_stream_error("broke", b"id-1")):
        name, data = written.rstrip().split(b"\n")
        assert name == b"event: error"
        event = json.loads(data[6:])
        assert (event["type"], event["error"]["message"]) == ("error", "broke")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], None),
        ([(b"authorization", b"Bearer k1")], "k1"),
        ([(b"authorization", b"bearer  k1 ")], "k1"),
        ([(b"x-api-key", b" k1 ")], "k1"),
        ([(b"authorization", b"Bearer k1"), (b"x-api-key", b"k1")], "k1"),
        ([(b"authorization", b"Bearer k1"), (b"x-api-key", b"k2")], None),
        ([(b"x-api-key", b"k1"), (b"x-api-key", b"k2")], None),
        ([(b"authorization", b"Bearer k1"), (b"authorization", b"Bearer k2")], None),
        ([(b"authorization", b"Bearer k1"), (b"authorization", b"Bearer k1")], "k1"),
        ([(b"authorization", b"Basic k1")], None),
        ([(b"authorization", b"Basic k1"), (b"x-api-key", b"k1")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"x-api-key", b"")], None),
        ([(b"authorization", b"Bearer \xe9")], "\xe9"),
    ],
)
def test_a_request_presents_one_key(headers: list[tuple[bytes, bytes]], key: str | None) -> None:
    """Either header will do, and both with one key; two keys are none."""
    assert credential({"headers": headers}) == key
