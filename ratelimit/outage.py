"""What a gateway may admit by itself while Redis is away, so that all gateways together stay within the limits. Pure.

Each of N live gateways takes ``SAFE_SHARE``/N of every limit of an assured caller: of its rate, of what may come at
once, and of what may be in flight. Levels are kept from one outage to the next, so that a Redis that comes and goes
gives nobody a new burst each time. What was admitted here is charged in Redis when it is back.

The bound: from the beginning of an outage all gateways together admit at most SAFE_SHARE × (burst + rate × time) of
each bucket, and one request beyond its share each, where that one alone is larger than the share. Tiers that nothing is
assured to are not served, nor is anybody by a gateway that does not know how many others there are. The pool is not
asked: what is assured is never more than it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ratelimit.cell import Cell
from ratelimit.meter import Admitted, Charge, Denied, Role

#: The part of the limits that gateways give out by themselves: the rest is for gateways that nobody has counted yet.
SAFE_SHARE = Fraction(4, 5)
#: After so long without an outage what was admitted in the last one is forgotten here; Redis has charged it.
FORGET_AFTER_US = 600_000_000


def safe_amount(amount: int, gateways: int) -> int:
    """One gateway's part of a limit, rounded down."""
    return int(amount * SAFE_SHARE) // gateways


def safe_charges(charges: Sequence[Charge], gateways: int) -> tuple[Charge, ...]:
    """The charges of an assured request against one gateway's part of its limits, in their order; no other buckets.

    What a caller may borrow up to is no part of what it is assured, nor is the pool.
    """
    return tuple(_reduced(charge, gateways) for charge in charges if charge.role in (Role.PLAIN, Role.ASSURED))


def _reduced(charge: Charge, gateways: int) -> Charge:
    # A rate that rounds down to 0 would make a gauge of the bucket: its part is a capacity that never comes back.
    rate = max(1, safe_amount(charge.rate, gateways)) if charge.rate else 0
    capacity = safe_amount(charge.capacity, gateways)
    return Charge(charge.bucket, charge.cost, capacity, rate, charge.tick_us, Role.PLAIN, charge.window_s)


class LocalLimits:
    """The levels of one cell's buckets as this gateway alone has used them while Redis was away."""

    def __init__(self) -> None:
        self._cell = Cell()
        self._used_us: int | None = None
        self._epoch = 0

    def admit(
        self, request_id: str, charges: Sequence[Charge], gateways: int, lease_ms: int, now_us: int
    ) -> Admitted | Denied:
        """Decide by this gateway's part of the limits; ``now_us`` is a clock that never steps back."""
        if self._used_us is not None and now_us - self._used_us > FORGET_AFTER_US:
            self._cell = Cell()
        self._used_us = now_us
        # The number of gateways changes the limits as a publication does, so each call's are newer than the last.
        self._epoch += 1
        return self._cell.admit(request_id, safe_charges(charges, gateways), self._epoch, lease_ms, now_us)

    def settle(self, request_id: str, used: Sequence[Charge], now_us: int) -> None:
        """Correct what a request admitted here holds to what it used."""
        self._used_us = now_us
        self._cell.settle(request_id, safe_charges(used, 1), now_us)
        self._cell.reservations.pop(request_id, None)  # nobody settles it twice, so it need not be remembered
