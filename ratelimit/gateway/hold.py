"""How much a request holds of each bucket at admission, and what it owes in the end. Pure.

Output is held at its maximum (what the request sets, or what the context leaves), or, where that is less and the policy
wants it so, at what this caller's answers usually need; each times the choices that may be generated. The prompt is
held at its bytes times the tokens that one usually is, corrected as soon as the engine reports its true length. The
pool is charged in replica-microseconds of cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import msgspec

from ratelimit.gateway.errors import context_length_exceeded, output_too_large
from ratelimit.gateway.estimates import Expected
from ratelimit.gateway.wire import ParsedRequest
from ratelimit.publication import PublishedPool
from serving.capacity import ReplicaGroup, RequestShape, fleet_cost_s
from serving.routing import Load

#: Bounds a reservation's tokens to what a meter counts exactly.
MOST_TOKENS = 10**8
#: A prompt whose tokens are to be counted may have this many bytes for each token of the context: about four times
#: what plain text has.
MOST_COUNTED_BYTES_PER_TOKEN = 16
#: Bounds a reservation's cost to what a meter counts exactly: some 28 hours of one replica.
MOST_COST_US = 10**11
#: The most tokens a second that one answer is taken to come at, where nothing tells how much was generated.
FASTEST_TOKENS_PER_S = 200


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request over all its prompts and choices; ``cached_tokens`` were in the prefix cache."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0

    @property
    def input_tokens(self) -> int:
        """What counts against a caller's input limit."""
        return max(0, self.prompt_tokens - self.cached_tokens)


def estimate(request: ParsedRequest, pool: PublishedPool, expected: Expected | None = None) -> Usage:
    """The usage to hold for a request: as ``expected``, or at most what it may take where nothing is.

    Raises ``Rejection`` (400) where the request exceeds the context for certain.
    """
    check_context(request, pool.max_model_len)
    if request.route == "count_tokens":
        return Usage(0, 0)
    tokens_per_byte = pool.tokens_per_byte if expected is None else expected.tokens_per_byte
    prompt = request.prompt_tokens
    if prompt is None:
        prompt = ceil(request.prompt_bytes * tokens_per_byte) + request.template_tokens
    prompt = max(1, min(prompt, pool.max_model_len * request.prompts, MOST_TOKENS))
    room = max(1, pool.max_model_len - prompt // request.prompts)
    output = room if request.max_output is None else min(request.max_output, pool.max_model_len)
    if expected is not None:
        output = min(output, expected.output_tokens)
    return Usage(prompt, max(1, min(output * request.generated_choices, MOST_TOKENS)))


def check_context(request: ParsedRequest, max_model_len: int) -> None:
    """Refuse what no load could make fit: too large an output alone, or with a prompt whose length is exact.

    So is a prompt to be counted that no context could hold: counting it would keep an engine's server from others.
    """
    output = request.max_output or 0
    if output > max_model_len:
        raise output_too_large(request.max_output_member or "max_tokens", output, max_model_len, request.model)
    most_bytes = max_model_len * MOST_COUNTED_BYTES_PER_TOKEN
    if request.route == "count_tokens" and request.prompt_bytes > most_bytes:
        raise context_length_exceeded(max_model_len, f"{request.prompt_bytes} bytes (at most {most_bytes} are counted)")
    if request.prompt_truncated:
        return
    if request.prompt_tokens is not None and request.prompts == 1 and request.prompt_tokens + output > max_model_len:
        total = request.prompt_tokens + output
        asked = f"{total} tokens ({request.prompt_tokens} in the prompt, {output} in the completion)"
        raise context_length_exceeded(max_model_len, asked)


def most_output(request: ParsedRequest, pool: PublishedPool, prompt_tokens: int) -> int:
    """The output of all choices together that a request may have: its maximum, or the room that its prompt leaves."""
    room = max(1, pool.max_model_len - prompt_tokens // request.prompts)
    output = room if request.max_output is None else min(request.max_output, room)
    return min(output * request.generated_choices, MOST_TOKENS)


def generated_at_most(elapsed_s: float, choices: int, most_tokens: int) -> int:
    """The output that ``choices`` answers together may have after so long, of ``most_tokens`` that they may ever."""
    return min(ceil(max(0.0, elapsed_s) * FASTEST_TOKENS_PER_S) * choices, most_tokens)


def is_possible(usage: Usage, request: ParsedRequest, pool: PublishedPool) -> bool:
    """Whether a request can have used so much: no prompt and no answer is longer than the context."""
    prompt_fits = 0 <= usage.cached_tokens <= usage.prompt_tokens <= pool.max_model_len * request.prompts
    return prompt_fits and 0 <= usage.output_tokens <= pool.max_model_len * request.generated_choices


def pool_cost_us(groups: Sequence[ReplicaGroup], usage: Usage, choices: int, prompts: int) -> int:
    """Replica-microseconds of a request: each prompt is computed once, its further choices find it in the cache.

    A request without tokens, such as one that only has them counted, costs nothing.
    """
    if not usage.prompt_tokens and not usage.output_tokens:
        return 0
    prompt, output = ceil(usage.prompt_tokens / prompts), ceil(usage.output_tokens / choices)
    first = fleet_cost_s(groups, RequestShape(prompt, output, min(prompt, usage.cached_tokens // prompts)))
    cost_s = prompts * first
    if choices > prompts:
        cost_s += (choices - prompts) * fleet_cost_s(groups, RequestShape(prompt, output, prompt))
    return min(max(1, ceil(cost_s * 1e6)), MOST_COST_US)


def expected_load(request: ParsedRequest, held: Usage, answer_tokens: int, cost_us: int) -> Load:
    """What a replica is expected to have of a request that holds so much, where an answer has ``answer_tokens``."""
    choices = request.generated_choices
    prompt, output = ceil(held.prompt_tokens / request.prompts), ceil(held.output_tokens / choices)
    return Load(RequestShape(prompt, min(output, answer_tokens)), choices, cost_us)
