"""What the gateways, Redis and its usage stream say was charged: three accounts that must agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis

from ratelimit.gateway.charges import POOL_BUCKET
from ratelimit.meter import Charge, Role
from ratelimit.publication import POOL_TICK_US, Publication
from ratelimit.store import KEY_VERSION, Store
from ratelimit.usage import EntryId, LedgerLine, ledger_line
from ratelimit.usagedrain import usage_stream
from tests.support.gateway import MODEL, GatewayProcess
from tests.support.stack import metric


class Balance(msgspec.Struct, frozen=True):
    """Tokens of one kind, over all gateways."""

    held: float
    overrun: float
    settled: float
    refunded: float
    expired: float

    @property
    def open(self) -> float:
        """What is held, and nothing came of it yet."""
        return self.held + self.overrun - self.settled - self.refunded - self.expired


def balance(gateways: Sequence[GatewayProcess], kind: str) -> Balance:
    """The gateways' own account since their start."""
    pages = [gateway.metrics() for gateway in gateways]

    def total(name: str) -> float:
        return sum(metric(page, f"penstock_{name}_tokens_total", kind=kind) for page in pages)

    return Balance(*map(total, Balance.__struct_fields__))


async def ledger(redis: Redis) -> list[LedgerLine]:
    """Every usage record of the test's cell, as the controller would keep it."""
    entries: Any = await redis.xrange(usage_stream(MODEL))
    lines = [ledger_line(MODEL, EntryId.parse(entry.decode()), fields) for entry, fields in entries]
    return [line for line in lines if line is not None]


def twice(lines: Sequence[LedgerLine]) -> list[str]:
    """Requests with more than one record."""
    return [request_id for request_id, count in Counter(line.id for line in lines).items() if count > 1]


async def open_reservations(redis: Redis) -> int:
    """Reservations that nobody has settled and that were not forgotten."""
    return int(await redis.zcard(f"{KEY_VERSION}:{{{MODEL}}}:leases"))


async def end_leases(redis: Redis) -> int:
    """Let every lease be over, and then what is remembered of it; how many reservations are forgotten.

    As if the minutes had passed: the script goes by the deadlines in this set alone.
    """
    leases = f"{KEY_VERSION}:{{{MODEL}}}:leases"
    store = Store(redis, MODEL, timeout_s=5)
    open_at_first = await open_reservations(redis)
    while await open_reservations(redis):
        found: Any = await redis.zrange(leases, 0, -1)
        await redis.zadd(leases, dict.fromkeys(found, 1))
        await store.reap(1000)
    return open_at_first


async def pool_work_us(redis: Redis, published: Publication) -> int:
    """What was charged to the pool's bucket since it was made, which was full then: its rate must be very slow."""
    (pool,) = published.pools
    budget = Charge(POOL_BUCKET, 0, pool.budget_burst, pool.budget_per_minute, POOL_TICK_US, Role.COUNTED)
    (reading,) = await Store(redis, MODEL, timeout_s=5).peek([budget])
    return reading.used - pool.budget_burst
