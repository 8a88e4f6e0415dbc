"""The meter of a bucket, and the rule by which one admission decides over many. Exact integers, no clock of its own.

A meter is a *level* of use that leaks away at ``rate`` a minute. A request is admitted when its cost fits under
``capacity`` in the buckets it names, and is then charged; a level may exceed the capacity (*debt*), and later requests
wait for it. A level, unlike a refill time, keeps its debt when the rate changes.

**Units.** Time is counted in ticks of ``tick_us``, levels in 1/(ticks a minute) of a token, so that ``rate × ticks``
is an integer. All of it stays below 2⁵³, where Redis's Lua numbers (doubles) are exact, so ``scripts/*.lua`` and this
module agree to the bit. At 1 µs a bucket holds up to 150 million tokens, at 1 ms up to 150 thousand million.

**Kinds of bucket.** One with a rate *leaks*. One with a ``window_s`` is a *fixed window*: it opens at its first use and
``window_s`` later all of ``capacity`` is there again. One with neither is a *gauge*: what is in flight.

**Rules** (the Lua repeats them; ``tests/integration/test_store_model.py`` holds the two together)

1. Leak at the *stored* rate, then adopt the caller's rate and capacity unless its epoch is older. Time never
   moves back.
2. A cost fits if ``level + min(cost, capacity) <= capacity``: one larger than the bucket waits for it to be empty and
   leaves debt. A capacity of 0 admits nothing but cost 0.
3. Two colours. A request is *green* if all its ASSURED charges fit. Anything else *borrows*: its CEILING and POOL
   charges must fit, the POOL's under ``borrow_up_to`` thousandths of the capacity. PLAIN charges must fit for both.
4. Check all, then charge all or none: PLAIN, CEILING, POOL and COUNTED in any case, ASSURED if green. The same request
   id gets the same answer, for as long as it is remembered. A denial keeps leak, epoch and promise, never a charge.
5. A denial names the bucket with the longest wait; waiting exactly that long, alone, succeeds, and 1 µs less does not.
   A borrower waits for whichever comes first, its assured buckets or the shared ones, and is told its assured one. A
   gauge has no such time and is named, with no wait, only where no other is short. A bucket of capacity 0 is named
   before all others, with no wait: it will not come.
6. No herd. Who is told a time is promised the room that comes then, and whoever is refused after it is told the time
   at which its own cost has leaked away after that (``due``). The line starts anew when all who stand in it were
   admitted (``waiting``), when its end has passed, and when it is longer than ``SPREAD_US``. A lone caller always gets
   the exact time. Only buckets of one tenant have a line: whoever asks without end makes others wait in it.
7. A pool's bucket that is not stored starts full: Redis has lost it, and nobody knows what is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec

MINUTE_US = 60_000_000
#: Integers below this one are exact in a double.
EXACT = 2**53
#: The longest wait that is told, some 31 years: a bound that keeps times exact.
LONGEST_WAIT_US = 10**15
#: The longest fixed window: 31 days.
LONGEST_WINDOW_S = 31 * 86_400
#: Refused callers are told to come back within this of the exact time, one after the other.
SPREAD_US = 30_000_000
#: The epoch of limits that nobody published: any publication is newer.
NO_EPOCH = -1
#: The scope whose buckets start full and are never forgotten.
POOL_SCOPE = "pool"
#: What the scopes of one tenant's buckets begin with: a key's and an org's.
TENANT_SCOPES = ("k:", "o:")
#: ``borrow_up_to`` is counted in these parts of the capacity.
THOUSANDTHS = 1000
#: The kind of a gauge.
GAUGE = 0
#: Waits in a verdict that are none: the room will not come, and nobody knows when it does.
NEVER = EXACT
UNTOLD = -1


class Role(IntEnum):
    """What a charge is to the decision (rule 3)."""

    PLAIN = 0
    ASSURED = 1
    CEILING = 2
    POOL = 3
    COUNTED = 4


class _ChargeFields(NamedTuple):
    bucket: str
    cost: int
    capacity: int
    rate: int
    tick_us: int
    role: Role
    window_s: int
    at_reap: int
    borrow_up_to: int


class Charge(_ChargeFields):
    """What one request takes of one bucket, and that bucket's limits: ``rate`` a minute, ``capacity`` at once.

    ``bucket`` is "<scope>:<meter>"; the buckets of one scope are stored together. A rate of 0 makes it a gauge, or with
    ``window_s`` a fixed window. ``tick_us`` (1 or 1000) belongs to the bucket and never changes: 1000 is for large
    ones. ``at_reap`` of the cost stays charged if the lease ends (None: all). ``borrow_up_to`` is for a POOL charge.
    Raises ValueError for amounts that could not be counted exactly, and roles that do not fit the bucket.
    """

    __slots__ = ()

    def __new__(
        cls,
        bucket: str,
        cost: int,
        capacity: int,
        rate: int,
        tick_us: int = 1,
        role: Role = Role.PLAIN,
        window_s: int = 0,
        at_reap: int | None = None,
        borrow_up_to: int = THOUSANDTHS,
    ) -> Charge:
        _check_bucket(bucket, capacity, rate, tick_us, window_s)
        _check_role(bucket, rate, role, borrow_up_to)
        left = cost if at_reap is None else at_reap
        _check_costs(bucket, cost, left, rate, tick_us)
        return super().__new__(cls, bucket, cost, capacity, rate, tick_us, role, window_s, left, borrow_up_to)

    @property
    def kind(self) -> int:
        """The bucket's kind as it is stored: its tick in µs, 0 for a gauge, minus its length in s for a window."""
        return self.tick_us if self.rate else -self.window_s

    @property
    def units(self) -> int:
        """Level units of one token."""
        return units_of(self.kind)

    def costing(self, cost: int, at_reap: int | None = None) -> Charge:
        """The same bucket and limits at another cost: what ``extend`` and ``settle`` are told."""
        left = cost if at_reap is None else at_reap
        _check_costs(self.bucket, cost, left, self.rate, self.tick_us)
        bucket, _, capacity, rate, tick_us, role, window_s, _, borrow_up_to = self
        fields = (bucket, cost, capacity, rate, tick_us, role, window_s, left, borrow_up_to)
        return _ChargeFields.__new__(type(self), *fields)


