"""What the controller publishes and every gateway enforces: one versioned document per change.

A publication is plain data. Gateways hold the newest one whole; they never mix two epochs in one decision.
"""

from __future__ import annotations

import msgspec

from ratelimit.meter import EXACT, MINUTE_US
from ratelimit.policy import Holds, LimitName, LimitRule, LimitScope, LimitWindow, OrgPolicy
from serving.capacity import ReplicaGroup

__all__ = [
    "MOST_BUDGET_BURST",
    "MOST_BURST",
    "MOST_PER_MINUTE",
    "POOL_TICK_US",
    "Holds",
    "Limit",
    "LimitName",
    "LimitRule",
    "LimitScope",
    "LimitWindow",
    "Publication",
    "PublishedPool",
    "PublishedReplica",
    "TierLimits",
]

#: The largest rate of a limit (a gauge's and a window's largest count too), and the largest burst of a rated one, that
#: the meter counts exactly. A gateway refuses a publication that goes beyond.
MOST_PER_MINUTE = EXACT - 1
MOST_BURST = MOST_PER_MINUTE // MINUTE_US
#: The same for a pool's budget, in replica-microseconds; its level is kept in milliseconds.
POOL_TICK_US = 1_000
MOST_BUDGET_BURST = MOST_PER_MINUTE // (MINUTE_US // POOL_TICK_US)


class Limit(msgspec.Struct, frozen=True):
    """One limit of those whom ``per`` names together.

    ``concurrency`` has no rate: ``per_minute`` is 0 and ``burst`` the requests in flight. Nor has a window longer than
    a minute: ``burst`` is its amount. Where ``ceiling_per_minute`` is above 0, ``per_minute`` and ``burst`` are
    assured, and may be exceeded up to the ceilings while others leave capacity idle; the ceilings are never below them.
    """

    name: LimitName
    per_minute: int
    burst: int
    explanation: str
    per: LimitScope = "key"
    window: LimitWindow = "minute"
    ceiling_per_minute: int = 0
    ceiling_burst: int = 0


class TierLimits(msgspec.Struct, frozen=True):
    """What every key of one tier may take of one model, and how many active keys the share was divided by.

    ``priority`` is vLLM's: lower is served first. A request beyond what is assured is admitted only while it leaves the
    pool's bucket at or below ``borrow_up_to`` thousandths of its capacity; 0: the tier does not borrow. ``assured``: a
    share is promised, and a limit carries it. ``note`` says why a tier of a pool that serves has no limits.
    """

    tier: str
    model: str
    active_keys: int
    limits: tuple[Limit, ...]
    priority: int = 0
    borrow_up_to: int = 0
    assured: bool = True
    holds: Holds = "learned"
    shadow: bool = False
    note: str = ""


class PublishedReplica(msgspec.Struct, frozen=True, omit_defaults=True):
    """A replica that takes requests; ``requests_per_s`` is its supply for the pool's mix, its weight among its kind.

    ``domain`` is what it fails together with, such as its node, for a leader that takes over while nobody tells it.
    """

    url: str
    gpu: str
    profile: str
    slowdown: float
    requests_per_s: float
    domain: str | None = None


class PublishedPool(msgspec.Struct, frozen=True):
    """One model's replicas and what they can serve together, under the pool's SLO.

    ``budget_per_minute`` and ``budget_burst`` are the pool bucket's rate and capacity in replica-microseconds of cost.
    ``default_max_output`` is what an answer is expected to need while nothing is learned of it.
    ``priority_scheduling``: every replica serves requests of lower priority first, so that they may be told one.
    ``runs`` says of which of the ``groups`` the replicas are, in their order: (index, how many). Where they do not add
    up to the replicas, as in publications of before there were any, it is not known of which.
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
    priority_scheduling: bool = False
    runs: tuple[tuple[int, int], ...] = ()


class Publication(msgspec.Struct, frozen=True):
    """The published limits at one epoch, and every org that may use them: one that is not in ``orgs`` is refused.

    ``rules`` are the operator's own limits, which hold beside those of the tier. The keys in ``shadow_keys`` (ids) are
    counted and never refused. ``warnings`` are what the operator must hear of this derivation.
    """

    epoch: int
    published_at: str
    reason: str
    enforce: bool
    pools: tuple[PublishedPool, ...]
    tiers: tuple[TierLimits, ...]
    orgs: tuple[OrgPolicy, ...] = ()
    rules: tuple[LimitRule, ...] = ()
    shadow_keys: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def pool(self, model: str) -> PublishedPool | None:
        """The pool that serves ``model``."""
        return next((pool for pool in self.pools if pool.model == model), None)

    def allows(self, org: str, model: str) -> bool:
        """Whether an org may use a model; an org that is not published may use none."""
        return any(known.name == org and (known.models is None or model in known.models) for known in self.orgs)

    def limits(self, tier: str, model: str) -> tuple[Limit, ...]:
        """The limits of one key of ``tier`` on ``model``; empty where the tier has none."""
        return next((t.limits for t in self.tiers if t.tier == tier and t.model == model), ())
