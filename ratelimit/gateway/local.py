"""Serving while Redis is away: decide by ``outage``, keep what is owed, and charge it when Redis is back.

What a request took while the store did not know of it is added up per bucket, and told in few calls once it may be
told. A call whose answer was lost is repeated under its own id, for as long as the store would know it again. Usage
records are kept one by one, up to a bound; what is beyond it is counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic_ns

import msgspec

from ratelimit.gateway.breaker import CellStore, StoreAwayError
from ratelimit.gateway.headers import limit_label
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.terms import Terms
from ratelimit.meter import EXACT, Admitted, Charge, Denied
from ratelimit.outage import LocalLimits, safe_amount
from ratelimit.store import StoreUnavailableError

log = logging.getLogger(__name__)

#: What a refusal of this gateway's own is said to be denied by: no bucket, since the caller's limit is not used up.
LOCAL_BUCKET = "outage:share"
#: Buckets told in one call.
CHUNK = 100
MOST_OWED_BUCKETS = 100_000
MOST_RECORDS = 100_000
#: A chunk whose telling failed is repeated for so long; the store would take a later repetition for a new one.
LONGEST_TELLING_S = 100.0
_FLUSH_INTERVAL_S = 0.1


class _Call(msgspec.Struct):
    """A settlement on its way; ``sent_s`` is when it may first have reached the store."""

    id: str
    charges: tuple[Charge, ...]
    record: bytes = b""
    sent_s: float | None = None


class _Journal:
    """What a cell is owed; ``telling`` is taken out of the rest, and not changed, until it is known to be told."""

    def __init__(self) -> None:
        self.debts: dict[str, Charge] = {}
        self.records: deque[tuple[str, bytes]] = deque()
        self.telling: _Call | None = None
        self.full = False  # no record was taken since the last that found no room


class LocalMode:
    """A gateway's own decisions, for all cells. ``gateways`` tells how many are live; 0: that was never known."""

    def __init__(self, metrics: GatewayMetrics, gateway_id: str, gateways: Callable[[], int], lease_s: float) -> None:
        self._metrics = metrics
        self._gateway_id = gateway_id
        self._gateways = gateways
        self._lease_ms = round(lease_s * 1_000)
        self._limits: dict[str, LocalLimits] = {}
        self._journals: dict[str, _Journal] = {}
        self._chunks = 0

    def admit(self, request_id: str, terms: Terms, charges: Sequence[Charge]) -> Admitted | Denied:
        """Decide alone; raises ``StoreUnavailableError`` for callers that are only served while the store is there."""
        gateways, model = self._gateways(), terms.pool.model
        if not gateways or not terms.assured:
            self._metrics.local_decisions.labels(model, terms.tier, "not served").inc()
            raise StoreUnavailableError("Redis is away, and this caller is served by its word only")
        limits = self._limits.setdefault(model, LocalLimits())
        answer = limits.admit(request_id, charges, gateways, self._lease_ms, _now_us())
        if isinstance(answer, Denied):
            self._metrics.local_decisions.labels(model, terms.tier, "refused").inc()
            return Denied(LOCAL_BUCKET, answer.wait_us, (), ())
        self._metrics.local_decisions.labels(model, terms.tier, "admitted").inc()
        return answer

    def settle(self, request_id: str, model: str, used: Sequence[Charge]) -> None:
        """A request admitted here used this much."""
        self._limits[model].settle(request_id, used, _now_us())

    def owe(self, model: str, used: Sequence[Charge]) -> None:
        """The store is to be charged for a request that it never heard of."""
        journal = self._journals.setdefault(model, _Journal())
        for charge in used:
            known = journal.debts.get(charge.bucket)
            if known is None and len(journal.debts) >= MOST_OWED_BUCKETS:
                self._metrics.lost.labels("debt").inc()
                continue
            most = (EXACT - 1) // charge.units
            journal.debts[charge.bucket] = charge.costing(min(most, charge.cost + (known.cost if known else 0)))
        self._metrics.owed_buckets.labels(model).set(len(journal.debts))

    def keep(self, model: str, request_id: str, record: bytes) -> None:
        """A usage record is to be told to the store when it is back."""
        journal = self._journals.setdefault(model, _Journal())
        if len(journal.records) >= MOST_RECORDS:
            self._metrics.lost.labels("record").inc()
            if not journal.full:
                log.error("%s: usage records are lost from now on: %d wait for Redis already", model, MOST_RECORDS)
            journal.full = True
            return
        journal.full = False
        journal.records.append((request_id, record))

    def publish_bound(self, every: Sequence[Terms]) -> None:
        """Show what this gateway would admit of each tier's assured limits, were the store to go away now."""
        self._metrics.local_bound.clear()
        gateways = self._gateways()
        bounds: dict[tuple[str, str, str, str], int] = {}
        for terms in every:
            for limit in terms.limits if gateways and terms.assured else ():
                keys = max(1, terms.active_keys) if limit.per == "key" else 1
                for per, amount in (("minute", limit.per_minute), ("burst", limit.burst)):
                    labels = terms.pool.model, terms.tier, limit_label(limit), per
                    bound = keys * safe_amount(amount, gateways)
                    bounds[labels] = min(bound, bounds.get(labels, bound))  # a rule's may stand beside the tier's own
        for labels, bound in bounds.items():
            self._metrics.local_bound.labels(*labels).set(bound)

    @property
    def owes(self) -> int:
        """Buckets and records that the stores have not been told."""
        return sum(len(j.debts) + len(j.records) + (j.telling is not None) for j in self._journals.values())

    async def run(self, store_for: Callable[[str], CellStore]) -> None:
        """Tell the stores what they are owed whenever they can be told, until cancelled."""
        while True:
            await self.flush(store_for)
            await asyncio.sleep(_FLUSH_INTERVAL_S)

    async def flush(self, store_for: Callable[[str], CellStore]) -> None:
        """Tell each store all that it is owed, as far as it can be told now."""
        for model, journal in list(self._journals.items()):
            try:
                while call := self._next(journal):
                    await self._tell(store_for(model), call)
                    journal.telling = None
            except StoreUnavailableError:
                self._metrics.store_errors.labels("journal").inc()
            self._metrics.owed_buckets.labels(model).set(len(journal.debts))

    def _next(self, journal: _Journal) -> _Call | None:
        if journal.telling is None and journal.debts:
            names = [bucket for _, bucket in zip(range(CHUNK), journal.debts, strict=False)]
            self._chunks += 1
            owed = tuple(journal.debts.pop(name) for name in names)
            journal.telling = _Call(f"journal:{self._gateway_id}:{self._chunks}", owed)
        elif journal.telling is None and journal.records:
            request_id, record = journal.records.popleft()
            journal.telling = _Call(request_id, (), record)
        return journal.telling

    async def _tell(self, store: CellStore, call: _Call) -> None:
        now_s = asyncio.get_running_loop().time()
        if call.sent_s is not None and now_s - call.sent_s > LONGEST_TELLING_S:
            self._metrics.lost.labels("record" if call.record else "debt").inc()
            log.error("settlement %s is lost: Redis was away for too long to repeat it safely", call.id)
            return
        try:
            await store.settle(call.id, call.charges, call.record)
        except StoreAwayError:
            raise
        except StoreUnavailableError:
            call.sent_s = now_s if call.sent_s is None else call.sent_s
            raise


def _now_us() -> int:
    return monotonic_ns() // 1_000
