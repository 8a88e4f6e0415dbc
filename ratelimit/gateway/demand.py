"""What callers ask of a pool, served or not, in requests of the pool's mix: what its fleet would have to be sized for.

A request counts as ``cost ÷ mean cost of the mix`` requests, both charged against the fleet of its own epoch. So a
request of the mix counts as 1 whatever the fleet is, and demand is compared with the pool's usable requests/s in the
unit that these are derived in: more is offered than the pool can serve exactly where its budget is exceeded. Where all
replicas are of one kind, no request's count depends on how many there are.

What was served counts by what it cost in the end, and what was refused by what it held, times the share of their holds
that requests of its tier cost of late: holds are made for the longest tenth of the answers. No one request says much
of that share, however much it held, nor one that an engine refused.

The same demand counts once. The official clients number their attempts, and of what is refused only the first is
demand. What is refused from memory is none, whatever the client says: the same connection asks again, within a tenth of
a second, for what it was refused. What is served on a later attempt is told apart: it was counted when it was refused,
if that is true, so demand is the greater of what was served and what was first asked for.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from ratelimit.gateway.terms import Terms
from ratelimit.publication import PublishedPool

#: admitted: served at the first attempt. retried: served at a later one, as the client says. throttled: refused for
#: want of room under limits that grow with the fleet. unserved: admitted, and no replica took it, or none is there.
#: capped: refused by a number that an operator set, which no replica raises.
Outcome = Literal["admitted", "retried", "throttled", "unserved", "capped"]

#: Requests after which an older one counts 1/e as much as the newest in what holds turn out to cost.
MEMORY = 300
#: What one request held counts there for at most so many times the mean.
MOST_WEIGHT = 2.0
#: The least of its hold that a refused request counts for.
LEAST_SHARE = 0.05
RETRY_HEADER = b"x-stainless-retry-count"

_SECONDS_PER_MINUTE = 60


class Counts(Protocol):
    """Where demand is counted."""

    def offered(self, model: str, tier: str, outcome: Outcome, mix_requests: float) -> None: ...


class Asked(msgspec.Struct, frozen=True):
    """One request: the terms it came under, its hold on the pool in replica-microseconds of cost, its attempt.

    ``attempt`` is 0 for a client's first, and ``None`` where the client does not say.
    """

    terms: Terms
    tier: str
    held_us: int
    attempt: int | None


def attempt_of(header: bytes | None) -> int | None:
    """The number of retries that a client says it made before; ``None`` where it says none that can be read."""
    return int(header) if header is not None and header.isdigit() and len(header) < 10 else None


def mix_requests(pool: PublishedPool, cost_us: float) -> float:
    """How many requests of the pool's mix cost so much; 1 where the pool serves nothing, and so prices nothing."""
    if not pool.budget_per_minute:
        return 1.0
    return cost_us * pool.usable_requests_per_s * _SECONDS_PER_MINUTE / pool.budget_per_minute


class Demand:
    """Counts what is offered to one gateway; it remembers two numbers for each tier and model."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._held: dict[tuple[str, str], float] = {}
        self._shares: dict[tuple[str, str], float] = {}

    def ended(self, asked: Asked, spent_us: int | None) -> None:
        """An admitted request ended, and costs the pool so much; ``None``: no replica took it."""
        if spent_us is None:
            self._refused(asked, "unserved")
            return
        self._learn(asked, spent_us)
        self._count(asked, "retried" if asked.attempt else "admitted", spent_us)

    def refused(self, asked: Asked, is_capped: bool = False, is_repeated: bool = False) -> None:
        """A request was refused; ``is_capped``: by an operator's own number; ``is_repeated``: from memory."""
        if not is_repeated:
            self._refused(asked, "capped" if is_capped else "throttled")

    def _refused(self, asked: Asked, outcome: Outcome) -> None:
        if not asked.attempt:
            self._count(asked, outcome, asked.held_us * self._share(asked))

    def _learn(self, asked: Asked, spent_us: int) -> None:
        if not spent_us or not asked.held_us:
            return
        key = asked.tier, asked.terms.pool.model
        cost = min(1.0, spent_us / asked.held_us)
        mean_us = self._held.get(key, asked.held_us)
        weight_us = min(asked.held_us, MOST_WEIGHT * mean_us)
        self._held[key] = mean_us + (weight_us - mean_us) / MEMORY
        share = self._shares.get(key, cost)
        self._shares[key] = share + (cost - share) * weight_us / (mean_us * MEMORY)

    def _share(self, asked: Asked) -> float:
        """What requests of a tier cost of late, of what they held; all of it while nothing is known."""
        return max(LEAST_SHARE, self._shares.get((asked.tier, asked.terms.pool.model), 1.0))

    def _count(self, asked: Asked, outcome: Outcome, cost_us: float) -> None:
        pool = asked.terms.pool
        self._counts.offered(pool.model, asked.tier, outcome, mix_requests(pool, cost_us))
