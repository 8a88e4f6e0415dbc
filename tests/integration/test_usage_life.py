"""From a reservation in the store to a line in the ledger: every way in which one ends leaves at most one record."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from ratelimit.cell import REAPED_KEPT_US
from ratelimit.meter import Charge
from ratelimit.usage import LedgerLine
from ratelimit.usagedrain import UsageDrain
from ratelimit.usagefiles import UsageFiles
from tests.support.clocked_store import ClockedStore
from tests.support.usage import usage_record

CELL = "llama"
LEASE_MS = 1000
TOKENS = Charge("k:k_1:output_tokens", cost=100, capacity=1000, rate=60, at_reap=40)
HELD = msgspec.json.encode(usage_record("r", output_tokens=100, outcome="unknown"))
USED = msgspec.json.encode(usage_record("r", output_tokens=7))


@pytest.fixture
async def store(redis_client: Redis) -> ClockedStore:
    """A store with one reservation, that of the request "r"."""
    made = ClockedStore(redis_client, CELL)
    await made.admit("r", [TOKENS], 1, LEASE_MS, HELD)
    return made


async def ledger(redis: Redis, state_dir: Path) -> list[LedgerLine]:
    """Every line, once what there is has been drained."""
    await UsageDrain(redis, lambda: [CELL], state_dir).round()
    return list(UsageFiles(state_dir).lines(0, 1 << 45))


async def test_a_settlement_that_is_repeated_is_recorded_once(
    redis_client: Redis, tmp_path: Path, store: ClockedStore
) -> None:
    """A retry of a settlement whose answer was lost adds no record, drained in between or not."""
    await store.settle("r", [TOKENS.costing(7)], USED)
    assert len(await ledger(redis_client, tmp_path)) == 1
    await store.settle("r", [TOKENS.costing(7)], USED)

    (line,) = await ledger(redis_client, tmp_path)

    assert (line.id, line.output_tokens, line.outcome) == ("r", 7, "ended")


async def test_what_a_dead_gateway_left_is_recorded_as_expired(
    redis_client: Redis, tmp_path: Path, store: ClockedStore
) -> None:
    """Once nobody can settle it any more, the request owes what stays charged of its hold."""
    store.now_us += LEASE_MS * 1000 + 1
    await store.reap()
    assert await ledger(redis_client, tmp_path) == []
    store.now_us += REAPED_KEPT_US + 1
    await store.reap()

    (line,) = await ledger(redis_client, tmp_path)

    assert (line.id, line.key, line.output_tokens, line.outcome) == ("r", "k_1", 40, "expired")


async def test_a_late_settlement_takes_the_place_of_the_expiry(
    redis_client: Redis, tmp_path: Path, store: ClockedStore
) -> None:
    """A gateway that was only slow is believed, and the request is in no bill twice."""
    store.now_us += LEASE_MS * 1000 + 1
    await store.reap()
    await store.settle("r", [TOKENS.costing(7)], USED)
    store.now_us += 2 * REAPED_KEPT_US
    await store.reap()

    assert [(line.output_tokens, line.outcome) for line in await ledger(redis_client, tmp_path)] == [(7, "ended")]
