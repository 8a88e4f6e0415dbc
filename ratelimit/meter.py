"""The meter of a bucket, and the cell of meters that one admission decides over. Exact integers, no clock of its own.

A meter is a *level* of use that leaks away at ``rate`` a minute. A request is admitted when its cost fits under
``capacity`` in every bucket it names, and is then charged in all of them; a level may exceed the capacity (*debt*),
and later requests wait for it. A level, unlike a refill time, keeps its debt when the rate changes.

**Units.** Time is counted in ticks of ``tick_us``, levels in 1/(ticks a minute) of a token, so that ``rate × ticks``
is an integer. All of it stays below 2⁵³, where Redis's Lua numbers (doubles) are exact, so ``scripts/*.lua`` and this
module agree to the bit. At 1 µs a bucket holds up to 150 million tokens, at 1 ms up to 150 thousand million.

**Rules** (the Lua repeats them; ``tests/integration/test_store_model.py`` holds the two together)

1. Leak at the *stored* rate, then adopt the caller's rate and capacity if its epoch is newer. Time never moves back.
2. A cost fits if ``level + min(cost, capacity) <= capacity``: one larger than the bucket waits for it to be empty and
   leaves debt. A capacity of 0 admits nothing but cost 0.
3. Check all, then charge all or none. The same request id gets the same answer, for as long as it is remembered.
4. A denial names the bucket with the longest wait; waiting exactly that long, alone, succeeds, and 1 µs less does
   not. A *gauge* (rate 0: what is in flight) has no such time and is named, with no wait, only where no rated bucket
   is short. A bucket of capacity 0 is named before all others, with no wait: it will not come.
5. ``extend`` sets what is held, up (charged without asking) or down (given back), and renews the lease.
6. ``settle`` corrects the hold to what was used; the first one wins. Gauges are given back whole.
7. At the end of its lease a reservation is reaped: rated buckets stay charged with what is held, gauges are given
   back. A later ``extend`` opens it again, a later ``settle`` corrects it.
8. A reservation that is unknown is charged in full at ``settle``, in its rated buckets, and not at all at ``extend``.
   Settled and reaped ones are remembered for ``TOMBSTONE_US``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import msgspec

MINUTE_US = 60_000_000
#: Integers below this one are exact in a double.
EXACT = 2**53
#: The longest wait that is told, some 31 years: a bound that keeps times exact.
LONGEST_WAIT_US = 10**15
#: How long a settled or reaped reservation is remembered, so that a repeated call finds it.
TOMBSTONE_US = 120_000_000
#: Ended leases, and ended tombstones, that each admission clears away on its way.
REAPED_PER_ADMIT = 8
#: The epoch of limits that nobody published: any publication is newer.
NO_EPOCH = -1

OPEN, REAPED, SETTLED = 0, 1, 2


class _ChargeFields(NamedTuple):
    bucket: str
    cost: int
    capacity: int
    rate: int
    tick_us: int


class Charge(_ChargeFields):
    """What one request takes of one bucket, and that bucket's limits: ``rate`` a minute, ``capacity`` at once.

    A rate of 0 makes the bucket a gauge. ``tick_us`` (1 or 1000) belongs to the bucket and never changes: 1000 is
    for large ones. Raises ValueError for amounts that could not be counted exactly.
    """

    __slots__ = ()

    def __new__(cls, bucket: str, cost: int, capacity: int, rate: int, tick_us: int = 1) -> Charge:
        _check(bucket, cost, capacity, rate, tick_us)
        return super().__new__(cls, bucket, cost, capacity, rate, tick_us)

    @property
    def units(self) -> int:
        """Level units of one token: the ticks of a minute, or 1 for a gauge."""
        return MINUTE_US // self.tick_us if self.rate else 1

    def costing(self, cost: int) -> Charge:
        """The same bucket and limits at another cost: what ``extend`` and ``settle`` are told."""
        return Charge(self.bucket, cost, self.capacity, self.rate, self.tick_us)


def _check(bucket: str, cost: int, capacity: int, rate: int, tick_us: int) -> None:
    if tick_us not in (1, 1000):
        raise ValueError(f"bucket {bucket}: a tick is 1 or 1000 µs, not {tick_us!r}")
    largest = (EXACT - 1) // (MINUTE_US // tick_us if rate else 1)
    for name, value, bound in (("cost", cost, largest), ("capacity", capacity, largest), ("rate", rate, EXACT - 1)):
        if type(value) is not int or not 0 <= value <= bound:
            hint = "; a tick of 1000 µs counts further" if tick_us == 1 and name != "rate" else ""
            raise ValueError(f"bucket {bucket}: {name} must be an integer from 0 to {bound}, not {value!r}{hint}")


class Admitted(NamedTuple):
    """The request may run. Per charge, in order: room left, and the time until the bucket is unused (gauges: 0)."""

    remaining: tuple[int, ...]
    reset_us: tuple[int, ...]


class Denied(NamedTuple):
    """The request may not run. ``wait_us`` None: it waits for others to end (a gauge) or for a new limit."""

    bucket: str
    wait_us: int | None
    remaining: tuple[int, ...]
    reset_us: tuple[int, ...]


class Reading(NamedTuple):
    """A bucket as it stands: tokens used (rounded up), room left, microseconds until unused (gauges: 0)."""

    bucket: str
    used: int
    remaining: int
    reset_us: int


class Bucket(msgspec.Struct, array_like=True):
    """What is stored of a bucket: its level at a tick, and the limits of the newest epoch that it has seen."""

    level: int
    tick: int
    rate: int
    capacity: int
    epoch: int


class Reservation(msgspec.Struct, array_like=True):
    """What is stored of a request: its answer, and the tokens it holds of each rated bucket and of each gauge.

    A reaped reservation still lists the gauges it held, so that ``extend`` can take them again.
    """

    phase: int
    remaining: list[int]
    reset_us: list[int]
    rated: dict[str, int]
    gauges: dict[str, int]


def leaked(bucket: Bucket | None, charge: Charge, now_us: int) -> Bucket:
    """A copy of the bucket at ``now_us``, leaked at its stored rate; a bucket not stored is empty (rule 1)."""
    tick = now_us // charge.tick_us
    if bucket is None:
        return Bucket(0, tick, charge.rate, charge.capacity, NO_EPOCH)
    elapsed = max(0, tick - bucket.tick)
    level = max(0, bucket.level - elapsed * bucket.rate)
    return Bucket(level, bucket.tick + elapsed, bucket.rate, bucket.capacity, bucket.epoch)


def adopt(bucket: Bucket, charge: Charge, epoch: int) -> None:
    """Take over the limits of a newer epoch; the level, debt included, stays (rule 1)."""
    if epoch > bucket.epoch:
        bucket.rate, bucket.capacity, bucket.epoch = charge.rate, charge.capacity, epoch


def shortfall(bucket: Bucket, charge: Charge) -> int:
    """Level units that must leak away before the cost fits; 0 where it fits (rule 2)."""
    return max(0, bucket.level - (bucket.capacity - min(charge.cost, bucket.capacity)) * charge.units)


def leak_time_us(bucket: Bucket, charge: Charge, amount: int, now_us: int) -> int:
    """Time from ``now_us`` to the first tick at which ``amount`` level units have leaked away."""
    ticks = min(-(-amount // bucket.rate), LONGEST_WAIT_US // charge.tick_us)
    return (bucket.tick + ticks) * charge.tick_us - now_us


def shifted(level: int, amount: int) -> int:
    """The level after a charge (or refund): never below 0, never beyond what is exact."""
    return min(max(level + amount, 0), EXACT - 1)


def remaining(bucket: Bucket, charge: Charge) -> int:
    """Whole tokens of room."""
    return max(0, bucket.capacity * charge.units - bucket.level) // charge.units


def reset_us(bucket: Bucket, charge: Charge, now_us: int) -> int:
    """Time until nothing is used; 0 for an unused bucket and for a gauge."""
    if bucket.level == 0 or bucket.rate == 0:
        return 0
    return leak_time_us(bucket, charge, bucket.level, now_us)


def binding(buckets: Sequence[Bucket], charges: Sequence[Charge], now_us: int) -> tuple[int, int | None] | None:
    """Index and wait of the bucket that denies this request, None where every cost fits (rule 4)."""
    index, longest = -1, -2
    for i, (bucket, charge) in enumerate(zip(buckets, charges, strict=True)):
        if bucket.capacity == 0 and charge.cost > 0:
            wait = EXACT
        elif (short := shortfall(bucket, charge)) == 0:
            continue
        else:
            wait = leak_time_us(bucket, charge, short, now_us) if bucket.rate else -1
        if wait > longest:
            index, longest = i, wait
    if index < 0:
        return None
    return index, longest if 0 <= longest < EXACT else None


def check_charges(charges: Sequence[Charge]) -> None:
    """Raises ValueError where a bucket is named twice: one decision needs one cost for each."""
    names = [charge.bucket for charge in charges]
    if len(set(names)) != len(names):
        raise ValueError(f"each bucket may be named once in a call, not {names}")
