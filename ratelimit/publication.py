"""What the controller publishes and every gateway enforces: one versioned document per change.

A publication is plain data. Gateways hold the newest one whole; they never mix two epochs in one decision.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ratelimit.meter import EXACT, MINUTE_US
from ratelimit.policy import OrgPolicy
from serving.capacity import ReplicaGroup

LimitName = Literal["requests", "input_tokens", "output_tokens", "concurrency"]

#: The largest rate of a limit (a gauge's largest count too), and the largest burst of a rated one, that the meter
#: counts exactly. A gateway refuses a publication that goes beyond.
MOST_PER_MINUTE = EXACT - 1
MOST_BURST = MOST_PER_MINUTE // MINUTE_US
#: The same for a pool's budget, in replica-microseconds; its level is kept in milliseconds.
POOL_TICK_US = 1_000
MOST_BUDGET_BURST = MOST_PER_MINUTE // (MINUTE_US // POOL_TICK_US)


class Limit(msgspec.Struct, frozen=True):
    """One limit of one key. ``concurrency`` has no rate: ``per_minute`` is 0 and ``burst`` the requests in flight."""

    name: LimitName
    per_minute: int
    burst: int
    explanation: str


class TierLimits(msgspec.Struct, frozen=True):
    """What every key of one tier may take of one model, and how many active keys the share was divided by."""

    tier: str
    model: str
    active_keys: int
    limits: tuple[Limit, ...]


class PublishedReplica(msgspec.Struct, frozen=True):
    """A replica that takes requests; ``requests_per_s`` is its supply for the pool's mix, the weight for routing."""

    url: str
    gpu: str
    profile: str
    slowdown: float
    requests_per_s: float


class PublishedPool(msgspec.Struct, frozen=True):
    """One model's replicas and what they can serve together, under the pool's SLO.

    ``budget_per_minute`` and ``budget_burst`` are the pool bucket's rate and capacity in replica-microseconds of cost.
    """

    model: str
    replicas: tuple[PublishedReplica, ...]
    groups: tuple[ReplicaGroup, ...]
    max_model_len: int
    tokens_per_byte: float
    default_max_output: int
    budget_per_minute: int
    budget_burst: int
    usable_requests_per_s: float
    usable_input_tokens_per_s: float
    usable_output_tokens_per_s: float
    explanation: str


class Publication(msgspec.Struct, frozen=True):
    """The published limits at one epoch, and every org that may use them: one that is not in ``orgs`` is refused."""

    epoch: int
    published_at: str
    reason: str
    enforce: bool
    pools: tuple[PublishedPool, ...]
    tiers: tuple[TierLimits, ...]
    orgs: tuple[OrgPolicy, ...] = ()

    def pool(self, model: str) -> PublishedPool | None:
        """The pool that serves ``model``."""
        return next((pool for pool in self.pools if pool.model == model), None)

    def allows(self, org: str, model: str) -> bool:
        """Whether an org may use a model; an org that is not published may use none."""
        return any(known.name == org and (known.models is None or model in known.models) for known in self.orgs)

    def limits(self, tier: str, model: str) -> tuple[Limit, ...]:
        """The limits of one key of ``tier`` on ``model``; empty where the tier has none."""
        return next((t.limits for t in self.tiers if t.tier == tier and t.model == model), ())
