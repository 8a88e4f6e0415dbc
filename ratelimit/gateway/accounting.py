"""A reservation's life within one request: admitted, corrected when the engine tells the prompt's length, settled once.

Only admission is waited for. Corrections and settlements run as tasks that no cancellation of the request touches, one
after the other; ``Ledger.drain`` waits for them when the process ends. While the store is away a settlement is tried
again, for a bounded time and in bounded numbers; what cannot be settled is counted, and ends with its lease.

What a request owes in the end:

- what the engine reported, also where the client left or the engine broke off mid-stream;
- the estimated prompt, where a stream ended before anything was reported;
- all that was held, where a client left a request that is not streamed: what was generated for it is unknown;
- one request and nothing else, where the engine refused it (4xx): nothing was generated;
- nothing, where no replica served it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from random import uniform
from typing import Any, Protocol

from ratelimit.gateway.charges import charges_for, used_charges
from ratelimit.gateway.hold import Usage, pool_cost_us
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import Terms
from ratelimit.gateway.wire import ParsedRequest
from ratelimit.keys import KeyRecord
from ratelimit.meter import TOMBSTONE_US, Admitted, Charge, Denied, Reading
from ratelimit.store import StoreUnavailableError

#: A lease outlives the request timeout by this, so that a settlement at the very end still comes first.
SETTLE_GRACE_MS = 5_000
#: Pauses between attempts to settle while the store is away. They double, and are spread by ±half, so that many
#: settlements do not come back at one instant.
_FIRST_SETTLE_PAUSE_S = 0.1
_LONGEST_SETTLE_PAUSE_S = 5.0
#: From the first attempt to settle to the last. An attempt whose answer was lost may have settled; the store knows that
#: for as long as its tombstone lasts, and a later attempt would charge once more.
LONGEST_SETTLING_S = TOMBSTONE_US / 1e6 - 20
#: Settlements that may wait for the store at once; what is beyond them is left to its lease.
MOST_WAITING = 10_000
#: After a failed admission, for the store to have done what it was asked, before that is taken back.
_GIVE_BACK_PAUSE_S = 0.5
#: Output beyond the hold is charged in steps of this many tokens while a stream runs.
OVERRUN_TOKENS = 256

_NOTHING = Usage(0, 0)


class Limiter(Protocol):
    """The store of one cell, as far as a gateway uses it."""

    async def admit(
        self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int
    ) -> Admitted | Denied: ...
    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool: ...
    async def settle(self, request_id: str, usage: Sequence[Charge]) -> bool: ...
    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]: ...


class Ledger:
    """The settlements under way in this process."""

    def __init__(self, metrics: GatewayMetrics, request_timeout_s: float) -> None:
        self.metrics = metrics
        self.lease_ms = round(request_timeout_s * 1_000) + SETTLE_GRACE_MS
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run on, whatever becomes of the request."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def pause(self, pause_s: float) -> bool:
        """Wait for the store to come back, for about this long; at once False where too many wait already."""
        if self._waiting >= MOST_WAITING:
            return False
        self._waiting += 1
        try:
            await asyncio.sleep(pause_s * uniform(0.5, 1.5))  # noqa: S311 - a pause is no secret
        finally:
            self._waiting -= 1
        return True

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is under way, at most this long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)


class Account:
    """One request's charges, from what it holds to what it owes; without a ``limiter`` it is only counted."""

    def __init__(
        self,
        ledger: Ledger,
        limiter: Limiter | None,
        request_id: str,
        record: KeyRecord,
        terms: Terms,
        request: ParsedRequest,
        held: Usage,
    ) -> None:
        self._ledger = ledger
        self._limiter = limiter
        self._request_id = request_id
        self._record = record
        self._terms = terms
        self._choices = request.choices
        self._generated_choices = request.generated_choices
        self._prompts = request.prompts
        self.held = held
        self._extended_to = held.output_tokens
        self.cost_us = self._cost_us(held, self._generated_choices)
        self._charges = charges_for(record.id, terms, held, self.cost_us)
        self._previous: asyncio.Task[None] | None = None
        self._settled = False
        self._lease_ends_s = 0.0

    def _cost_us(self, usage: Usage, choices: int) -> int:
        return pool_cost_us(self._terms.groups, usage, choices, self._prompts)

    async def admit(self) -> Admitted | Denied | None:
        """Ask the store; ``None`` where limits are not enforced. Raises ``StoreUnavailableError``."""
        if self._limiter is None:
            return None
        self._lease_ends_s = self._lease_from_now_s()
        try:
            answer = await self._limiter.admit(
                self._request_id, self._charges, self._terms.epoch, self._ledger.lease_ms
            )
        except StoreUnavailableError:
            self._ledger.metrics.store_errors.labels("admit").inc()
            self._settled = True
            self._queue(self._give_back(self._limiter))
            raise
        except BaseException:  # cancelled: the store may hold what was asked
            self.settle_unserved()
            raise
        if isinstance(answer, Denied):
            self._settled = True
        return answer

    def correct(self, usage: Usage) -> None:
        """Hold the true prompt in place of the estimated one, and output beyond the hold as debt."""
        output = max(self.held.output_tokens, usage.output_tokens)
        if self._limiter is None or self._settled or output < self._extended_to:
            return
        true = Usage(usage.prompt_tokens, output, usage.cached_tokens)
        self._extended_to = output + OVERRUN_TOKENS
        cost_us = self._cost_us(true, self._generated_choices)
        self._queue(self._extend(self._limiter, used_charges(self._charges, true, cost_us)))

    def settle_used(self, usage: Usage | None) -> None:
        """The request used this much; where nothing was reported, its estimated prompt."""
        used = Usage(self.held.prompt_tokens, 0) if usage is None else usage
        self._settle(lambda: used_charges(self._charges, used, self._cost_us(used, self._choices)), used)

    def settle_as_held(self) -> None:
        """What the request used is unknown: nothing is given back but its place in flight."""
        self._settle(tuple, self.held)

    def settle_refused(self) -> None:
        """The engine refused the request: it counts as one request without tokens."""
        self._settle(lambda: used_charges(self._charges, _NOTHING, 0), _NOTHING)

    def settle_unserved(self) -> None:
        """No replica served the request: all is given back. Does nothing where it was settled before."""
        self._settle(lambda: used_charges(self._charges, _NOTHING, 0, requests=0), _NOTHING)

    def _settle(self, charges: Any, used: Usage) -> None:
        if self._settled:
            return
        self._settled = True
        if used is not _NOTHING:
            self._ledger.metrics.used(self._terms.pool.model, self._record.tier, used, self.held)
        if self._limiter is not None:
            self._queue(self._settle_in_store(self._limiter, charges()))

    def _queue(self, work: Coroutine[Any, Any, None]) -> None:
        self._previous = self._ledger.spawn(_after(self._previous, work))

    async def _extend(self, limiter: Limiter, charges: Sequence[Charge]) -> None:
        lease_ends_s = self._lease_from_now_s()
        try:
            await limiter.extend(self._request_id, charges, self._ledger.lease_ms)
        except StoreUnavailableError:
            self._ledger.metrics.store_errors.labels("extend").inc()  # the settlement corrects it
        else:
            self._lease_ends_s = lease_ends_s

    async def _settle_in_store(self, limiter: Limiter, charges: Sequence[Charge]) -> None:
        clock = asyncio.get_running_loop().time
        give_up_s = min(clock() + LONGEST_SETTLING_S, self._lease_ends_s)
        pause_s = _FIRST_SETTLE_PAUSE_S
        while not await self._settles(limiter, charges):
            if clock() + pause_s > give_up_s:
                self._left_to_its_lease("store away")
                return
            if not await self._ledger.pause(pause_s):
                self._left_to_its_lease("too many")
                return
            pause_s = min(2 * pause_s, _LONGEST_SETTLE_PAUSE_S)

    async def _give_back(self, limiter: Limiter) -> None:
        """Take back, in one attempt, an admission that failed for the caller and may have come through in the store."""
        if not await self._ledger.pause(_GIVE_BACK_PAUSE_S):
            self._left_to_its_lease("too many")
        elif not await self._settles(limiter, used_charges(self._charges, _NOTHING, 0, requests=0)):
            self._left_to_its_lease("failed admission")

    async def _settles(self, limiter: Limiter, charges: Sequence[Charge]) -> bool:
        try:
            await limiter.settle(self._request_id, charges)
        except StoreUnavailableError:
            self._ledger.metrics.store_errors.labels("settle").inc()
            return False
        return True

    def _left_to_its_lease(self, reason: str) -> None:
        self._ledger.metrics.unsettled.labels(reason).inc()

    def _lease_from_now_s(self) -> float:
        return asyncio.get_running_loop().time() + self._ledger.lease_ms / 1_000


async def _after(previous: asyncio.Task[None] | None, work: Coroutine[Any, Any, None]) -> None:
    if previous is not None:
        await asyncio.wait({previous})
    await work
