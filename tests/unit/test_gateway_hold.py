"""What requests hold, those of several choices too, and what they owe."""

from __future__ import annotations

import msgspec
import pytest

from ratelimit.gateway.accounting import Account, Ledger
from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.estimates import Expected
from ratelimit.gateway.formats.media import IMAGE_TOKENS
from ratelimit.gateway.hold import (
    FASTEST_TOKENS_PER_S,
    MOST_COUNTED_BYTES_PER_TOKEN,
    Usage,
    estimate,
    expected_load,
    generated_at_most,
    is_possible,
    most_output,
    pool_cost_us,
)
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import terms_by_tier
from ratelimit.gateway.wire import parse_request
from serving.capacity import RequestShape
from serving.routing import Load
from tests.support.gateway import MAX_MODEL_LEN, MODEL, make_key, publication
from tests.support.limiter import AwayLimiter

TERMS = terms_by_tier(publication(["http://127.0.0.1:1"]))["pro", MODEL]


def account_of(store: AwayLimiter, ledger: Ledger, **members: object) -> Account:
    """The account of a completions request."""
    _, record = make_key()
    body = {"model": MODEL, "prompt": "water", "max_tokens": 64, **members}
    request = parse_request("completions", msgspec.json.encode(body))
    return Account(ledger, store, "request", record, TERMS, request, estimate(request, TERMS.pool))


@pytest.mark.parametrize(
    ("members", "output"),
    [
        ({}, 64),
        ({"n": 3}, 192),
        ({"best_of": 3}, 192),
        ({"n": 2, "best_of": 3, "prompt": ["a", "b"]}, 384),
    ],
)
async def test_output_is_held_for_every_choice_that_may_be_generated(members: dict[str, object], output: int) -> None:
    """``best_of`` is held for like ``n``, for each prompt."""
    account = account_of(AwayLimiter(), Ledger(GatewayMetrics(), 600), **members)
    assert account.held.output_tokens == output


async def test_best_of_holds_the_pool_as_n_does() -> None:
    """Choices that may be generated are several short answers to the pool, never one that is as long as all."""
    ledger = Ledger(GatewayMetrics(), 600)
    best_of, n = (account_of(AwayLimiter(), ledger, **{name: 100}) for name in ("best_of", "n"))
    assert best_of.cost_us == n.cost_us


async def test_what_came_back_is_what_the_pool_is_charged_for() -> None:
    """An engine that ignores ``best_of`` generated one answer, and one is what it costs."""
    store, ledger = AwayLimiter(), Ledger(GatewayMetrics(), 600)
    account = account_of(store, ledger, best_of=100)
    await account.admit()
    used = Usage(prompt_tokens=2, output_tokens=64)
    account.settle_used(used, ended=True)
    await ledger.drain(timeout_s=30)
    assert store.settled[0]["work"] == pool_cost_us(TERMS.groups, used, choices=1, prompts=1)


@pytest.mark.parametrize(("usual", "output"), [(10, 10), (100, 64)])
def test_routing_expects_what_answers_usually_are_and_no_more_than_is_held(usual: int, output: int) -> None:
    """One sequence for each answer that may be generated, each of its prompt and of the usual length."""
    members = {"model": MODEL, "prompt": ["water", "water"], "max_tokens": 64, "n": 2}
    request = parse_request("completions", msgspec.json.encode(members))
    load = expected_load(request, Usage(4, 256), usual, 7)
    assert load == Load(RequestShape(2, output), 4, 7)


def body(**members: object) -> bytes:
    """A chat body whose prompt is held at 14 tokens."""
    return msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "x" * 40}], **members})


@pytest.mark.parametrize(
    ("members", "usual", "held"),
    [
        ({}, 64, 64),
        ({"max_tokens": 16}, 64, 16),
        ({"max_tokens": 4_000}, 64, 64),
        ({"max_tokens": 4_000}, 10_000, 4_000),
        ({"n": 3}, 64, 192),
        ({}, 10_000, MAX_MODEL_LEN - 14),
    ],
)
def test_learned_holds_are_what_is_usual_or_the_maximum_if_that_is_less(
    members: dict[str, int], usual: int, held: int
) -> None:
    """A large maximum does not lock a caller out, and a small one is believed; neither exceeds the context."""
    request = parse_request("chat", body(**members))
    assert estimate(request, TERMS.pool, Expected(0.25, usual)).output_tokens == held


@pytest.mark.parametrize(("members", "held"), [({}, MAX_MODEL_LEN - 14), ({"max_tokens": 4_000}, 4_000)])
def test_holds_at_the_maximum_can_never_be_exceeded(members: dict[str, int], held: int) -> None:
    """Where the policy wants it so, the most that the engine may generate is held."""
    assert estimate(parse_request("chat", body(**members)), TERMS.pool).output_tokens == held


