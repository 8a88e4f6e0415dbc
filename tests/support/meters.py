"""Words for tests of meters: a start, a lease that outlives the test, one admission, one reading."""

from __future__ import annotations

from ratelimit.cell import Cell
from ratelimit.meter import Admitted, Bucket, Charge, Denied

START_US = 1_700_000_000_000_000
LONG_LEASE_MS = 600_000_000
POOL = "pool:work"


def take(cell: Cell, request_id: str, *charges: Charge, now_us: int = START_US, epoch: int = 1) -> Admitted | Denied:
    """Admit under a lease that outlives the test."""
    return cell.admit(request_id, charges, epoch, LONG_LEASE_MS, now_us)


def admitted(cell: Cell, request_id: str, *charges: Charge, now_us: int = START_US) -> Admitted:
    """As ``take``, and the test fails if it is refused."""
    answer = take(cell, request_id, *charges, now_us=now_us)
    assert isinstance(answer, Admitted), answer
    return answer


def denied(cell: Cell, request_id: str, *charges: Charge, now_us: int = START_US) -> Denied:
    """As ``take``, and the test fails if it is admitted."""
    answer = take(cell, request_id, *charges, now_us=now_us)
    assert isinstance(answer, Denied), answer
    return answer


def wait_us(cell: Cell, request_id: str, *charges: Charge, now_us: int = START_US) -> int:
    """The wait that a refused request is told."""
    told = denied(cell, request_id, *charges, now_us=now_us).wait_us
    assert told is not None
    return told


def used(cell: Cell, charge: Charge, now_us: int = START_US) -> int:
    """Tokens that a bucket counts as used."""
    return cell.peek([charge], now_us)[0].used


def limits(bucket: Bucket) -> tuple[int, int, int, int, int]:
    """What a bucket's rule 1 is about: level, tick, rate, capacity, epoch."""
    return bucket.level, bucket.tick, bucket.rate, bucket.capacity, bucket.epoch
