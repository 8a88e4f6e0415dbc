"""From a caller's limits and a pool's budget to the charges that the store takes. Pure.

A bucket's name says who shares it and what it counts: ``k:<key id>:output_tokens``, ``o:<org>:requests.week``,
``t:<tier>:...``, ``m:<model>:...``, with ``.ceiling`` for what may be borrowed up to, and ``pool:work``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from ratelimit.gateway.headers import Room
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.terms import Terms
from ratelimit.limitrules import rules_for
from ratelimit.meter import GAUGE, Admitted, Charge, Denied, Role
from ratelimit.publication import POOL_TICK_US, Limit, Publication, PublishedPool

POOL_BUCKET = "pool:work"
WINDOW_S = {"minute": 0, "5h": 5 * 3_600, "week": 7 * 86_400}
_CEILING = ".ceiling"
_SCOPES = {"key": "k", "org": "o", "tier": "t", "model": "m"}
#: Callers whose charges are kept at hand.
_CALLERS_KEPT = 10_000


class Amounts(NamedTuple):
    """What a request takes, or has taken, of each kind of limit; the pool's in replica-microseconds."""

    requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int
    work: int


def amounts(usage: Usage, pool_cost_us: int, requests: int = 1) -> Amounts:
    """What a request of this usage takes."""
    return Amounts(requests, usage.input_tokens, usage.output_tokens, 1, pool_cost_us)


def meter_of(limit: Limit) -> str:
    """What a limit's bucket counts, as its name says it."""
    return limit.name if limit.window == "minute" else f"{limit.name}.{limit.window}"


def charges_for(
    key_id: str, terms: Terms, usage: Usage, pool_cost_us: int, left: Amounts | None = None
) -> tuple[Charge, ...]:
    """A request's charges: the caller's limits in their published order, then their ceilings, then the pool.

    ``left`` is what stays charged if the request's lease ends; None: all of it.
    """
    return _costing(_unused(key_id, terms), amounts(usage, pool_cost_us), left)


def used_charges(held: Sequence[Charge], used: Amounts, left: Amounts | None = None) -> tuple[Charge, ...]:
    """The same charges at their true cost; what is in flight is left to the store, which ends it."""
    return _costing([charge for charge in held if charge.kind != GAUGE], used, left)


def without_assured(charges: Sequence[Charge]) -> tuple[Charge, ...]:
    """What a request that borrows is charged: all but what is assured."""
    return tuple(charge for charge in charges if charge.role is not Role.ASSURED)


def counted_only(charges: Sequence[Charge]) -> tuple[Charge, ...]:
    """The pool's charge alone, refusing nothing."""
    return tuple(
        Charge(*charge[:5], Role.COUNTED, at_reap=charge.at_reap) for charge in charges if charge.role >= Role.POOL
    )


def _costing(charges: Sequence[Charge], cost: Amounts, left: Amounts | None) -> tuple[Charge, ...]:
    costs = cost._asdict()
    if left is None:
        return tuple(charge.costing(costs[_counted(charge.bucket)]) for charge in charges)
    stays = left._asdict()
    return tuple(
        charge.costing(costs[what], min(stays[what], costs[what]))
        for charge, what in ((charge, _counted(charge.bucket)) for charge in charges)
    )


@lru_cache(16 * _CALLERS_KEPT)
def _counted(bucket: str) -> str:
    return bucket.rpartition(":")[2].partition(".")[0]


@lru_cache(_CALLERS_KEPT)
def _unused(key_id: str, terms: Terms) -> tuple[Charge, ...]:
    """The caller's charges at no cost: building and checking them takes longer than all else here."""
    names = {"key": key_id, "org": terms.org, "tier": terms.tier, "model": terms.pool.model}
    limits = [_limit_charge(limit, names[limit.per]) for limit in terms.limits]
    ceilings = [_ceiling_charge(limit, names[limit.per]) for limit in terms.limits if limit.ceiling_per_minute]
    role = Role.POOL if ceilings or not terms.assured else Role.COUNTED
    return (*limits, *ceilings, work_charge(terms.pool, role, terms.borrow_up_to))


def check_countable(publication: Publication) -> None:
    """Raises ``ValueError`` for a limit or a budget that the meter could not count exactly."""
    everybodys = [msgspec.structs.replace(r, tiers=None, orgs=None, models=None, keys=None) for r in publication.rules]
    ruled = [limit for rule in everybodys for limit in rules_for((rule,), "", "", "", "")]
    for limit in (*(limit for tier in publication.tiers for limit in tier.limits), *ruled):
        _limit_charge(limit, "any")
        if limit.ceiling_per_minute:
            _ceiling_charge(limit, "any")
    for pool in publication.pools:
        work_charge(pool, Role.COUNTED, 0)
    for tier in publication.tiers:
        Charge(POOL_BUCKET, 0, 1, 1, role=Role.POOL, borrow_up_to=tier.borrow_up_to)


def _bucket(limit: Limit, name: str) -> str:
    return f"{_SCOPES[limit.per]}:{name}:{meter_of(limit)}"


def _limit_charge(limit: Limit, name: str) -> Charge:
    bucket = _bucket(limit, name)
    if limit.ceiling_per_minute:
        # A rate of 0 would make it a gauge; with a capacity of 0 the rate of 1 assures nothing either.
        return Charge(bucket, 0, limit.burst, max(1, limit.per_minute), role=Role.ASSURED)
    return Charge(bucket, 0, limit.burst, limit.per_minute, window_s=WINDOW_S[limit.window])


def _ceiling_charge(limit: Limit, name: str) -> Charge:
    bucket = _bucket(limit, name) + _CEILING
    return Charge(bucket, 0, limit.ceiling_burst, limit.ceiling_per_minute, role=Role.CEILING)


def work_charge(pool: PublishedPool, role: Role, borrow_up_to: int) -> Charge:
    """The pool's charge at no cost."""
    rate = max(1, pool.budget_per_minute)  # a rate of 0 would make it a gauge
    return Charge(POOL_BUCKET, 0, pool.budget_burst, rate, POOL_TICK_US, role, borrow_up_to=borrow_up_to)


def rooms(terms: Terms, answer: Admitted | Denied) -> tuple[Room, ...]:
    """What is left of each of the caller's limits, by the store's answer; ceilings and the pool are not told."""
    told = zip(terms.limits, answer.remaining, answer.reset_us, strict=False)
    return tuple(Room(limit, remaining, reset_us) for limit, remaining, reset_us in told)


def without_ceiling(bucket: str) -> str:
    """The bucket of the limit that this is a ceiling of; any other is left as it is."""
    return bucket.removesuffix(_CEILING)


def limit_of(terms: Terms, bucket: str) -> Limit | None:
    """The limit whose bucket, or whose ceiling's, this is; None for the pool's."""
    scope, _, meter = without_ceiling(bucket).rpartition(":")
    return next(
        (limit for limit in terms.limits if meter_of(limit) == meter and scope[:2] == _SCOPES[limit.per] + ":"), None
    )
