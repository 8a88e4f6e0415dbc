"""What requests of several choices hold, and what they owe."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from ratelimit.gateway.accounting import Account, Ledger
from ratelimit.gateway.charges import POOL_BUCKET
from ratelimit.gateway.hold import Usage, estimate, pool_cost_us
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import terms_by_tier
from ratelimit.gateway.wire import parse_request
from ratelimit.meter import Admitted, Charge, Reading
from tests.support.gateway import MODEL, make_key, publication

TERMS = terms_by_tier(publication(["http://127.0.0.1:1"]))["pro", MODEL]


class SettlingStore:
    """A store that admits, and remembers what was settled."""

    def __init__(self) -> None:
        self.settled: dict[str, int] = {}

    async def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted:
        return Admitted((), ())

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        return True

    async def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        self.settled = {charge.bucket: charge.cost for charge in usage}
        return True

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        return ()


def account_of(store: SettlingStore, ledger: Ledger, **members: object) -> Account:
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
    account = account_of(SettlingStore(), Ledger(GatewayMetrics(), 600), **members)
    assert account.held.output_tokens == output


async def test_best_of_holds_the_pool_as_n_does() -> None:
    """Choices that may be generated are several short answers to the pool, never one that is as long as all."""
    ledger = Ledger(GatewayMetrics(), 600)
    best_of, n = (account_of(SettlingStore(), ledger, **{name: 100}) for name in ("best_of", "n"))
    assert best_of.cost_us == n.cost_us


async def test_what_came_back_is_what_the_pool_is_charged_for() -> None:
    """An engine that ignores ``best_of`` generated one answer, and one is what it costs."""
    store, ledger = SettlingStore(), Ledger(GatewayMetrics(), 600)
    account = account_of(store, ledger, best_of=100)
    await account.admit()
    used = Usage(prompt_tokens=2, output_tokens=64)
    account.settle_used(used)
    await ledger.drain(timeout_s=30)
    assert store.settled[POOL_BUCKET] == pool_cost_us(TERMS.groups, used, choices=1, prompts=1)
