"""Settlements while the store is away: tried again, but for a bounded time and in bounded numbers."""

from __future__ import annotations

import asyncio

import pytest

from ratelimit.gateway import accounting
from ratelimit.gateway.accounting import Account, Ledger
from ratelimit.gateway.hold import Usage, estimate
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import terms_by_tier
from ratelimit.gateway.wire import parse_request
from ratelimit.meter import TOMBSTONE_US
from ratelimit.store import StoreUnavailableError
from tests.support.gateway import MODEL, make_key, publication
from tests.support.limiter import AwayLimiter

FOR_EVER = 10**9
USED = Usage(prompt_tokens=3, output_tokens=5)


def account_of(ledger: Ledger, limiter: AwayLimiter) -> Account:
    """One request's account, not admitted yet."""
    _, record = make_key()
    terms = terms_by_tier(publication(["http://127.0.0.1:1"]))["pro", MODEL]
    request = parse_request("completions", b'{"model":"tiny","prompt":"water","max_tokens":9}')
    return Account(ledger, limiter, "request", record, terms, request, estimate(request, terms.pool))


async def admitted(limiter: AwayLimiter, request_timeout_s: float = 600) -> tuple[Account, Ledger]:
    """An admitted account, and its ledger."""
    ledger = Ledger(GatewayMetrics(), request_timeout_s)
    account = account_of(ledger, limiter)
    await account.admit()
    return account, ledger


def unsettled(ledger: Ledger, reason: str) -> float:
    """The reservations left to their leases for this reason."""
    return ledger.metrics.registry.get_sample_value("penstock_unsettled_total", {"reason": reason}) or 0.0


async def test_a_settlement_outlasts_a_store_that_is_away() -> None:
    """What was used is charged exactly once, however many attempts it took."""
    limiter = AwayLimiter(failures=4)
    account, ledger = await admitted(limiter)

    account.settle_used(USED)
    await ledger.drain(timeout_s=30)

    assert [settled["output_tokens"] for settled in limiter.settled] == [5]
    assert limiter.attempts == 5


async def test_settling_ends_with_the_lease() -> None:
    """Once the lease has ended the reservation there is nothing left to correct, and no task tries for ever."""
    limiter = AwayLimiter(FOR_EVER)
    account, ledger = await admitted(limiter, request_timeout_s=-4.8)  # a lease of 0.2 s

    account.settle_used(USED)
    await ledger.drain(timeout_s=30)

    assert limiter.settled == []
    assert not ledger._tasks
    assert unsettled(ledger, "store away") == 1


async def test_settling_ends_while_the_store_knows_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts end well before the store forgets an attempt whose answer was lost: it would be charged twice."""
    assert TOMBSTONE_US / 1e6 - 20 >= accounting.LONGEST_SETTLING_S
    monkeypatch.setattr(accounting, "LONGEST_SETTLING_S", 0.2)
    limiter = AwayLimiter(FOR_EVER)
    account, ledger = await admitted(limiter)

    account.settle_used(USED)
    await ledger.drain(timeout_s=30)

    assert not ledger._tasks
    assert unsettled(ledger, "store away") == 1


async def test_only_so_many_settlements_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the bound has one attempt, and is left to its lease and counted."""
    monkeypatch.setattr(accounting, "MOST_WAITING", 2)
    limiter = AwayLimiter(FOR_EVER)
    ledger = Ledger(GatewayMetrics(), 600)
    accounts = [account_of(ledger, limiter) for _ in range(5)]
    for account in accounts:
        await account.admit()
        account.settle_used(USED)
    async with asyncio.timeout(10):
        while len(ledger._tasks) > 2:  # noqa: ASYNC110 - the tasks end by themselves
            await asyncio.sleep(0)
    assert unsettled(ledger, "too many") == 3

    limiter.failures = 0
    await ledger.drain(timeout_s=30)
    assert len(limiter.settled) == 2


async def test_a_failed_admission_is_taken_back_once() -> None:
    """A store that is away leaves nothing behind of a refused request but one attempt to give back what it may hold."""
    limiter = AwayLimiter(FOR_EVER)
    limiter.refusing = True
    ledger = Ledger(GatewayMetrics(), 600)
    account = account_of(ledger, limiter)
    with pytest.raises(StoreUnavailableError):
        await account.admit()
    account.settle_unserved()
    await ledger.drain(timeout_s=30)

    assert limiter.attempts == 1
    assert not ledger._tasks
    assert unsettled(ledger, "failed admission") == 1
