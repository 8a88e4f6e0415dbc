"""Histories of calls that Hypothesis makes up, and the books that are kept of them by the contract alone.

Callers with an assured share, best-effort ones and ones that never borrow share a pool, and two of them an org's
window. Requests are admitted, extended, settled, repeated, or left to their leases; the clock steps both ways; limits
change; gateways lag behind; scopes are lost. The books know what each request has taken, never what a level is. With
them the machine holds every answer and every stored level against the obligations that it is named after.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from ratelimit.cell import OPEN, REAPED, REAPED_KEPT_US, TOMBSTONE_US
from ratelimit.meter import EXACT, GAUGE, Admitted, Bucket, Charge, Role, leaked, units_of
from tests.support.meters import POOL
from tests.support.players import Player

WINDOW_S = 60
LEASES_MS = st.sampled_from([5_000, 60_000])
STEPS_US = st.one_of(
    st.integers(0, 3_000_000),
    st.integers(-2_000_000, 200_000),
    st.sampled_from([1, 999, 30_000_000, WINDOW_S * 1_000_000, TOMBSTONE_US, REAPED_KEPT_US]),
)
COSTS = st.integers(0, 30)
#: The most tokens that a request may come to use.
MOST_USED = 60


def callers(scale: Fraction) -> dict[str, tuple[Charge, ...]]:
    """Each caller's charges, their leaky buckets at so much of their usual limits."""

    def leaky(bucket: str, capacity: int, rate: int, tick_us: int, role: Role, theta: int = 1000) -> Charge:
        return Charge(bucket, 0, int(capacity * scale), int(rate * scale), tick_us, role, 0, None, theta)

    window = Charge("o:x:t.5h", 0, 200, 0, window_s=WINDOW_S)
    return {
        "assured": (
            leaky("k:a:t", 20, 600, 1, Role.ASSURED),
            window,
            Charge("k:a:concurrency", 0, 3, 0),
            leaky("k:a:t.ceiling", 40, 1200, 1, Role.CEILING),
            leaky(POOL, 60, 1800, 1000, Role.POOL, 900),
        ),
        "best effort": (
            leaky("k:b:t", 30, 900, 1, Role.PLAIN),
            Charge("k:b:concurrency", 0, 5, 0),
            window,
            leaky(POOL, 60, 1800, 1000, Role.POOL, 500),
        ),
        "never borrows": (
            leaky("k:c:t", 25, 600, 1000, Role.PLAIN),
            Charge("k:c:concurrency", 0, 4, 0),
            leaky(POOL, 60, 1800, 1000, Role.COUNTED),
        ),
    }


class Request(NamedTuple):
    """A request as its gateway knows it."""

    name: str
    caller: str
    cost: int
    lease_ms: int