def _check_bucket(bucket: str, capacity: int, rate: int, tick_us: int, window_s: int) -> None:
    scope, _, name = bucket.rpartition(":")
    if not scope or not name or name.startswith(".") or "\n" in bucket:
        raise ValueError(f"a bucket is named <scope>:<meter>, in one line, no dot before the meter, not {bucket!r}")
    if tick_us not in (1, 1000):
        raise ValueError(f"bucket {bucket}: a tick is 1 or 1000 µs, not {tick_us!r}")
    if type(window_s) is not int or not 0 <= window_s <= LONGEST_WINDOW_S or (rate and window_s):
        raise ValueError(f"bucket {bucket}: a window has 1 to {LONGEST_WINDOW_S} s and no rate, not {window_s!r}")
    _check_amount(bucket, "capacity", capacity, rate, tick_us)
    if type(rate) is not int or not 0 <= rate < EXACT:
        raise ValueError(f"bucket {bucket}: rate must be an integer from 0 to {EXACT - 1}, not {rate!r}")


def _check_role(bucket: str, rate: int, role: Role, borrow_up_to: int) -> None:
    if (role >= Role.POOL) is not bucket.startswith(POOL_SCOPE + ":"):
        raise ValueError(
            f"bucket {bucket}: the roles POOL and COUNTED are for the scope {POOL_SCOPE!r}, and it for them"
        )
    if role is not Role.PLAIN and not rate:
        raise ValueError(f"bucket {bucket}: {role.name} needs a bucket with a rate")
    if type(borrow_up_to) is not int or not 0 <= borrow_up_to <= THOUSANDTHS:
        raise ValueError(f"bucket {bucket}: borrow_up_to must be an integer from 0 to 1000, not {borrow_up_to!r}")


def _check_costs(bucket: str, cost: int, at_reap: int, rate: int, tick_us: int) -> None:
    _check_amount(bucket, "cost", cost, rate, tick_us)
    if type(at_reap) is not int or not 0 <= at_reap <= cost:
        raise ValueError(f"bucket {bucket}: at_reap must be an integer from 0 to the cost, not {at_reap!r}")


def _check_amount(bucket: str, name: str, value: int, rate: int, tick_us: int) -> None:
    largest = (EXACT - 1) // (MINUTE_US // tick_us if rate else 1)
    if type(value) is not int or not 0 <= value <= largest:
        hint = "; a tick of 1000 µs counts further" if tick_us == 1 and rate else ""
        raise ValueError(f"bucket {bucket}: {name} must be an integer from 0 to {largest}, not {value!r}{hint}")


