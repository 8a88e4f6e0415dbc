"""An assured caller beside a crowd that offers twenty times what the pool has: it is never refused, and goes first."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest
from redis.asyncio import Redis

from ratelimit.gateway.hold import Usage, pool_cost_us
from ratelimit.meter import Admitted, Charge, Denied, Role
from ratelimit.publication import TierLimits
from serving.capacity import merged_groups
from tests.integration.gateway_bench import Bench
from tests.support.books import ledger
from tests.support.callers import Load, ask
from tests.support.clocked_store import ClockedStore
from tests.support.gateway import MODEL, group, make_key

#: The pool's work a minute and at once, in units that a request costs one of; the crowd's part of it, in thousandths.
POOL_RATE, POOL_BURST, MAY_FILL = 600, 60, 800
TIMES = 20
SECOND_US = 1_000_000
#: At the gateway: an answer's tokens, what the assured caller may have a minute (the pool has twice that), and how long
#: the crowd takes to offer its twenty times where the machine is fast enough.
OUTPUT, OUTPUT_A_MINUTE, SECONDS = 8, 2_400, 2


def assured(cost: int = 1) -> tuple[Charge, ...]:
    """An assured caller's charges: half the pool is its own."""
    return (
        Charge("k:pro:output_tokens", cost, 20, POOL_RATE // 2, role=Role.ASSURED),
        Charge("k:pro:output_tokens.ceiling", cost, 40, POOL_RATE, role=Role.CEILING),
        Charge("pool:work", cost, POOL_BURST, POOL_RATE, 1000, Role.POOL, borrow_up_to=900),
    )


def borrower(number: int) -> tuple[Charge, ...]:
    """One of a crowd of whom each may have the whole pool, if nobody else needs it."""
    return (
        Charge(f"k:free-{number}:output_tokens", 1, 200, 10 * POOL_RATE),
        Charge("pool:work", 1, POOL_BURST, POOL_RATE, 1000, Role.POOL, borrow_up_to=MAY_FILL),
    )


@pytest.mark.parametrize("held", [1, 2])
async def test_green_is_never_refused_at_the_meter(redis_client: Redis, held: int) -> None:
    """Ten seconds of twenty times the pool's work, on real Redis: who asks at its assured rate is green every time,
    whatever it holds too much and gives back; the crowd gets what is left, and never fills what it may not.
    """
    store = ClockedStore(redis_client)
    a_second = POOL_RATE // 60
    answers: Counter[str] = Counter()
    await store.configure([assured()[-1]], 1)
    store.now_us += 60 * SECOND_US  # the new bucket, which is full, drains
    for step in range(10 * a_second):
        for number in range(TIMES):
            answer = await store.admit(f"free-{step}-{number}", borrower(number % 8), 1, 60_000)
            answers["borrowed" if isinstance(answer, Admitted) else "refused"] += 1
        if step % 2 == 0:
            green = await store.admit(f"pro-{step}", assured(held), 1, 60_000)
            assert isinstance(green, Admitted), green
            assert green.green
            await store.settle(f"pro-{step}", [charge.costing(1) for charge in assured()])
        (pool,) = await store.peek([assured()[-1]])
        assert pool.used <= POOL_BURST * MAY_FILL // 1000 + 20  # and the assured caller's burst
        store.now_us += SECOND_US // a_second
    left = POOL_BURST * MAY_FILL // 1000 + 10 * a_second // 2
    assert answers["borrowed"] == pytest.approx(left, abs=2)
    assert answers.total() == TIMES * 10 * a_second


async def test_the_reservation_of_a_borrower_that_is_refused_takes_nothing(redis_client: Redis) -> None:
    """A refusal of the crowd changes no level, so that refusing a million of them costs the assured caller nothing."""
    store = ClockedStore(redis_client)
    full = await store.peek([assured()[-1]])
    refusals = [await store.admit(f"free-{number}", borrower(number), 1, 60_000) for number in range(50)]
    assert {type(answer) for answer in refusals} == {Denied}
    assert await store.peek([assured()[-1]]) == full
    green = await store.admit("pro", assured(), 1, 60_000)
    assert isinstance(green, Admitted)
    assert green.green


def chat(stream: bool) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "x" * 44}], "max_tokens": OUTPUT, "stream": stream}


async def test_green_is_never_refused_at_the_gateway(bench: Bench) -> None:
    """The same through a gateway: no refusal of the assured caller, whose requests go to the engine before all that is
    borrowed; and the crowd is told that the fleet is short, with a time to come back at.
    """
    secret, free = make_key(tier="free")
    ceilings = {"output_tokens": (2 * OUTPUT_A_MINUTE, 20 * OUTPUT)}
    budget = work_us(bench) * OUTPUT_A_MINUTE // OUTPUT
    await bench.publish(
        None,
        free,
        pool_budget=(2 * budget, budget // 30),
        priority_scheduling=True,
        ceilings=ceilings,
        borrow_up_to=900,
        output_tokens=(OUTPUT_A_MINUTE, 10 * OUTPUT),
    )
    (tier,) = bench.published.tiers
    unlimited = tier.limits[:2] + tier.limits[3:]  # but for the pool
    best_effort = TierLimits("free", MODEL, 1, unlimited, priority=2, borrow_up_to=MAY_FILL, assured=False)
    await bench.republish(free, tiers=(tier, best_effort))
    asked = 0
    async with Load(bench.url, secret, 24, chat(stream=False)) as crowd:
        started_s = time.monotonic()
        while crowd.statuses.total() < TIMES * 2 * OUTPUT_A_MINUTE / OUTPUT / 60 * SECONDS:
            answer = await ask(bench.url, bench.secret, chat(stream=bool(asked % 2)))
            assert answer.status == 200, answer
            asked += 1
            await asyncio.sleep(max(0, started_s + asked * 60 * OUTPUT / OUTPUT_A_MINUTE - time.monotonic()))
    assert asked >= 5
    await bench.idle()
    lines = await ledger(bench.redis)
    assert {line.green for line in lines if line.tier == "pro"} == {True}
    assert {line.green for line in lines if line.tier == "free"} == {False}
    assert sum(line.tier == "pro" for line in lines) == asked
    assert Counter(body["priority"] for body in bench.upstream.bodies) == {0: asked, 1_002: crowd.statuses[200]}
    assert crowd.statuses.keys() == {200, 503}
    assert crowd.complaints == []


def work_us(bench: Bench) -> int:
    """What one of these requests costs of the pool."""
    return pool_cost_us(merged_groups((group(),)), Usage(15, OUTPUT), 1, 1)
