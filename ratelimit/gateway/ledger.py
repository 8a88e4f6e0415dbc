"""What all accounts of one gateway process share: their tasks, their leases' renewal, and what was learned and refused.

Settlements and renewals run as tasks that no cancellation of a request touches. ``drain`` waits for them when the
process ends. While the store is away a settlement waits, for a bounded time and in bounded numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from random import uniform
from typing import Any, Protocol

from ratelimit.gateway.breaker import CellStore
from ratelimit.gateway.denials import Denials
from ratelimit.gateway.estimates import Estimates, TextRates
from ratelimit.gateway.hold import Usage, estimate, expected_load
from ratelimit.gateway.local import LocalMode
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import Terms
from ratelimit.gateway.wire import ParsedRequest
from ratelimit.keys import KeyRecord
from serving.routing import Load

log = logging.getLogger(__name__)

#: Between two looks at every open account.
SWEEP_S = 2.0
#: A lease is renewed when this part of it has passed: two renewals may be lost before it ends.
RENEWED_AFTER = 1 / 3
#: Pauses between attempts to settle while the store is away. They double, and are spread by ±half, so that many
#: settlements do not come back at one instant.
FIRST_SETTLE_PAUSE_S = 0.1
LONGEST_SETTLE_PAUSE_S = 5.0
#: Settlements that may wait for the store at once; what is beyond them is left to its lease.
MOST_WAITING = 10_000
#: Settlements a second that those who waited bring to a store that is back, so that new requests get through too.
_RETURNING_PER_S = 10_000
#: Accounts that one step of the sweep renews, before others get their turn.
_SWEPT_AT_ONCE = 50


class Limiter(CellStore, Protocol):
    """The store of one cell behind its breaker."""

    async def wait_back(self, timeout_s: float) -> bool: ...


class Renewable(Protocol):
    """An account whose lease is to be renewed."""

    def renew(self) -> None: ...


class Ledger:
    """What the accounts of this process share; a reservation that is not renewed ends after ``lease_s``."""

    def __init__(self, metrics: GatewayMetrics, lease_s: float, local: LocalMode | None = None) -> None:
        self.metrics = metrics
        self.lease_s = lease_s
        self.lease_ms = round(lease_s * 1_000)
        self.local = local or LocalMode(metrics, "", lambda: 0, lease_s)
        self.estimates = Estimates()
        self.denials = Denials()
        self._open: set[Renewable] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0

    def held(self, record: KeyRecord, terms: Terms, request: ParsedRequest) -> Usage:
        """What to hold for a request of this key; raises ``Rejection`` (400) where it exceeds the context."""
        if terms.holds == "maximum":
            return estimate(request, terms.pool)
        pool = terms.pool
        expected = self.estimates.expected(record.id, pool.model, pool.default_max_output, pool.tokens_per_byte)
        return estimate(request, pool, expected)

    def load(self, record: KeyRecord, terms: Terms, request: ParsedRequest, held: Usage, cost_us: int) -> Load:
        """What a replica is expected to have of a request; its answers as long as this key's usually are."""
        pool = terms.pool
        expected = self.estimates.expected(record.id, pool.model, pool.default_max_output, pool.tokens_per_byte)
        return expected_load(request, held, expected.output_tokens, cost_us)

    def learn(
        self, record: KeyRecord, terms: Terms, prompt: tuple[int, int], answer: int, ended: bool, deltas: int = 0
    ) -> None:
        """A request's prompt had so many (bytes, tokens), and each of its answers so many tokens.

        ``deltas``: what a stream had of them that told its usage only at its end.
        """
        pool = terms.pool
        self.estimates.note_deltas(record.id, pool.model, deltas, answer)
        self.estimates.note_prompt(record.id, pool.model, *prompt, pool.tokens_per_byte)
        self.estimates.note_output(record.id, pool.model, answer, pool.default_max_output, ended)

    def text_rates(self, record: KeyRecord, terms: Terms) -> TextRates:
        """What this key's streams tell of their tokens before they tell them."""
        return self.estimates.text_rates(record.id, terms.pool.model, terms.pool.tokens_per_byte)

    def opened(self, account: Renewable) -> None:
        """Renew this account's lease until it is closed."""
        self._open.add(account)

    def closed(self, account: Renewable) -> None:
        """Renew it no longer; does nothing where it was not opened."""
        self._open.discard(account)

    async def run(self) -> None:
        """Renew what is open, until cancelled."""
        while True:
            await self.sweep()
            await asyncio.sleep(SWEEP_S)

    async def sweep(self) -> None:
        """Look once at every open account."""
        failure: Exception | None = None
        for number, account in enumerate(list(self._open), start=1):
            try:
                account.renew()
            except Exception as error:  # counted: the others are renewed all the same
                self.metrics.renewal_faults.inc()
                failure = error
            if number % _SWEPT_AT_ONCE == 0:
                await asyncio.sleep(0)
        if failure is not None:
            log.error("leases of open requests could not be renewed, the last one for this", exc_info=failure)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run on, whatever becomes of the request."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def pause(self, limiter: Limiter, pause_s: float) -> float | None:
        """Wait for the store to come back, or for about this long; the pause after it, None where too many wait."""
        if self._waiting >= MOST_WAITING:
            return None
        self._waiting += 1
        try:
            was_away = await limiter.wait_back(LONGEST_SETTLE_PAUSE_S)
            if was_away:
                pause_s = FIRST_SETTLE_PAUSE_S
            spread_s = self._waiting / _RETURNING_PER_S
            await asyncio.sleep(pause_s * uniform(0.5, 1.5) + uniform(0, spread_s))  # noqa: S311 - a pause is no secret
        finally:
            self._waiting -= 1
        return min(2 * pause_s, LONGEST_SETTLE_PAUSE_S)

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is under way, at most this long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
