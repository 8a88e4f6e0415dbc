"""A cell's store behind a breaker: while Redis is away no request waits for it.

Any call that fails opens the breaker; then every call fails at once, and a probe that writes, one right then and four
a second after it, closes it again. An admission is given up after ``timeout_s``, and what no request waits for
(settlements, renewals) after ``BACKGROUND_TIMEOUT_S``, but neither before what the socket already holds was read: a
gateway that was busy must not blame Redis. For the same reason what no request waits for takes turns, so many at once,
and does not open the breaker where the link is full.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from secrets import token_hex
from typing import Protocol, TypeVar

from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.link import LinkOverloadedError
from ratelimit.meter import Admitted, Charge, Denied, Reading
from ratelimit.store import StoreUnavailableError

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.25
#: What a call that no request waits for may take, unless an admission may take longer.
BACKGROUND_TIMEOUT_S = 1.0
#: Such calls that are under way at once, of all cells: they leave most of the link's ``MOST_WAITING`` to admissions.
BACKGROUND_AT_ONCE = 1024
#: Passes of the event loop between the end of a timeout and its judgement: one reads the socket, one hands the answer
#: to its reader, one lets the reader parse it.
_PASSES = 3
#: A timer that is later than this was kept by an event loop that stood still.
_STANDSTILL_S = 0.01

T = TypeVar("T")


class StoreAwayError(StoreUnavailableError):
    """The store is away, or the link to it full: it was not asked, so nothing has come of this call."""


class CellStore(Protocol):
    """The store of one cell, as far as a gateway uses it."""

    async def admit(
        self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int, memo: bytes = b""
    ) -> Admitted | Denied: ...
    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool: ...
    async def settle(self, request_id: str, usage: Sequence[Charge], record: bytes = b"") -> bool: ...
    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]: ...


class GuardedStore:
    """The store of the cell named; raises ``StoreUnavailableError``, or ``StoreAwayError`` where it was not asked.

    What nobody waits for takes its turn by ``turns``. The store's own timeout must be longer than those given here.
    """

    def __init__(
        self, store: CellStore, cell: str, timeout_s: float, metrics: GatewayMetrics, turns: asyncio.Semaphore
    ) -> None:
        self._store = store
        self._cell = cell
        self._timeout_s = timeout_s
        self._background_timeout_s = max(BACKGROUND_TIMEOUT_S, timeout_s)
        self._metrics = metrics
        self._turns = turns
        self._back = asyncio.Event()
        self._back.set()
        self._probing: asyncio.Task[None] | None = None
        metrics.store_away.labels(cell).set(0)

    @property
    def away(self) -> bool:
        """Whether the breaker is open."""
        return not self._back.is_set()

    async def admit(
        self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int, memo: bytes = b""
    ) -> Admitted | Denied:
        """As ``Store.admit``."""
        self._check()
        try:
            return await self._patient(self._store.admit(request_id, charges, epoch, lease_ms, memo), self._timeout_s)
        except StoreUnavailableError as error:
            self._open(error)
            raise

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """As ``Store.extend``."""
        return await self._in_turn(lambda: self._store.extend(request_id, usage, lease_ms))

    async def settle(self, request_id: str, usage: Sequence[Charge], record: bytes = b"") -> bool:
        """As ``Store.settle``."""
        return await self._in_turn(lambda: self._store.settle(request_id, usage, record))

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        """As ``Store.peek``."""
        return await self._in_turn(lambda: self._store.peek(charges))

    async def wait_back(self, timeout_s: float) -> bool:
        """Wait, at most so long, until the store may be asked; False at once where it may be already."""
        if not self.away:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._back.wait()
        return True

    async def aclose(self) -> None:
        """End the probing, if it goes on."""
        if self._probing is not None:
            self._probing.cancel()
            with suppress(asyncio.CancelledError):
                await self._probing

    def _check(self) -> None:
        if self.away:
            raise StoreAwayError(f"Redis is away for {self._cell}")

    async def _in_turn(self, call: Callable[[], Awaitable[T]]) -> T:
        """What nobody waits for: sent when it is its turn, unless the store has gone by then."""
        self._check()
        async with self._turns:
            self._check()
            try:
                return await self._patient(call(), self._background_timeout_s)
            except StoreUnavailableError as error:
                if isinstance(error.__cause__, LinkOverloadedError):
                    raise StoreAwayError(f"{error.__cause__}") from error
                self._open(error)
                raise

    async def _patient(self, call: Awaitable[T], timeout_s: float) -> T:
        try:
            async with asyncio.timeout(None) as scope:
                patience = _Patience(scope, timeout_s)
                try:
                    return await call
                finally:
                    patience.cancel()
        except TimeoutError as error:
            raise StoreUnavailableError(f"Redis did not answer in {timeout_s} s") from error

    def _open(self, error: StoreUnavailableError) -> None:
        if self.away:
            return
        self._back.clear()
        self._metrics.store_away.labels(self._cell).set(1)
        self._metrics.outages.labels(self._cell).inc()
        log.error(
            "Redis is away for %s, assured tiers are served within this gateway's safe share, others are refused: %s",
            self._cell,
            error,
        )
        self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        loop = asyncio.get_running_loop()
        since = loop.time()
        while self.away:
            try:
                # An id of its own each time, so that it has to write: a replica that only reads is no store.
                await self._patient(self._store.settle(f"probe:{token_hex(8)}", ()), self._timeout_s)
            except StoreUnavailableError:
                self._metrics.store_errors.labels("probe").inc()
                await asyncio.sleep(PROBE_INTERVAL_S)
            else:
                self._back.set()
        self._metrics.store_away.labels(self._cell).set(0)
        log.warning("Redis is back for %s after %.1f s", self._cell, loop.time() - since)


class GuardedStores:
    """The guarded stores of all cells, by model; ``open_store`` makes the store of one."""

    def __init__(self, open_store: Callable[[str], CellStore], timeout_s: float, metrics: GatewayMetrics) -> None:
        self._open_store = open_store
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._turns = asyncio.Semaphore(BACKGROUND_AT_ONCE)
        self._stores: dict[str, GuardedStore] = {}

    def __call__(self, model: str) -> GuardedStore:
        """The store of a published model's cell."""
        store = self._stores.get(model)
        if store is None:
            store = GuardedStore(self._open_store(model), model, self._timeout_s, self._metrics, self._turns)
            self._stores[model] = store
        return store

    async def aclose(self) -> None:
        """End what probes; the stores' clients stay their owner's."""
        for store in self._stores.values():
            await store.aclose()


class _Patience:
    """Ends a timeout scope ``timeout_s`` from now and a few passes of the event loop later.

    Where the event loop stood still meanwhile, what was asked may not even have been sent: then it has that long again.
    """

    def __init__(self, scope: asyncio.Timeout, timeout_s: float) -> None:
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        self._passes = _PASSES
        self._timeout_s = timeout_s
        self._late_s = self._loop.time() + timeout_s + _STANDSTILL_S
        self._handle: asyncio.Handle = self._loop.call_later(timeout_s, self._due)

    def _due(self) -> None:
        if self._loop.time() > self._late_s:
            self._handle = self._loop.call_later(self._timeout_s, self._pass)
        else:
            self._pass()

    def _pass(self) -> None:
        if self._passes:
            self._passes -= 1
            self._handle = self._loop.call_soon(self._pass)
        else:
            self._scope.reschedule(self._loop.time())

    def cancel(self) -> None:
        """The call has ended."""
        self._handle.cancel()
