"""A process that makes the same requests as its rivals at the same time: ``python -m tests.support.rivals URL``.

Every rival offers all of ``REQUESTS``, half of them over a link and half over connections of redis-py, as gateways do
that retry each other's calls: it admits twice, reports, and settles twice. Every tenth it leaves to its lease. It
prints what it was told.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing

import msgspec
from redis.asyncio import Redis

from ratelimit.link import open_link
from ratelimit.meter import Admitted, Charge, Denied
from ratelimit.store import Store

CELL = "rivals"
TIMEOUT_S = 30.0
LEASE_MS, SHORT_LEASE_MS = 60_000, 1
#: How often a refused request is offered again, when it was told.
TRIES = 3
#: Fills up and refills within the test.
TIGHT = Charge("k:a:tight", 0, 300, 300_000)
#: Never refuses, and hardly leaks: what is charged in all.
TOTAL = Charge("o:x:total", 0, 1_000_000, 1)
IN_FLIGHT = Charge("k:a:concurrency", 1, 1_000, 0)


class Planned(msgspec.Struct, frozen=True):
    """A request: what it holds and what it uses; one that is ``left`` is never settled and uses all it holds."""

    name: str
    hold: int
    uses: int
    left: bool


REQUESTS = tuple(Planned(f"r{i}", 5 + i % 13, (7 * i) % 23, left=i % 10 == 9) for i in range(120))


class Told(msgspec.Struct):
    """What a rival was told of one request: the admissions, and whether each settlement was the first."""

    name: str
    admitted: list[Admitted] = []
    settled: list[bool] = []


def charges(cost: int) -> list[Charge]:
    """A request's charges at a cost."""
    return [TIGHT.costing(cost), TOTAL.costing(cost), IN_FLIGHT]


async def make(store: Store, planned: Planned) -> Told:
    """One request from its admission to its end."""
    told, lease_ms = Told(planned.name), SHORT_LEASE_MS if planned.left else LEASE_MS
    for _ in range(TRIES):
        answers = await asyncio.gather(
            *(store.admit(planned.name, charges(planned.hold), 1, lease_ms) for _ in "twice"[:2])
        )
        told.admitted = [answer for answer in answers if isinstance(answer, Admitted)]
        if told.admitted:
            break
        # Both copies were refused: a time to come back is always told, since a gauge never binds here.
        await asyncio.sleep(max(a.wait_us or 0 for a in answers if isinstance(a, Denied)) / 1_000_000)
    if told.admitted and not planned.left:
        await store.extend(planned.name, charges(planned.uses)[:2], LEASE_MS)
        told.settled = [await store.settle(planned.name, charges(planned.uses)) for _ in "twice"[:2]]
    return told


async def main(url: str) -> None:
    """All requests at once."""
    most = 2 * len(REQUESTS)
    async with Redis.from_url(url, max_connections=most) as client, aclosing(open_link(url, TIMEOUT_S)) as link:
        stores = [Store(client, CELL, TIMEOUT_S), Store(link, CELL, TIMEOUT_S)]
        told = await asyncio.gather(*(make(stores[i % 2], planned) for i, planned in enumerate(REQUESTS)))
    sys.stdout.buffer.write(msgspec.json.encode(told))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
