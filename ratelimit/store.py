"""The limiter of one cell, in Redis: each call is one script, so one decision and one round trip.

Redis's clock is the only one. Every key carries the cell's hash tag, and every key that a script touches is passed
to it, so a cell lives in one slot of a cluster. The rules are those of ``meter``.
"""

from __future__ import annotations

from collections.abc import Sequence

from redis.asyncio import Redis

from ratelimit.meter import Admitted, Charge, Denied, Reading


class StoreUnavailableError(RuntimeError):
    """Redis did not answer in time, or could not. The call may or may not have taken effect: repeat it, same id."""


class Store:
    """The meters and reservations of one cell of a pool."""

    def __init__(self, redis: Redis, cell: str, timeout_s: float) -> None:
        raise NotImplementedError

    async def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted | Denied:
        """Charge every bucket, or none."""
        raise NotImplementedError

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """Hold these amounts from now on, and renew the lease; False where nothing is open or reaped."""
        raise NotImplementedError

    async def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        """Correct the hold to what was used; False where it was settled before."""
        raise NotImplementedError

    async def reap(self, most: int = 100) -> int:
        """End up to ``most`` reservations whose lease is over; how many were."""
        raise NotImplementedError

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        """The buckets as they stand; nothing is written."""
        raise NotImplementedError
