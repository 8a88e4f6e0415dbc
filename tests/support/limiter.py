"""Stores for tests that need no Redis: one that admits everything and is away on demand, one that decides for real."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ratelimit.cell import Cell
from ratelimit.meter import Admitted, Charge, Denied, Reading
from ratelimit.store import StoreUnavailableError
from ratelimit.usage import UsageRecord


class AwayLimiter:
    """Away for the first ``failures`` settlements, and for admissions while ``refusing``; remembers what it settled."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.refusing = False
        self.attempts = 0
        self.settled: list[dict[str, int]] = []
        self.records: list[UsageRecord] = []

    async def admit(
        self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int, memo: bytes = b""
    ) -> Admitted | Denied:
        """Admit in green."""
        if self.refusing:
            raise StoreUnavailableError("away")
        return Admitted((), ())

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """Agree to everything."""
        return True

    async def settle(self, request_id: str, usage: Sequence[Charge], record: bytes = b"") -> bool:
        """Remember the amounts by what they count, and the record."""
        self.attempts += 1
        if self.failures:
            self.failures -= 1
            raise StoreUnavailableError("away")
        self.settled.append({charge.bucket.rpartition(":")[2]: charge.cost for charge in usage})
        if record:
            self.records.append(msgspec.json.decode(record, type=UsageRecord))
        return True

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        """Nothing to read."""
        return ()

    async def wait_back(self, timeout_s: float) -> bool:
        """It never says that it is away."""
        return False


class CellLimiter:
    """A cell in memory behind the store's calls, at a time that the test sets; counts the calls, and may be ``away``.

    ``away`` is what to raise; calls that it fails leave no trace in the cell.
    """

    def __init__(self) -> None:
        self.cell = Cell()
        self.now_us = 1_700_000_000_000_000
        self.away: StoreUnavailableError | None = None
        self.calls: list[tuple[str, str]] = []
        self.extended: list[dict[str, Charge]] = []

    def _call(self, name: str, request_id: str) -> None:
        self.calls.append((name, request_id))
        if self.away is not None:
            raise self.away

    async def admit(
        self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int, memo: bytes = b""
    ) -> Admitted | Denied:
        """As ``Cell.admit``."""
        self._call("admit", request_id)
        return self.cell.admit(request_id, charges, epoch, lease_ms, self.now_us, memo)

    async def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int) -> bool:
        """As ``Cell.extend``."""
        self._call("extend", request_id)
        self.extended.append({charge.bucket: charge for charge in usage})
        return self.cell.extend(request_id, usage, lease_ms, self.now_us)

    async def settle(self, request_id: str, usage: Sequence[Charge], record: bytes = b"") -> bool:
        """As ``Cell.settle``."""
        self._call("settle", request_id)
        return self.cell.settle(request_id, usage, self.now_us, record)

    async def peek(self, charges: Sequence[Charge]) -> tuple[Reading, ...]:
        """As ``Cell.peek``."""
        self._call("peek", "")
        return self.cell.peek(charges, self.now_us)

    async def wait_back(self, timeout_s: float) -> bool:
        """It never says that it is away."""
        return False

    def used(self) -> dict[str, int]:
        """What each bucket is charged with now, in whole tokens rounded up."""
        return {name: -(-bucket.level // _units(bucket.kind)) for name, bucket in self.cell.buckets.items()}

    def records(self) -> list[UsageRecord]:
        """The usage records of what was settled."""
        return [msgspec.json.decode(entry.record, type=UsageRecord) for entry in self.cell.usage if entry.record]


def _units(kind: int) -> int:
    return 60_000_000 // kind if kind > 0 else 1