class Admitted(NamedTuple):
    """The request may run. Per charge, in order: room left, and the time until the bucket is unused (gauges: 0)."""

    remaining: tuple[int, ...]
    reset_us: tuple[int, ...]
    green: bool = True


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
    """What is stored of a bucket: its level at a tick, and the limits of the newest epoch that it has seen.

    ``due`` is the tick at which the last one promised room is in, and has left no debt; ``waiting`` is how many were
    promised and not admitted since. A window's tick is the microsecond at which it opened, and its ``due`` what it took
    over from the window before.
    """

    level: int
    tick: int
    rate: int
    capacity: int
    epoch: int
    due: int
    waiting: int
    kind: int


class Verdict(NamedTuple):
    """What an admission comes to; for a denial the bucket named, the one that made the promise, and the wait."""

    green: bool
    named: int = -1
    promised: int = -1
    wait_us: int = UNTOLD


def units_of(kind: int) -> int:
    """Level units of one token: the ticks of a minute where it leaks, else 1."""
    return MINUTE_US // kind if kind > 0 else 1


def fresh(charge: Charge, now_us: int) -> Bucket:
    """A bucket that is not stored: unused, but for a pool's (rule 7)."""
    tick = now_us // charge.tick_us if charge.rate else now_us
    level = charge.capacity * charge.units if charge.role >= Role.POOL else 0
    return Bucket(level, tick, charge.rate, charge.capacity, NO_EPOCH, 0, 0, charge.kind)


