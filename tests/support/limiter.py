"""A store for tests that need none: it admits everything, and is away on demand."""

from __future__ import annotations

from collections.abc import Sequence

from ratelimit.meter import Admitted, Charge, Denied, Reading
from ratelimit.store import StoreUnavailableError


class AwayLimiter:
    """Away for the first ``failures`` settlements, and for admissions while ``refusing``; remembers what it settled."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.refusing = False
        self.attempts = 0
        self.settled: list[dict[str, int]] = []

    async def admit(self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int) -> Admitted | Denied:
        if self.refusing:
            raise StoreUnavailableError("away")
        return Admitted((), ())

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        return True

    async def settle(self, request_id: str, usage: Sequence[Charge]) -> bool:
        self.attempts += 1
        if self.failures:
            self.failures -= 1
            raise StoreUnavailableError("away")
        self.settled.append({charge.bucket.rpartition(":")[2]: charge.cost for charge in usage})
        return True

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        return ()
