"""From a key's limits and a pool's budget to the charges that the store takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ratelimit.gateway.headers import Room
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.terms import Terms
from ratelimit.meter import Admitted, Charge, Denied
from ratelimit.publication import LimitName

POOL_BUCKET = "pool"
#: The pool's level is kept in milliseconds, a key's in microseconds: see ``meter``.
POOL_TICK_US = 1_000


def bucket_of(key_id: str, limit: LimitName) -> str:
    """The name of a key's bucket."""
    return f"k:{key_id}:{limit}"


def costs(usage: Usage, requests: int = 1) -> dict[str, int]:
    """What a request takes of each limit."""
    return {
        "requests": requests,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "concurrency": 1,
    }


def charges_for(key_id: str, terms: Terms, usage: Usage, pool_cost_us: int) -> tuple[Charge, ...]:
    """A request's charges: the key's limits in their published order, then the pool."""
    cost = costs(usage)
    keyed = [
        Charge(bucket_of(key_id, limit.name), cost[limit.name], limit.burst, limit.per_minute) for limit in terms.limits
    ]
    pool = terms.pool
    return (*keyed, Charge(POOL_BUCKET, pool_cost_us, pool.budget_burst, pool.budget_per_minute, POOL_TICK_US))


def used_charges(held: Sequence[Charge], usage: Usage, pool_cost_us: int, requests: int = 1) -> tuple[Charge, ...]:
    """The same charges at their true cost; the in-flight count is left to the store, which ends it."""
    cost = {**costs(usage, requests), POOL_BUCKET: pool_cost_us}
    return tuple(charge.costing(cost[charge.bucket.rpartition(":")[2]]) for charge in held if charge.rate)


def rooms(terms: Terms, answer: Admitted | Denied) -> tuple[Room, ...]:
    """What is left of each of the key's limits, by the store's answer."""
    told = zip(terms.limits, answer.remaining, answer.reset_us, strict=False)  # the pool comes last, and has no limit
    return tuple(Room(limit, remaining, reset_us) for limit, remaining, reset_us in told)