def leaked(bucket: Bucket, now_us: int) -> Bucket:
    """A copy of the bucket at ``now_us``, leaked at its stored rate (rule 1)."""
    level, tick, rate, capacity, epoch, due, waiting, kind = msgspec.structs.astuple(bucket)
    if kind > 0:
        elapsed = max(0, now_us // kind - tick)
        level, tick = max(0, level - elapsed * rate), tick + elapsed
        if due <= tick:
            due = waiting = 0
    elif kind < 0:
        windows = max(0, now_us - tick) // (-kind * 1_000_000)
        level = max(0, level - windows * capacity)
        if windows:
            due = level
        tick = tick + windows * -kind * 1_000_000 if level else max(tick, now_us)
    return Bucket(level, tick, rate, capacity, epoch, due, waiting, kind)


def adopt(bucket: Bucket, charge: Charge, epoch: int) -> None:
    """Take over the limits of an epoch that is not older; debt stays (rule 1)."""
    if epoch < bucket.epoch:
        return
    if bucket.kind < 0:  # what was used within the old limit is no debt under a lower one
        within = min(bucket.level, bucket.capacity)
        bucket.level = bucket.level - within + min(within, charge.capacity)
    bucket.rate, bucket.capacity, bucket.epoch = charge.rate, charge.capacity, epoch


def shortfall(bucket: Bucket, charge: Charge) -> int:
    """Level units that must go before the cost fits; 0 where it fits (rules 2 and 3)."""
    capacity = capacity_for(bucket, charge)
    return max(0, bucket.level - (capacity - min(charge.cost, capacity)) * charge.units)


def capacity_for(bucket: Bucket, charge: Charge) -> int:
    """How much of the bucket this charge may fill, in tokens (rule 3)."""
    return bucket.capacity * charge.borrow_up_to // THOUSANDTHS


def told_wait_us(bucket: Bucket, charge: Charge, now_us: int) -> int | None:
    """How long this charge must wait; None where it fits, and marks for "will not come" and "nobody knows"."""
    short = shortfall(bucket, charge)
    if capacity_for(bucket, charge) == 0 and (charge.cost > 0 or (short and bucket.kind < 0)):
        return NEVER
    if short == 0:
        return None
    if bucket.kind == GAUGE:
        return UNTOLD
    return told_at_us(bucket, charge, short) - now_us


def told_at_us(bucket: Bucket, charge: Charge, short: int) -> int:
    """The moment told for a shortfall: the first at which it is gone, or the next in line after it (rule 6)."""
    kind = bucket.kind
    if kind < 0:
        windows = min(ceil_div(short, bucket.capacity), LONGEST_WAIT_US // (-kind * 1_000_000))
        return bucket.tick + windows * -kind * 1_000_000
    exact = bucket.tick + _ticks_to_leak(bucket, short)
    fits = min(charge.cost, capacity_for(bucket, charge))
    next_in_line = bucket.due + _ticks_to_leak(bucket, fits * charge.units) if bucket.due else 0
    return (next_in_line if exact < next_in_line <= exact + SPREAD_US // kind else exact) * kind


def promise(bucket: Bucket, charge: Charge, at_us: int) -> None:
    """Whoever is refused after this one is told a time after the room promised to it here (rule 6)."""
    if bucket.kind > 0 and charge.bucket.startswith(TENANT_SCOPES):
        debt = max(0, charge.cost - capacity_for(bucket, charge)) * charge.units
        bucket.due = at_us // bucket.kind + _ticks_to_leak(bucket, debt)
        bucket.waiting += 1


def _ticks_to_leak(bucket: Bucket, level: int) -> int:
    return min(ceil_div(level, bucket.rate), LONGEST_WAIT_US // bucket.kind)


def charged(bucket: Bucket, charge: Charge, green: bool) -> None:
    """Charge an admitted request; after the last who stood in line the line is gone (rules 4 and 6)."""
    if charge.role is Role.ASSURED and not green:
        return
    bucket.level = shifted(bucket.level, charge.cost * charge.units)
    had_to_fit = charge.cost > 0 and not (green and charge.role is Role.CEILING)
    if bucket.kind > 0 and had_to_fit:
        bucket.waiting = max(0, bucket.waiting - 1)
        bucket.due = bucket.due if bucket.waiting else 0


def refunded(bucket: Bucket, amount: int, opened: int) -> None:
    """Give back what was taken when the bucket's tick was ``opened``.

    A window that has opened since gives back what it took over, and nothing of its own.
    """
    if bucket.kind < 0 and bucket.tick != opened:
        amount = min(amount, bucket.due)
        bucket.due -= amount
    bucket.level = shifted(bucket.level, -amount * units_of(bucket.kind))


def decide(buckets: Sequence[Bucket], charges: Sequence[Charge], now_us: int) -> Verdict:
    """Rules 3 and 5: the colour of the request, or the bucket that refuses it."""
    plain, assured, shared = (-1, -2), (-1, -2), (-1, -2)
    has_assured = has_pool = False
    for i, (bucket, charge) in enumerate(zip(buckets, charges, strict=True)):
        has_assured |= charge.role is Role.ASSURED
        has_pool |= charge.role is Role.POOL
        if charge.role is Role.COUNTED or (wait_us := told_wait_us(bucket, charge, now_us)) is None:
            continue
        if charge.role is Role.PLAIN:
            plain = max(plain, (i, wait_us), key=_by_wait)
        elif charge.role is Role.ASSURED:
            assured = max(assured, (i, wait_us), key=_by_wait)
        else:
            shared = max(shared, (i, wait_us), key=_by_wait)
    green = assured[0] < 0 and (has_assured or not has_pool)
    if not green and shared[0] >= 0:
        first = min(assured, shared, key=_by_wait) if has_assured else shared
        if first[1] > plain[1]:
            return _refused(assured[0] if has_assured else shared[0], *first)
    return _refused(plain[0], *plain) if plain[0] >= 0 else Verdict(green)


def _by_wait(found: tuple[int, int]) -> int:
    return found[1]


def _refused(named: int, promised: int, wait_us: int) -> Verdict:
    return Verdict(False, named, promised, UNTOLD if wait_us == NEVER else wait_us)


def shifted(level: int, amount: int) -> int:
    """The level after a charge (or refund): never below 0, never beyond what is exact."""
    return min(max(level + amount, 0), EXACT - 1)


def remaining(bucket: Bucket) -> int:
    """Whole tokens of room."""
    per_token = units_of(bucket.kind)
    return max(0, bucket.capacity * per_token - bucket.level) // per_token


def reset_us(bucket: Bucket, now_us: int) -> int:
    """Time until nothing is used; 0 for an unused bucket and for a gauge."""
    if bucket.level == 0 or bucket.kind == GAUGE:
        return 0
    if bucket.kind < 0:
        window_us = -bucket.kind * 1_000_000
        most = LONGEST_WAIT_US // window_us
        windows = min(ceil_div(bucket.level, bucket.capacity), most) if bucket.capacity else most
        return bucket.tick + windows * window_us - now_us
    return (bucket.tick + _ticks_to_leak(bucket, bucket.level)) * bucket.kind - now_us


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)
