"""Who is throttled, and by how much: the limiter's rules as a fluid. Pure.

Requests flow at piecewise constant rates. In a bin of ``dt`` seconds a bucket of rate r, burst b and level l takes

    r·dt + b − l        of its unit, and ends at max(0, l + taken − r·dt)

which is exact for a fluid within a bin. The rules are those of ``meter``: what fits the assured buckets is green and is
charged to the pool unconditionally; the rest borrows, in the order of what its tier may fill of the pool's bucket, up
to its own ceiling, its tier's, and that part of the bucket; callers of one rank share what is left in proportion to
what they ask. Many buckets of one kind of key are one, times the number of keys.

What a fluid does not see: single requests, so neither chance within a bin nor sizes other than the mean one; holds that
are larger than what is used; and callers who ask again. Its shares are therefore of the work asked for: of the requests
fewer are refused, since small ones pass more easily. ``tested`` says how far it was held against the exact meter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ratelimit.meter import THOUSANDTHS
from ratelimit.policy import LimitName
from ratelimit.publication import Limit, PublishedPool, TierLimits

Array = NDArray[np.float64]

_NAMES: tuple[LimitName, ...] = ("requests", "input_tokens", "output_tokens", "concurrency")
_MICROSECONDS = 1e6


class Meter(NamedTuple):
    """A bucket: what it takes a second, and at once."""

    per_s: float
    burst: float


class PoolMeter(NamedTuple):
    """The pool's bucket, in replica-seconds a second and at once."""

    per_s: float
    burst: float


class Callers(msgspec.Struct, frozen=True):
    """Keys of one tier that ask alike. Meters are one key's, ``shared`` ones all the tier's.

    ``sizes`` is what a mean request takes of each limit (of ``concurrency``: the seconds that it is in flight), and
    ``cost_s`` what it costs the pool, in replica-seconds. ``borrow_up_to``: the share of the pool's bucket that they
    may fill with borrowed work. ``promised``: without assured meters, what fits the plain ones is green.
    """

    tier: str
    keys: int
    sizes: Mapping[LimitName, float]
    cost_s: float
    plain: Mapping[LimitName, Meter]
    assured: Mapping[LimitName, Meter] = {}
    ceilings: Mapping[LimitName, Meter] = {}
    shared: Mapping[LimitName, Meter] = {}
    borrow_up_to: float = 0.0
    promised: bool = True


class Served(NamedTuple):
    """What was admitted in a bin, in requests of each kind of callers: within what is assured, and borrowed."""

    green: Array
    borrowed: Array


def pool_meter(pool: PublishedPool) -> PoolMeter:
    """The published budget as a meter."""
    return PoolMeter(pool.budget_per_minute / 60 / _MICROSECONDS, pool.budget_burst / _MICROSECONDS)


def serves(pool: PublishedPool) -> bool:
    """Whether the pool gives anything out. In one that does, a tier without limits borrows, bounded by the pool."""
    return bool(pool.groups) and pool.budget_per_minute > 0


def callers_of(
    pool: PublishedPool, limits: TierLimits, keys: int, sizes: Mapping[LimitName, float], cost_s: float
) -> Callers:
    """``keys`` keys of a tier under its published limits, asking for requests of these mean sizes."""
    if limits.shadow and pool.groups:
        return Callers(limits.tier, keys, sizes, cost_s, plain={})
    if not serves(pool):
        return Callers(limits.tier, keys, sizes, cost_s, plain={"requests": Meter(0.0, 0.0)})
    own = [limit for limit in limits.limits if limit.per == "key"]
    ceilings = {limit.name: _ceiling(limit) for limit in own if limit.ceiling_per_minute}
    return Callers(
        tier=limits.tier,
        keys=keys,
        sizes=sizes,
        cost_s=cost_s,
        plain={limit.name: _amount(limit) for limit in own if not limit.ceiling_per_minute},
        assured={limit.name: _amount(limit) for limit in own if limit.ceiling_per_minute},
        ceilings=ceilings,
        shared={limit.name: _ceiling(limit) for limit in limits.limits if limit.per == "tier"},
        borrow_up_to=limits.borrow_up_to / THOUSANDTHS,
        promised=limits.assured,
    )


def _amount(limit: Limit) -> Meter:
    if not limit.per_minute:  # a gauge: so many in flight, each for as long as its size says
        return Meter(float(limit.burst), 0.0)
    return Meter(limit.per_minute / 60, float(limit.burst))


def _ceiling(limit: Limit) -> Meter:
    if not limit.ceiling_per_minute:
        return _amount(limit)
    return Meter(limit.ceiling_per_minute / 60, float(limit.ceiling_burst))


