"""What vLLM 0.32 answers on ``/v1/messages`` and ``/v1/responses``: event by event, member by member.

Ids and times are constant, as in ``fake_upstream``.
"""

from __future__ import annotations

import json
from typing import Any

#: Tokens of every prompt that the prefix cache had, where a request asks for it by its ``metadata``.
CACHED = 4


def compact(value: Any) -> str:
    """JSON as vLLM writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _event(told: dict[str, Any]) -> bytes:
    return f"event: {told['type']}\ndata: {compact(told)}\n\n".encode()


def token_text(token: int) -> str:
    """The text of one token; it looks like what a filter searches for."""
    return f' tok{token} é "usage":{{}} '


def messages_usage(prompt: int, output: int, cached: int = 0) -> dict[str, int]:
    """Usage as Anthropic's form has it: the cache's members are left out where nothing is known of it."""
    told = {"input_tokens": prompt - cached, "output_tokens": output}
    return {**told, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached} if cached else told


def messages_events(model: str, prompt: int, output: int, stop_reason: str, cached: int = 0) -> list[bytes]:
    """Every event of a stream of ``/v1/messages``; the prompt is told whole first, and less the cached part last."""
    message: dict[str, Any] = {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": messages_usage(prompt, 0),
    }
    deltas = [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": token_text(token)}, "index": 0}
        for token in range(1, output + 1)
    ]
    told: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0},
        *deltas,
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": None},
            "usage": messages_usage(prompt, output, cached),
        },
        {"type": "message_stop"},
    ]
    return [_event(each) for each in told]


def messages_answer(model: str, prompt: int, output: int, stop_reason: str, cached: int = 0) -> bytes:
    """The answer of ``/v1/messages`` that is not streamed."""
    told = {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "tok"}],
        "model": model,
        "stop_reason": stop_reason,
        "usage": messages_usage(prompt, output, cached),
    }
    return compact(told).encode()


def count_answer(prompt: int) -> bytes:
    """The answer of ``/v1/messages/count_tokens``."""
    return compact({"input_tokens": prompt, "context_management": {"original_input_tokens": prompt}}).encode()


def _response(body: dict[str, Any], status: str, output: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "created_at": 1,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": body["model"],
        "object": "response",
        "output": output,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": body.get("max_output_tokens") or 4096,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": status,
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": usage,
        "user": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _responses_usage(prompt: int, output: int, cached: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": cached,
            "cache_write_tokens": 0,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": output,
        "output_tokens_details": {
            "reasoning_tokens": 0,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": prompt + output,
    }


def _item(text: str, status: str) -> dict[str, Any]:
    content: list[Any] = [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}] if text else []
    return {"id": "msg_1", "content": content, "role": "assistant", "status": status, "type": "message", "phase": None}


def responses_answer(body: dict[str, Any], prompt: int, output: int, status: str, cached: int = 0) -> bytes:
    """The answer of ``/v1/responses`` that is not streamed."""
    told = _response(body, status, [_item("tok", "completed")], _responses_usage(prompt, output, cached))
    return compact(told).encode()


def responses_events(body: dict[str, Any], prompt: int, output: int, status: str, cached: int = 0) -> list[bytes]:
    """Every event of a stream of ``/v1/responses``: the last is ``response.completed`` whatever the status."""
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    text = "".join(map(token_text, range(1, output + 1)))
    part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
    begun = _response(body, "in_progress", [], None)
    done = _item(text, "completed")
    whole = _response(body, status, [done], _responses_usage(prompt, output, cached))
    told: list[tuple[str, dict[str, Any]]] = [
        ("created", {"response": begun}),
        ("in_progress", {"response": begun}),
        ("output_item.added", {"item": _item("", "in_progress"), "output_index": 0}),
        ("content_part.added", {**at, "part": part}),
        *(("output_text.delta", {**at, "delta": token_text(token), "logprobs": []}) for token in range(1, output + 1)),
        ("output_text.done", {**at, "text": text, "logprobs": []}),
        ("content_part.done", {**at, "part": {**part, "text": text, "logprobs": None}}),
        ("output_item.done", {"item": done, "output_index": 0}),
        ("completed", {"response": whole}),
    ]
    return [_event(_sorted(each, f"response.{name}", number)) for number, (name, each) in enumerate(told)]


def _sorted(told: dict[str, Any], kind: str, number: int) -> dict[str, Any]:
    """An event's members as vLLM orders them: by name."""
    return dict(sorted({**told, "sequence_number": number, "type": kind}.items()))
