"""A cell of meters and reservations in memory: the reference that the Lua scripts must equal, call by call.

Load tests replay schedules through it, and a gateway decides by one while Redis is away.

**The life of a reservation** (``admit`` decides by the rules of ``meter``)

1. ``extend`` sets what is held, up (charged without asking) or down (given back), and renews the lease. Buckets that
   the request does not hold are left alone.
2. ``settle`` corrects the hold to what was used; the first one wins. Gauges are given back whole.
3. At the end of its lease a reservation is reaped: each bucket stays charged with the hold's ``at_reap``, gauges are
   given back. A later ``extend`` opens it again, a later ``settle`` corrects it. ``REAPED_KEPT_US`` later it is
   forgotten, with a usage record that says so.
4. A reservation that is unknown is charged in full at ``settle``, but for its gauges, and not at all at ``extend``.
   Settled ones are remembered for ``TOMBSTONE_US``.
5. What a fixed window held is given back to a later one only as far as that took it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import msgspec

from ratelimit.meter import (
    EXACT,
    GAUGE,
    LONGEST_WAIT_US,
    NO_EPOCH,
    Admitted,
    Bucket,
    Charge,
    Denied,
    Reading,
    Role,
    adopt,
    ceil_div,
    charged,
    decide,
    fresh,
    leaked,
    promise,
    refunded,
    remaining,
    reset_us,
    shifted,
)

#: How long a settled reservation is remembered, so that a repeated call finds it.
TOMBSTONE_US = 120_000_000
#: How long a reaped one is: its gateway may be cut off from Redis, and settle when it is back.
REAPED_KEPT_US = 900_000_000
#: Ended leases that each admission clears away on its way.
REAPED_PER_ADMIT = 8

OPEN, REAPED, SETTLED = 0, 1, 2


class Hold(msgspec.Struct):
    """What a request holds of a bucket, what of it stays if its lease ends, and of what kind the bucket is.

    ``opened`` is the bucket's tick when it was taken: it tells a fixed window from a later one.
    """

    held: int
    at_reap: int
    opened: int
    kind: int


class Reservation(msgspec.Struct):
    """What is stored of a request: its answer, and what it holds by bucket. ``remaining`` is None before admission.

    A settled one is forgotten at ``forget_us``; the others have a deadline in ``leases``.
    """

    phase: int
    forget_us: int
    memo: bytes
    green: bool
    remaining: tuple[int, ...] | None
    reset_us: tuple[int, ...]
    holds: dict[str, Hold]


class UsageEntry(NamedTuple):
    """What the usage stream gets: a settlement's record, or an expired reservation's memo and what stays charged."""

    record: bytes = b""
    expired: bytes = b""
    held: tuple[tuple[str, int], ...] = ()


class Cell:
    """The meters and reservations of one cell. ``now_us`` is the caller's clock and may step back."""

    def __init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.reservations: dict[str, Reservation] = {}
        self.leases = Deadlines()
        self.usage: list[UsageEntry] = []

    def admit(
        self,
        request_id: str,
        charges: Sequence[Charge],
        epoch: int,
        lease_ms: int,
        now_us: int,
        memo: bytes = b"",
    ) -> Admitted | Denied:
        """Charge the buckets, or none; the same request id gets the same answer."""
        check_charges(charges)
        check_terms(epoch, lease_ms)
        self.reap(now_us, REAPED_PER_ADMIT)
        known = self._known(request_id, now_us)
        if known is not None and known.remaining is not None:
            return Admitted(known.remaining, known.reset_us, known.green)
        buckets = [self._current(charge, now_us) for charge in charges]
        for bucket, charge in zip(buckets, charges, strict=True):
            adopt(bucket, charge, epoch)
        if known is not None:  # settled before it was admitted: it has paid
            return Admitted(*_readings(buckets, now_us), green=False)
        verdict = decide(buckets, charges, now_us)
        if verdict.named < 0:
            for bucket, charge in zip(buckets, charges, strict=True):
                charged(bucket, charge, verdict.green)
        elif verdict.wait_us >= 0:
            promised = buckets[verdict.promised]
            promise(promised, charges[verdict.promised], now_us + verdict.wait_us)
        room, reset = _readings(buckets, now_us)
        for bucket, charge in zip(buckets, charges, strict=True):
            self.buckets[charge.bucket] = bucket
        if verdict.named >= 0:
            wait_us = None if verdict.wait_us < 0 else verdict.wait_us
            return Denied(charges[verdict.named].bucket, wait_us, room, reset)
        holds = {
            charge.bucket: Hold(charge.cost, charge.at_reap, bucket.tick, charge.kind)
            for bucket, charge in zip(buckets, charges, strict=True)
            if charge.role is not Role.ASSURED or verdict.green
        }
        self.reservations[request_id] = Reservation(OPEN, 0, memo, verdict.green, room, reset, holds)
        self.leases.set(request_id, now_us + lease_ms * 1000)
        return Admitted(room, reset, verdict.green)

    def extend(self, request_id: str, usage: Sequence[Charge], lease_ms: int, now_us: int) -> bool:
        """Hold these amounts from now on, and renew the lease; False where the request is unknown or settled."""
        check_charges(usage)
        check_terms(0, lease_ms)
        known = self._known(request_id, now_us)
        if known is None or known.phase == SETTLED:
            return False
        if known.phase == REAPED:
            self._shift_gauges(known, +1, now_us)
        for charge in usage:
            hold = known.holds.get(charge.bucket)
            if hold is not None:
                self._correct(charge, hold, now_us)
                hold.held, hold.at_reap = charge.cost, charge.at_reap
        known.phase = OPEN
        self.leases.set(request_id, now_us + lease_ms * 1000)
        return True

    def settle(self, request_id: str, usage: Sequence[Charge], now_us: int, record: bytes = b"") -> bool:
        """Correct the hold to what was used and give gauges back; False where it was settled before."""
        check_charges(usage)
        known = self._known(request_id, now_us)
        if known is not None and known.phase == SETTLED:
            return False
        if known is None:
            known = Reservation(SETTLED, 0, b"", False, None, (), {})
            for charge in usage:
                if charge.kind != GAUGE:
                    self._charge_unasked(charge, charge.cost, now_us)
        else:
            self._settle_holds(known, usage, now_us)
        known.phase, known.forget_us, known.memo, known.holds = SETTLED, now_us + TOMBSTONE_US, b"", {}
        self.reservations[request_id] = known
        self.leases.drop(request_id)
        if record:
            self.usage.append(UsageEntry(record))
        return True

    def reap(self, now_us: int, most: int = 100) -> int:
        """End reservations whose lease is over, and forget those reaped long ago: up to ``most``; how many it did."""
        due = self.leases.due(now_us, most)
        for request_id in due:
            reservation = self.reservations[request_id]
            if reservation.phase == REAPED:
                self._forget(request_id, reservation)
            else:
                self._end(reservation, now_us)
                self.leases.set(request_id, now_us + REAPED_KEPT_US)
        return len(due)

    def _end(self, reservation: Reservation, now_us: int) -> None:
        self._shift_gauges(reservation, -1, now_us)
        for name, hold in reservation.holds.items():
            if hold.kind != GAUGE:
                self._refund(name, hold, hold.held - hold.at_reap, now_us)
                hold.held = hold.at_reap
        reservation.phase = REAPED

    def _forget(self, request_id: str, reservation: Reservation) -> None:
        held = tuple((name, hold.held) for name, hold in reservation.holds.items() if hold.kind != GAUGE)
        self.usage.append(UsageEntry(expired=reservation.memo, held=held))
        del self.reservations[request_id]

    def configure(self, charges: Sequence[Charge], epoch: int, now_us: int) -> None:
        """Put limits in force in these buckets at once, where the epoch is newer than theirs."""
        check_charges(charges)
        check_terms(epoch, 1)
        for charge in charges:
            bucket = self._current(charge, now_us)
            adopt(bucket, charge, epoch)
            self.buckets[charge.bucket] = bucket

    def peek(self, charges: Sequence[Charge], now_us: int) -> tuple[Reading, ...]:
        """The buckets as they stand, under the limits that the charges state; nothing is changed."""
        found = []
        for charge in charges:
            bucket = self._current(charge, now_us)
            bucket.rate, bucket.capacity = charge.rate, charge.capacity
            used = ceil_div(bucket.level, charge.units)
            found.append(Reading(charge.bucket, used, remaining(bucket), reset_us(bucket, now_us)))
        return tuple(found)

    def _known(self, request_id: str, now_us: int) -> Reservation | None:
        known = self.reservations.get(request_id)
        if known is not None and known.phase == SETTLED and known.forget_us <= now_us:
            return None
        return known

    def _current(self, charge: Charge, now_us: int) -> Bucket:
        stored = self.buckets.get(charge.bucket)
        return fresh(charge, now_us) if stored is None else leaked(stored, now_us)

    def _settle_holds(self, known: Reservation, usage: Sequence[Charge], now_us: int) -> None:
        if known.phase == OPEN:
            self._shift_gauges(known, -1, now_us)
        for charge in usage:
            hold = known.holds.get(charge.bucket)
            if hold is not None and charge.kind != GAUGE:
                self._correct(charge, hold, now_us)

    def _correct(self, charge: Charge, hold: Hold, now_us: int) -> None:
        """Charge what is more than held, or give back what is less."""
        if charge.cost >= hold.held:
            self._charge_unasked(charge, charge.cost - hold.held, now_us)
        else:
            self._refund(charge.bucket, hold, hold.held - charge.cost, now_us)

    def _charge_unasked(self, charge: Charge, amount: int, now_us: int) -> None:
        if amount:
            bucket = self._current(charge, now_us)
            bucket.level = shifted(bucket.level, amount * charge.units)
            self.buckets[charge.bucket] = bucket

    def _refund(self, name: str, hold: Hold, amount: int, now_us: int) -> None:
        """Give back to a bucket that is stored (rule 5)."""
        stored = self.buckets.get(name)
        if stored is None or amount == 0:
            return
        bucket = leaked(stored, now_us)
        refunded(bucket, amount, hold.opened)
        self.buckets[name] = bucket

    def _shift_gauges(self, reservation: Reservation, sign: int, now_us: int) -> None:
        """Take or give back what a request has in flight; a gauge that was lost has nothing to give back."""
        for name, hold in reservation.holds.items():
            stored = self.buckets.get(name)
            if hold.kind != GAUGE or (stored is None and sign < 0):
                continue
            bucket = stored or Bucket(0, now_us, 0, 0, NO_EPOCH, 0, 0, GAUGE)
            self.buckets[name] = msgspec.structs.replace(bucket, level=shifted(bucket.level, sign * hold.held))


def _readings(buckets: Sequence[Bucket], now_us: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Room left and time until unused, per bucket."""
    return tuple(map(remaining, buckets)), tuple(reset_us(bucket, now_us) for bucket in buckets)


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


class Deadlines:
    """A sorted set of deadlines by request id, as Redis keeps one: earliest first, ties by id."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def set(self, request_id: str, deadline_us: int) -> None:
        """Give a request a deadline, in place of the one it had."""
        self.at[request_id] = deadline_us
        heappush(self._heap, (deadline_us, request_id))

    def drop(self, request_id: str) -> None:
        """Forget a request's deadline, if it has one."""
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