class _Meters:
    """The meters of one role, one row for each kind of callers; what a row lacks never binds."""

    def __init__(self, meters: Sequence[Mapping[LimitName, Meter]], sizes: Sequence[Mapping[LimitName, float]]) -> None:
        none = Meter(np.inf, 0.0)
        self.per_s = np.array([[row.get(name, none).per_s for name in _NAMES] for row in meters]).reshape(-1, 4)
        self.burst = np.array([[row.get(name, none).burst for name in _NAMES] for row in meters]).reshape(-1, 4)
        self.sizes = np.array([[row.get(name, 0.0) for name in _NAMES] for row in sizes]).reshape(-1, 4)
        self.level = np.zeros_like(self.burst)

    def fits(self, dt_s: float) -> Array:
        """Requests of each row that fit in a bin."""
        room = np.maximum(self.per_s * dt_s + self.burst - self.level, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            requests = np.where(self.sizes > 0, room / self.sizes, np.inf)
        fitting: Array = requests.min(axis=1, initial=np.inf)
        return fitting

    def charge(self, requests: Array, dt_s: float) -> None:
        """Take what these requests use, and let a bin's rate leak."""
        self.level = np.maximum(self.level + requests[:, None] * self.sizes - self.per_s * dt_s, 0.0)


class Fluid:
    """The buckets of a pool and its callers, from unused on. ``step`` takes them through one bin."""

    def __init__(self, pool: PoolMeter, callers: Sequence[Callers]) -> None:
        sizes = [each.sizes for each in callers]
        self._pool = pool
        self._keys = np.array([each.keys for each in callers], dtype=np.float64)
        self._cost_s = np.array([each.cost_s for each in callers], dtype=np.float64)
        self._plain = _Meters([each.plain for each in callers], sizes)
        self._assured = _Meters([each.assured for each in callers], sizes)
        self._ceilings = _Meters([each.ceilings for each in callers], sizes)
        self._is_promised = np.array([each.promised or bool(each.assured) for each in callers], dtype=bool)
        self._borrow_up_to = np.array([each.borrow_up_to for each in callers], dtype=np.float64)
        self._ranks = [self._borrow_up_to == rank for rank in sorted({*self._borrow_up_to.tolist()}, reverse=True)]
        self._shared = [
            _SharedMeter(callers, tier, name)
            for tier in dict.fromkeys(each.tier for each in callers)
            for name in _NAMES
            if any(each.tier == tier and name in each.shared for each in callers)
        ]
        self._level_s = 0.0

    def step(self, offered_per_s: Array, dt_s: float) -> Served:
        """Admit what may be of these rates (of all keys of each kind together) for ``dt_s`` seconds."""
        asked = np.minimum(offered_per_s * dt_s / self._keys, self._plain.fits(dt_s))
        green = np.where(self._is_promised, np.minimum(asked, self._assured.fits(dt_s)), 0.0)
        wanted = np.where(self._borrow_up_to > 0, np.minimum(asked, self._ceilings.fits(dt_s)) - green, 0.0)
        green, wanted = green * self._keys, np.maximum(wanted, 0.0) * self._keys
        for meter in self._shared:
            wanted = meter.cut(green, wanted, dt_s)
        borrowed = self._lend(float(green @ self._cost_s), wanted, dt_s)
        self._charge(green, borrowed, dt_s)
        return Served(green, borrowed)

    def _lend(self, green_s: float, wanted: Array, dt_s: float) -> Array:
        """What the pool has left for borrowers, the best rank first."""
        borrowed, used_s = np.zeros_like(wanted), self._level_s + green_s
        for rank in self._ranks:
            asked_s = float((wanted * self._cost_s)[rank].sum())
            up_to_s = self._pool.per_s * dt_s + float(self._borrow_up_to[rank][0]) * self._pool.burst
            share = min(1.0, max(0.0, up_to_s - used_s) / asked_s) if asked_s > 0 else 1.0
            borrowed[rank] = wanted[rank] * share
            used_s += asked_s * share
        return borrowed

    def _charge(self, green: Array, borrowed: Array, dt_s: float) -> None:
        served = (green + borrowed) / self._keys
        self._plain.charge(served, dt_s)
        self._assured.charge(green / self._keys, dt_s)
        self._ceilings.charge(served, dt_s)
        for meter in self._shared:
            meter.charge(green + borrowed, dt_s)
        work_s = float((green + borrowed) @ self._cost_s)
        self._level_s = max(0.0, self._level_s + work_s - self._pool.per_s * dt_s)


class _SharedMeter:
    """A ceiling that all keys of a tier share."""

    def __init__(self, callers: Sequence[Callers], tier: str, name: LimitName) -> None:
        mine = [each for each in callers if each.tier == tier]
        self._meter = mine[0].shared[name]
        self._sizes = np.array([each.sizes.get(name, 0.0) if each.tier == tier else 0.0 for each in callers])
        self._level = 0.0

    def cut(self, green: Array, wanted: Array, dt_s: float) -> Array:
        """What of the wanted fits beside the green, each caller of the tier cut alike."""
        room = self._meter.per_s * dt_s + self._meter.burst - self._level - float(green @ self._sizes)
        asked = float(wanted @ self._sizes)
        share = min(1.0, max(0.0, room) / asked) if asked > 0 else 1.0
        return np.where(self._sizes > 0, wanted * share, wanted)

    def charge(self, served: Array, dt_s: float) -> None:
        """Take what was served, and let a bin's rate leak."""
        self._level = max(0.0, self._level + float(served @ self._sizes) - self._meter.per_s * dt_s)


def steady(pool: PoolMeter, callers: Sequence[Callers], offered_per_s: Sequence[float]) -> Served:
    """What is served a second of a load that lasts: bursts are used up, so only rates count."""
    lasting = [
        msgspec.structs.replace(
            each,
            plain=_without_burst(each.plain),
            assured=_without_burst(each.assured),
            ceilings=_without_burst(each.ceilings),
            shared=_without_burst(each.shared),
        )
        for each in callers
    ]
    return Fluid(PoolMeter(pool.per_s, 0.0), lasting).step(np.asarray(offered_per_s, dtype=np.float64), 1.0)


def _without_burst(meters: Mapping[LimitName, Meter]) -> dict[LimitName, Meter]:
    return {name: Meter(meter.per_s, 0.0) for name, meter in meters.items()}