def test_the_ledger_holds_as_the_policy_says() -> None:
    """A tier with holds at the maximum is not held by what was learned; a learned tier begins at the pool's prior."""
    ledger, (_, record) = Ledger(GatewayMetrics(), 15), make_key()
    request = parse_request("chat", body(max_tokens=1_000))
    learned, maximum = (msgspec.structs.replace(TERMS, holds=holds) for holds in ("learned", "maximum"))
    assert ledger.held(record, learned, request).output_tokens == TERMS.pool.default_max_output
    assert ledger.held(record, maximum, request).output_tokens == 1_000


@pytest.mark.parametrize(("elapsed_s", "choices", "most"), [(0, 1, 0), (-1, 1, 0), (1.5, 2, 600), (1e9, 2, 5_000)])
def test_output_is_bounded_by_time_and_by_what_was_asked_for(elapsed_s: float, choices: int, most: int) -> None:
    """Where nothing tells how much was generated: what the fastest answers may have, and never above the bound."""
    assert FASTEST_TOKENS_PER_S == 200
    assert generated_at_most(elapsed_s, choices, 5_000) == most


@pytest.mark.parametrize(
    ("members", "most"), [({}, MAX_MODEL_LEN - 14), ({"max_tokens": 9, "n": 3}, 27), ({"max_tokens": MAX_MODEL_LEN}, 0)]
)
def test_the_most_output_is_the_maximum_or_what_the_context_leaves(members: dict[str, int], most: int) -> None:
    """A maximum beyond the context gives no more than the context's room."""
    request = parse_request("chat", body(**members))
    assert most_output(request, TERMS.pool, 14) == (most or MAX_MODEL_LEN - 14)


@pytest.mark.parametrize(
    ("usage", "possible"),
    [
        (Usage(0, 0), True),
        (Usage(MAX_MODEL_LEN, 2 * MAX_MODEL_LEN, MAX_MODEL_LEN), True),
        (Usage(MAX_MODEL_LEN + 1, 0), False),
        (Usage(10**12, 0), False),
        (Usage(-1, 0), False),
        (Usage(5, -7), False),
        (Usage(5, 2 * MAX_MODEL_LEN + 1), False),
        (Usage(5, 1, 6), False),
        (Usage(5, 1, -1), False),
    ],
)
def test_usage_that_no_request_can_have_is_told_apart(usage: Usage, possible: bool) -> None:
    """A request of one prompt and two choices."""
    assert is_possible(usage, parse_request("chat", body(n=2)), TERMS.pool) is possible


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_output_above_the_context_is_refused_by_its_own_name(name: str) -> None:
    """The refusal names the member that the client set."""
    with pytest.raises(Rejection) as caught:
        estimate(parse_request("chat", body(**{name: MAX_MODEL_LEN + 1})), TERMS.pool)
    assert caught.value.param == name


@pytest.mark.parametrize("most", [-1, MAX_MODEL_LEN - 10, 10])
def test_a_prompt_that_the_engine_cuts_is_not_refused(most: int) -> None:
    """Whether what is left fits is the engine's to say; no more is held than the context."""
    sent = {"model": MODEL, "prompt": [1] * 2 * MAX_MODEL_LEN, "max_tokens": 9, "truncate_prompt_tokens": most}
    held = estimate(parse_request("completions", msgspec.json.encode(sent)), TERMS.pool)
    assert held.prompt_tokens == (MAX_MODEL_LEN if most < 0 else most)


def test_a_prompt_to_be_counted_holds_nothing_and_has_a_bound() -> None:
    """Counting generates nothing, but what no context could hold is not worth an engine's time."""
    most = MAX_MODEL_LEN * MOST_COUNTED_BYTES_PER_TOKEN
    for size, fits in ((most, True), (most + 1, False)):
        request = parse_request("count_tokens", body(system="", messages=[{"role": "user", "content": "x" * size}]))
        if fits:
            assert estimate(request, TERMS.pool) == Usage(0, 0)
        else:
            with pytest.raises(Rejection, match="400"):
                estimate(request, TERMS.pool)


def test_an_image_holds_what_a_large_one_needs() -> None:
    """An image of a few bytes, or of many, holds the same."""
    held = [
        estimate(
            parse_request(
                "chat",
                msgspec.json.encode(
                    {
                        "model": MODEL,
                        "messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:" + "A" * size}}]}],
                    }
                ),
            ),
            TERMS.pool,
        ).prompt_tokens
        for size in (10, 100_000)
    ]
    assert held[0] == held[1] > IMAGE_TOKENS
