"""Usage records for tests."""

from __future__ import annotations

import msgspec
from redis.asyncio import Redis

from ratelimit.usage import LedgerLine, UsageRecord
from ratelimit.usagedrain import usage_stream

_ANY = UsageRecord(
    id="r",
    time=1_700_000_000.0,
    key="k_1",
    org="acme",
    tier="pro",
    model="llama",
    route="chat",
    stream=False,
    input_tokens=10,
    cached_tokens=0,
    output_tokens=5,
    cost_us=2_000_000,
    green=True,
    outcome="ended",
)


def usage_record(record_id: str, **fields: object) -> UsageRecord:
    """A record of 10 tokens in, 5 out and 2 replica-seconds, but for the fields given."""
    return msgspec.structs.replace(_ANY, id=record_id, **fields)


def line(record_id: str, entry: str, cell: str = "llama", **fields: object) -> LedgerLine:
    """The same as it is kept."""
    return LedgerLine(**msgspec.structs.asdict(usage_record(record_id, **fields)), cell=cell, entry=entry)


async def settle(redis: Redis, record_id: str, cell: str = "llama", entry: str = "*") -> str:
    """Put a record into a cell's stream, as the settle script does; the id of its entry."""
    record = msgspec.json.encode(usage_record(record_id))
    made = await redis.xadd(usage_stream(cell), {b"record": record}, id=entry)
    return made.decode() if isinstance(made, bytes) else str(made)
