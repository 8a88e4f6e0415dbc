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

from collections.abc import Sequence
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


def readings(
    buckets: Sequence[Bucket], charges: Sequence[Charge], now_us: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Room left and time until unused, per charge."""
    pairs = list(zip(buckets, charges, strict=True))
    return tuple(remaining(*pair) for pair in pairs), tuple(reset_us(*pair, now_us) for pair in pairs)


def check_charges(charges: Sequence[Charge]) -> None:
    """Raises ValueError where a bucket is named twice: one decision needs one cost for each."""
    names = [charge.bucket for charge in charges]
    if len(set(names)) != len(names):
        raise ValueError(f"each bucket may be named once in a call, not {names}")


def check_terms(epoch: int, lease_ms: int) -> None:
    """Raises ValueError for an epoch or a lease that could not be kept exactly."""
    if type(epoch) is not int or not 0 <= epoch < EXACT:
        raise ValueError(f"an epoch is an integer from 0 to {EXACT - 1}, not {epoch!r}")
    if type(lease_ms) is not int or not 0 < lease_ms <= LONGEST_WAIT_US // 1000:
        raise ValueError(f"a lease is an integer from 1 to {LONGEST_WAIT_US // 1000} ms, not {lease_ms!r}")


class Cell:
    """The meters and reservations of one cell, in memory: the reference that the Lua scripts must equal.

    Load tests replay schedules through it. ``now_us`` is the caller's clock and may step back.
    """

    def __init__(self) -> None:
        self.rated: dict[str, Bucket] = {}
        self.gauges: dict[str, Bucket] = {}
        self.reservations: dict[str, Reservation] = {}
        self.leases = _Deadlines()
        self.tombstones = _Deadlines()

    def admit(
        self, request_id: str, charges: Sequence[Charge], epoch: int, lease_ms: int, now_us: int
    ) -> Admitted | Denied:
        """Charge every bucket, or none; the same request id gets the same answer."""
        check_charges(charges)
        check_terms(epoch, lease_ms)
        self.reap(now_us, REAPED_PER_ADMIT)
        known = self.reservations.get(request_id)
        if known is not None and (known.remaining or not charges):
            return Admitted(tuple(known.remaining), tuple(known.reset_us))
        buckets = [leaked(self._stored(charge), charge, now_us) for charge in charges]
        for bucket, charge in zip(buckets, charges, strict=True):
            adopt(bucket, charge, epoch)
        if known is not None:  # settled before it was admitted: it has paid
            return Admitted(*readings(buckets, charges, now_us))
        short = binding(buckets, charges, now_us)
        if short is None:
            for bucket, charge in zip(buckets, charges, strict=True):
                bucket.level = shifted(bucket.level, charge.cost * charge.units)
        room, reset = readings(buckets, charges, now_us)
        if short is None:
            rated = {charge.bucket: charge.cost for charge in charges if charge.rate}
            gauges = {charge.bucket: charge.cost for charge in charges if not charge.rate}
            self.reservations[request_id] = Reservation(OPEN, list(room), list(reset), rated, gauges)
            self.leases.set(request_id, now_us + lease_ms * 1000)
        for bucket, charge in zip(buckets, charges, strict=True):
            self._keep(bucket, charge)
        if short is None:
            return Admitted(room, reset)
        return Denied(charges[short[0]].bucket, short[1], room, reset)

    def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int, now_us: int) -> bool:
        """Hold these amounts from now on, and renew the lease; False where the request is unknown or settled."""
        check_charges(usage)
        check_terms(0, lease_ms)
        known = self.reservations.get(request_id)
        if known is None or known.phase == SETTLED:
            return False
        if known.phase == REAPED:
            for gauge, held in known.gauges.items():
                self._shift(Charge(gauge, 0, 0, 0), held, now_us)
        for charge in usage:
            holds = known.rated if charge.rate else known.gauges
            self._shift(charge, charge.cost - holds.get(charge.bucket, 0), now_us)
            holds[charge.bucket] = charge.cost
        known.phase = OPEN
        self.tombstones.drop(request_id)
        self.leases.set(request_id, now_us + lease_ms * 1000)
        return True

    def settle(self, request_id: str, usage: Sequence[Charge], now_us: int) -> bool:
        """Correct the hold to what was used and give gauges back; False where it was settled before."""
        check_charges(usage)
        known = self.reservations.get(request_id, Reservation(REAPED, [], [], {}, {}))
        if known.phase == SETTLED:
            return False
        if known.phase == OPEN:
            self._give_back(known.gauges, now_us)
        for charge in usage:
            if charge.rate:
                self._shift(charge, charge.cost - known.rated.get(charge.bucket, 0), now_us)
        self.reservations[request_id] = Reservation(SETTLED, known.remaining, known.reset_us, {}, {})
        self.leases.drop(request_id)
        self.tombstones.set(request_id, now_us + TOMBSTONE_US)
        return True

    def reap(self, now_us: int, most: int = 100) -> int:
        """End up to ``most`` reservations whose lease is over, forget as many old ones; how many were ended."""
        for request_id in self.tombstones.due(now_us, most):
            del self.reservations[request_id]
        ended = self.leases.due(now_us, most)
        for request_id in ended:
            reservation = self.reservations[request_id]
            self._give_back(reservation.gauges, now_us)
            reservation.phase = REAPED
            self.tombstones.set(request_id, now_us + TOMBSTONE_US)
        return len(ended)

    def peek(self, charges: Sequence[Charge], now_us: int) -> tuple[Reading, ...]:
        """The buckets as they stand, under the limits that the charges state; nothing is changed."""
        found = []
        for charge in charges:
            bucket = leaked(self._stored(charge), charge, now_us)
            bucket.rate, bucket.capacity = charge.rate, charge.capacity
            used = -(-bucket.level // charge.units)
            found.append(Reading(charge.bucket, used, remaining(bucket, charge), reset_us(bucket, charge, now_us)))
        return tuple(found)

    def _stored(self, charge: Charge) -> Bucket | None:
        return (self.rated if charge.rate else self.gauges).get(charge.bucket)

    def _keep(self, bucket: Bucket, charge: Charge) -> None:
        """Store a bucket; a gauge at 0 says nothing and is dropped."""
        if charge.rate:
            self.rated[charge.bucket] = bucket
        elif bucket.level:
            self.gauges[charge.bucket] = bucket
        else:
            self.gauges.pop(charge.bucket, None)

    def _shift(self, charge: Charge, amount: int, now_us: int) -> None:
        """Charge or refund without asking. A bucket that is not stored has nothing to refund."""
        stored = self._stored(charge)
        if amount == 0 or (stored is None and amount < 0):
            return
        bucket = leaked(stored, charge, now_us)
        bucket.level = shifted(bucket.level, amount * charge.units)
        self._keep(bucket, charge)

    def _give_back(self, gauges: dict[str, int], now_us: int) -> None:
        for gauge, held in gauges.items():
            self._shift(Charge(gauge, 0, 0, 0), -held, now_us)


class _Deadlines:
    """A sorted set of deadlines by request id, as Redis keeps one: earliest first, ties by id."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def set(self, request_id: str, deadline_us: int) -> None:
        self.at[request_id] = deadline_us
        heappush(self._heap, (deadline_us, request_id))

    def drop(self, request_id: str) -> None:
        self.at.pop(request_id, None)

    def due(self, now_us: int, most: int) -> list[str]:
        """Take out up to ``most`` that are over. Entries of the heap that were moved or dropped since are skipped."""
        found: list[str] = []
        while self._heap and self._heap[0][0] <= now_us and len(found) < most:
            deadline_us, request_id = heappop(self._heap)
            if self.at.get(request_id) == deadline_us:
                del self.at[request_id]
                found.append(request_id)
        return found