class Account:
    """One bucket's books since it came to be stored: what each request has taken of it, and what has been allowed.

    ``leaked`` and ``allowed`` are in level units. ``allowed`` is the bound at the last admission that had to fit, and
    ``then`` what each request had taken at that moment.
    """

    def __init__(self, bucket: Bucket, taken_before: dict[str, int], now_us: int, starts_full: bool) -> None:
        self.kind = bucket.kind
        self.before = dict(taken_before)
        self.born_us = self.latest_us = now_us
        self.units = units_of(bucket.kind)
        self.starts_at = bucket.capacity * self.units if starts_full else 0
        self.rate, self.capacity = bucket.rate, bucket.capacity
        self.tick = bucket.tick
        self.leaked = 0
        self.allowed: int | None = None
        self.then: dict[str, int] = {}

    def pass_to(self, now_us: int) -> None:
        """Time passes; a clock that steps back gives nothing."""
        latest_us = max(self.latest_us, now_us)
        if self.kind > 0:
            self.leaked += self.rate * (latest_us // self.kind - self.latest_us // self.kind)
        elif self.kind < 0:
            window_us = -self.kind * 1_000_000
            self.leaked = self.capacity * ((latest_us - self.born_us) // window_us)
        self.latest_us = latest_us

    def fitted(self, capacity: int, cost: int, taken: dict[str, int]) -> None:
        """A request of this cost was admitted because it fits; ``taken`` includes it."""
        self.allowed = (capacity + max(0, cost - capacity)) * self.units + self.leaked
        self.then = dict(taken)

    def total(self, taken: dict[str, int]) -> int:
        """All that was taken since the bucket came to be, in level units, with what it started with."""
        return self.starts_at + (sum(taken.values()) - sum(self.before.values())) * self.units

    def overruns(self, taken: dict[str, int]) -> int:
        """What requests have taken since the last admission that had to fit."""
        return sum(max(0, now - self.then.get(name, 0)) for name, now in taken.items()) * self.units


class Histories(RuleBasedStateMachine):
    """Any history."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.cell = self.player()
        self.scale = self.older = Fraction(1)
        self.epoch = 1
        self.names = 0
        self.taken: dict[str, dict[str, int]] = {}
        self.accounts: dict[str, Account] = {}
        self.holds: dict[str, dict[str, tuple[int, int]]] = {}
        self.answers: dict[str, Admitted] = {}
        self.open: set[str] = set()
        self.settled_us: dict[str, int] = {}
        self.lost: set[str] = set()
        self.stored: dict[str, Bucket] = {}

    def player(self) -> Player:
        """The cell that the history is played to."""
        raise NotImplementedError

    # The books. What is stored is read once after each call.

    def read(self, taken_before: dict[str, dict[str, int]]) -> None:
        """Note which buckets came to be, and which reservations ended with their leases."""
        before, self.stored = self.stored, self.cell.buckets()
        for name, bucket in self.stored.items():
            if name not in before:
                self.accounts[name] = Account(
                    bucket, taken_before.get(name, {}), self.cell.now_us, starts_full=name == POOL
                )
        for name, reservation in self.cell.reservations().items():
            if name in self.open and reservation.phase == REAPED:
                self.open.discard(name)
                self.holds[name] = {held: (left, left) for held, (_, left) in self.holds[name].items()}
                for held, (left, _) in self.holds[name].items():
                    self.take(held, name, left)

    def take(self, bucket: str, name: str, amount: int) -> None:
        """A request now has so much of a bucket in all."""
        self.taken.setdefault(bucket, {})[name] = amount

    def snapshot(self) -> dict[str, dict[str, int]]:
        """What was taken before a call."""
        return {bucket: dict(taken) for bucket, taken in self.taken.items()}

    def charges(self, request: Request, cost: int, scale: Fraction) -> tuple[Charge, ...]:
        """The request's charges at a cost; half of a leaky one stays if its lease ends."""
        return tuple(
            charge.costing(1) if charge.kind == GAUGE else charge.costing(cost, cost // 2)
            for charge in callers(scale)[request.caller]
        )

    def known(self, name: str) -> bool:
        """Whether the cell remembers the request."""
        if name in self.settled_us:
            return self.cell.now_us < self.settled_us[name] + TOMBSTONE_US
        return name in self.cell.reservations()

    # What happens.

    @rule(step_us=STEPS_US)
    def the_clock_steps(self, step_us: int) -> None:
        self.cell.now_us += step_us
        for account in self.accounts.values():
            account.pass_to(self.cell.now_us)

    @initialize(idle_us=st.sampled_from([0, 10_000_000]))
    def limits_are_published(self, idle_us: int) -> None:
        """The pool starts full, and is often drained before the first request."""
        self.limits_change(Fraction(1))
        self.the_clock_steps(idle_us)

    @rule(
        target=requests,
        caller=st.sampled_from(list(callers(Fraction(1)))),
        costs=st.lists(COSTS, min_size=1, max_size=4),
        lease_ms=LEASES_MS,
    )
    def requests_are_made(self, caller: str, costs: list[int], lease_ms: int) -> MultipleResults[Request]:
        """By one caller, at one instant."""
        made = [Request(f"r{self.names + i}", caller, cost, lease_ms) for i, cost in enumerate(costs)]
        self.names += len(made)
        for request in made:
            self.a_request_is_tried(request, lags=False)
        return multiple(*made)

    @rule(request=requests, lags=st.booleans())
    def a_request_is_tried(self, request: Request, lags: bool) -> None:
        """For the first time, again after a refusal, or by a gateway that has not heard the answer."""
        self.cell.reap(1_000)
        self.read(self.snapshot())
        if request.name in self.answers:
            self.repeated(request)
        elif request.name not in self.settled_us:
            charges = self.charges(request, request.cost, self.scale)
            lags = lags and all(charge.bucket in self.stored for charge in charges)
            told = self.charges(request, request.cost, self.older) if lags else charges
            self.tried(request, charges, told, self.epoch - 1 if lags else self.epoch)

    def repeated(self, request: Request) -> None:
        """Obligation 3: the same answer, and nothing changes."""
        if self.known(request.name):
            charges = self.charges(request, request.cost, self.scale)
            assert self.cell.admit(request.name, charges, self.epoch, request.lease_ms) == self.answers[request.name]
            assert self.cell.buckets() == self.stored

    def tried(self, request: Request, charges: tuple[Charge, ...], told: tuple[Charge, ...], epoch: int) -> None:
        """Obligations 2, 7 and 10: the answer that the levels alone give, and a charge to all buckets or none."""
        before = {c.bucket: self.as_it_is(c) for c in charges}
        fits = {c.bucket: self.fits(c, before[c.bucket]) for c in charges}
        green, admitted = verdict(charges, fits)
        taken = self.snapshot()
        answer = self.cell.admit(request.name, told, epoch, request.lease_ms)
        assert isinstance(answer, Admitted) is admitted, (answer, before)
        holds = {}
        if isinstance(answer, Admitted):
            assert answer.green is green
            self.answers[request.name] = answer
            self.open.add(request.name)
            holds = {c.bucket: (c.cost, c.at_reap) for c in told if c.role is not Role.ASSURED or green}
            self.holds[request.name] = holds
            for bucket, (cost, _) in holds.items():
                self.take(bucket, request.name, cost)
        else:
            named = next(c for c in charges if c.bucket == answer.bucket)
            assert not fits[answer.bucket]
            assert green is False or named.role is Role.PLAIN, "the pool refused a green request"
        self.read(taken)
        for charge in charges:
            held = holds.get(charge.bucket, (0, 0))[0]
            assert self.stored[charge.bucket].level == before[charge.bucket].level + held * charge.units
            if admitted and had_to_fit(charge, green):
                capacity = allowed_to_fill(charge)
                self.accounts[charge.bucket].fitted(capacity, charge.cost, self.taken[charge.bucket])

    def as_it_is(self, charge: Charge) -> Bucket:
        """The bucket as it must be now: obligation 13 has it that one which is not stored is unused, a pool's full."""
        stored = self.stored.get(charge.bucket)
        if stored is not None:
            return leaked(stored, self.cell.now_us)
        level = charge.capacity * charge.units if charge.bucket == POOL else 0
        return Bucket(level, 0, charge.rate, charge.capacity, 0, 0, 0, charge.kind)

    @staticmethod
    def fits(charge: Charge, bucket: Bucket) -> bool:
        """Room by the definition, in whole fractions of a token."""
        room = allowed_to_fill(charge) - Fraction(bucket.level, charge.units)
        return charge.cost == 0 if charge.capacity == 0 else room >= min(charge.cost, allowed_to_fill(charge))

    @rule(request=requests, used=st.integers(0, MOST_USED), lease_ms=LEASES_MS)
    def a_request_reports(self, request: Request, used: int, lease_ms: int) -> None:
        taken, usage = self.snapshot(), self.charges(request, used, self.scale)
        alive = request.name in self.holds and request.name not in self.settled_us and self.known(request.name)
        assert self.cell.extend(request.name, usage, lease_ms) is alive
        if alive:
            self.open.add(request.name)
            holds = self.holds[request.name]
            for charge in usage:
                if charge.bucket in holds:
                    holds[charge.bucket] = (charge.cost, charge.at_reap)
                    self.take(charge.bucket, request.name, charge.cost)
        self.read(taken)

    @rule(request=requests, used=st.integers(0, MOST_USED), times=st.integers(1, 2))
    def a_request_is_settled(self, request: Request, used: int, times: int) -> None:
        """By its gateway, or by two of them; the first one counts (obligation 3)."""
        for _ in range(times):
            self.settled_once(request, used)

    def settled_once(self, request: Request, used: int) -> None:
        taken, usage = self.snapshot(), self.charges(request, used, self.scale)
        first = request.name not in self.settled_us or not self.known(request.name)
        known = first and request.name in self.holds and self.known(request.name)
        assert self.cell.settle(request.name, usage) is first
        if first:
            name = request.name if known else f"{request.name}, unknown at {self.cell.now_us}, {len(self.settled_us)}"
            holds = self.holds.pop(request.name, {}) if known else {c.bucket: (0, 0) for c in usage}
            if not known:
                self.answers.pop(request.name, None)
            for charge in usage:
                if charge.bucket in holds and charge.kind != GAUGE:
                    self.take(charge.bucket, name, charge.cost)
            self.open.discard(request.name)
            self.settled_us[request.name] = self.cell.now_us
        self.read(taken)

    @rule(most=st.integers(1, 5))
    def leases_end(self, most: int) -> None:
        """Obligation 12: no reservation ends before its lease does."""
        taken = self.snapshot()
        self.cell.reap(most)
        self.read(taken)

    @rule(scale=st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(2)]))
    def limits_change(self, scale: Fraction) -> None:
        """Rate and capacity of every leaky bucket, at once; a clock that had stepped back is right again by then."""
        self.the_clock_steps(max([0, *(account.latest_us - self.cell.now_us for account in self.accounts.values())]))
        taken = self.snapshot()
        self.older, self.scale, self.epoch = self.scale, scale, self.epoch + 1
        charges = {c.bucket: c for all_of_one in callers(scale).values() for c in all_of_one if c.rate}
        self.cell.configure(list(charges.values()), self.epoch)
        self.read(taken)
        for name, charge in charges.items():
            account = self.accounts[name]
            account.rate, account.capacity = charge.rate, charge.capacity

    @rule(scope=st.sampled_from(["k:a", "k:b", "o:x", "pool"]))
    def a_scope_is_lost(self, scope: str) -> None:
        """It expired, or what was written last is gone; the reservations that hold of it are still there."""
        self.cell.lose(scope)
        self.lost.add(scope)
        self.accounts = {n: a for n, a in self.accounts.items() if n.rpartition(":")[0] != scope}
        self.stored = self.cell.buckets()

    # What must hold.

    @invariant()
    def obligation_01_no_more_was_taken_than_allowed(self) -> None:
        for name, account in self.accounts.items():
            taken = self.taken.get(name, {})
            if account.kind != GAUGE and account.allowed is not None:
                assert account.total(taken) <= account.allowed + account.overruns(taken), name

    @invariant()
    def obligation_04_no_level_is_negative_and_none_forgets(self) -> None:
        for name, account in self.accounts.items():
            level = self.stored[name].level
            assert 0 <= level < EXACT
            if account.kind != GAUGE:
                assert level >= account.total(self.taken.get(name, {})) - account.leaked, name

    @invariant()
    def obligation_06_no_bucket_goes_back_in_time(self) -> None:
        for name, account in self.accounts.items():
            assert self.stored[name].tick >= account.tick
            account.tick = self.stored[name].tick

    @invariant()
    def obligation_12_gauges_count_what_is_open(self) -> None:
        for name in ("k:a:concurrency", "k:b:concurrency", "k:c:concurrency"):
            level = self.stored[name].level if name in self.stored else 0
            in_flight = sum(name in self.holds[request] for request in self.open)
            assert level <= in_flight
            assert level == in_flight or name.rpartition(":")[0] in self.lost

    def teardown(self) -> None:
        """Obligation 12: when every lease is over, nothing is in flight, and after a while nothing is remembered."""
        latest_us = max([self.cell.now_us, *(account.latest_us for account in self.accounts.values())])
        self.cell.now_us = latest_us + 60_000_000 + TOMBSTONE_US
        self.cell.reap(1_000)
        assert not any(reservation.phase == OPEN for reservation in self.cell.reservations().values())
        assert all(not bucket.level for bucket in self.cell.buckets().values() if bucket.kind == GAUGE)
        self.cell.now_us += REAPED_KEPT_US
        self.cell.reap(1_000)
        assert not any(reservation.phase == REAPED for reservation in self.cell.reservations().values())
        self.cell.close()


def allowed_to_fill(charge: Charge) -> int:
    """How much of its bucket a charge may fill."""
    return charge.capacity * charge.borrow_up_to // 1000


def had_to_fit(charge: Charge, green: bool) -> bool:
    """Whether an admission of this colour went by the charge."""
    if charge.role in (Role.CEILING, Role.POOL):
        return not green
    return charge.role is Role.PLAIN or (charge.role is Role.ASSURED and green)


def verdict(charges: tuple[Charge, ...], fits: dict[str, bool]) -> tuple[bool, bool]:
    """Green or not, and admitted or not, from what fits alone."""
    by_role = {role: [fits[c.bucket] for c in charges if c.role is role] for role in Role}
    green = all(by_role[Role.ASSURED]) and (bool(by_role[Role.ASSURED]) or not by_role[Role.POOL])
    shared = all(by_role[Role.CEILING]) and all(by_role[Role.POOL])
    return green, all(by_role[Role.PLAIN]) and (green or shared)
