"""The reaper ends what nobody settles, in cells where nobody asks for admission."""

from __future__ import annotations

from redis.asyncio import Redis

from ratelimit.meter import Admitted, Charge
from ratelimit.reaper import BATCH, Reaper
from ratelimit.store import Store

SLOT = Charge("k:1:concurrency", cost=1, capacity=10 * BATCH, rate=0)


async def in_flight(store: Store) -> int:
    return (await store.peek([SLOT]))[0].used


async def test_overdue_reservations_end_in_every_named_cell(redis_client: Redis) -> None:
    """A dead gateway's slots come back though nobody asks for admission, however many; only overdue ones do."""
    stores = [Store(redis_client, model, timeout_s=5) for model in ("one", "two")]
    for store in stores:
        for number in range(BATCH + 5):
            assert isinstance(await store.admit(f"dead-{number}", [SLOT], epoch=1, lease_ms=1), Admitted)
        await store.admit("alive", [SLOT], epoch=1, lease_ms=600_000)

    reaper = Reaper(redis_client, lambda: ["one", "two"])
    for _ in range(100):
        await reaper.round()
        if [await in_flight(store) for store in stores] == [1, 1]:
            break

    assert [await in_flight(store) for store in stores] == [1, 1]
