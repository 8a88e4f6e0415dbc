from __future__ import annotations

from collections.abc import Sequence

from ratelimit.gateway.accounting import Account, Ledger
from ratelimit.gateway.hold import Usage, estimate
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import terms_by_tier
from ratelimit.gateway.wire import parse_request
from ratelimit.meter import Admitted, Charge, Denied, Reading
from ratelimit.store import StoreUnavailableError
from tests.support.gateway import MODEL, make_key, publication


class AwayLimiter:
    """A store that admits, is away for the first ``failures`` settlements, and remembers those that reach it."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.settled: list[dict[str, int]] = []

    async def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted | Denied:
        return Admitted((), ())

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        return True

    async def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailableError("away")
        self.settled.append({charge.bucket: charge.cost for charge in usage})
        return True

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        return ()


async def admitted(limiter: AwayLimiter, request_timeout_s: float = 600) -> tuple[Account, Ledger]:
    _, record = make_key()
    terms = terms_by_tier(publication(["http://127.0.0.1:1"]))["pro", MODEL]
    request = parse_request("completions", b'{"model":"tiny","prompt":"water","max_tokens":9}')
    ledger = Ledger(GatewayMetrics(), request_timeout_s)
    account = Account(ledger, limiter, "request", record, terms, request, estimate(request, terms.pool))
    await account.admit()
    return account, ledger


async def test_a_settlement_outlasts_a_store_that_is_away() -> None:
    """What was used is charged exactly once, however many attempts it took."""
    limiter = AwayLimiter(failures=4)
    account, ledger = await admitted(limiter)

    account.settle_used(Usage(prompt_tokens=3, output_tokens=5))
    await ledger.drain(timeout_s=30)

    assert [settled["k:" + account._record.id + ":output_tokens"] for settled in limiter.settled] == [5]


async def test_settling_ends_with_the_lease() -> None:
    """Once the lease has ended the reservation there is nothing left to correct, and no task tries for ever."""
    limiter = AwayLimiter(failures=10**9)
    account, ledger = await admitted(limiter, request_timeout_s=-4.8)  # a lease of 0.2 s

    account.settle_used(Usage(prompt_tokens=3, output_tokens=5))
    await ledger.drain(timeout_s=30)

    assert limiter.settled == []
    assert not ledger._tasks
