"""What the operator decides: tiers, pools and whether limits are enforced. Plain values, checked by ``config``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import msgspec

from serving.capacity import Slo, WorkloadMix

LimitName = Literal["requests", "input_tokens", "output_tokens", "concurrency"]
#: Who shares a limit: one key, all keys of an org, all keys of a tier, or all callers of a model.
LimitScope = Literal["key", "org", "tier", "model"]
#: A minute leaks continuously; the longer ones are fixed windows that begin with their first use.
LimitWindow = Literal["minute", "5h", "week"]
#: What a request holds of the output: what its caller usually takes, or the most it may take.
Holds = Literal["learned", "maximum"]


class LimitRule(msgspec.Struct, frozen=True):
    """A limit that the operator sets, beside those derived: ``amount`` in each ``window``, for the callers named.

    ``tiers``, ``orgs``, ``models`` and ``keys`` (ids) choose the callers; None means all. ``burst`` is what may come at
    once of a rate per minute, None for all of ``amount``. ``concurrency`` counts requests in flight, in no window.
    """

    name: LimitName
    amount: int
    per: LimitScope = "key"
    window: LimitWindow = "minute"
    burst: int | None = None
    tiers: tuple[str, ...] | None = None
    orgs: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    keys: tuple[str, ...] | None = None
    reason: str = ""


class Promise(NamedTuple):
    """What capacity is counted in: requests of ``mix`` that meet ``slo``, as for a device at full speed."""

    mix: WorkloadMix
    slo: Slo


class KeyAmounts(msgspec.Struct, frozen=True):
    """Amounts of one key, per minute (``concurrency``: in flight), by the name of the limit; None where unbounded."""

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    concurrency: int | None = None

    def of(self, name: LimitName) -> int | None:
        """The amount for one limit."""
        amount: int | None = getattr(self, name)
        return amount


class TierPolicy(msgspec.Struct, frozen=True):
    """A class of callers.

    ``share`` of every pool's usable capacity is assured to the tier's active keys together; up to ``ceiling`` of it
    may be borrowed while others leave it idle. With share == ceiling the tier never borrows; with share 0 it only
    borrows. ``burst_s`` seconds of its rate may come at once. ``priority`` is vLLM's: lower is served first, and may
    fill more of the pool's bucket with borrowed work.

    ``unlimited`` names the derived limits that the tier does not have. ``shadow``: its limits are decided and counted,
    and refuse nobody.

    ``mix`` and ``slo`` are the tier's own promise; None takes the pool's. ``minimum`` and ``maximum`` bound what each
    key is given; capacity goes to the minima of assured tiers first. ``oversell`` is for best effort only: the limits
    of the tier's keys add up to this many times its ceiling; None lets each of them take all of it.
    """

    name: str
    share: float
    ceiling: float
    priority: int
    burst_s: float
    unlimited: tuple[LimitName, ...] = ()
    holds: Holds = "learned"
    shadow: bool = False
    mix: WorkloadMix | None = None
    slo: Slo | None = None
    minimum: KeyAmounts = KeyAmounts()
    maximum: KeyAmounts = KeyAmounts()
    oversell: float | None = None

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for numbers that mean nothing; ``config`` says more of what is odd."""
        problem = _tier_problem(self)
        if problem:
            raise ValueError(f"tier {self.name}: {problem}")


def _tier_problem(tier: TierPolicy) -> str | None:
    if not 0 <= tier.share <= 1:
        return f"the share is {tier.share}, it is a part of the pool from 0 to 1"
    if not tier.share <= tier.ceiling <= 1 or not tier.ceiling > 0:
        return f"the ceiling is {tier.ceiling}, it is at least the share of {tier.share} and at most 1"
    if not 0 < tier.burst_s < float("inf"):
        return f"burst_s is {tier.burst_s}, it is a positive number of seconds"
    if tier.oversell is not None and not (1 <= tier.oversell < float("inf") and tier.share == 0):
        return f"oversell is {tier.oversell}, it is at least 1 and for a tier with share 0 only"
    for name in get_args(LimitName):
        least, most = tier.minimum.of(name), tier.maximum.of(name)
        if least is not None and most is not None and least > most:
            return f"the minimum of {name} is {least}, above the maximum of {most}"
    return None


class PoolPolicy(msgspec.Struct, frozen=True):
    """One model's promise (the SLO, as for a device at full speed) and the traffic it is sized for.

    What the ``spare_domains`` largest failure domains serve is kept free. ``default_max_output`` tokens are what an
    answer is expected to need where nothing is known of it; None takes the mix's p90. ``max_model_len`` and
    ``tokens_per_byte`` hold for every replica the pool may have, so that they outlive the loss of all of them.
    ``priority_scheduling``: every one of them serves lower priorities first.
    """

    model: str
    slo: Slo
    mix: WorkloadMix
    default_max_output: int | None
    spare_domains: int
    max_model_len: int
    tokens_per_byte: float
    priority_scheduling: bool = False

    def __post_init__(self) -> None:
        if self.spare_domains < 0:
            raise ValueError(f"pool {self.model}: {self.spare_domains} spare failure domains; keep none or more")


class OrgPolicy(msgspec.Struct, frozen=True):
    """An org that may use Penstock, and the models it may use; None means all."""

    name: str
    models: tuple[str, ...] | None = None


class Policy(msgspec.Struct, frozen=True):
    """Everything that limits are derived from, apart from the fleet and its callers. Orgs not named may use nothing."""

    tiers: tuple[TierPolicy, ...]
    pools: tuple[PoolPolicy, ...]
    enforce: bool
    orgs: tuple[OrgPolicy, ...] = ()
    rules: tuple[LimitRule, ...] = ()
    shadow_keys: tuple[str, ...] = ()


def promise_of(tier: TierPolicy, pool: PoolPolicy) -> Promise:
    """What a tier is promised on a pool."""
    return Promise(tier.mix or pool.mix, tier.slo or pool.slo)


def promises_of(tiers: Iterable[TierPolicy], pool: PoolPolicy) -> tuple[Promise, ...]:
    """Every promise made on a pool, each once; the pool's own comes first."""
    return tuple(dict.fromkeys([Promise(pool.mix, pool.slo), *(promise_of(tier, pool) for tier in tiers)]))


#: The best priority may fill this many thousandths of a pool's bucket with borrowed work, each next one a step less.
BEST_BORROW, BORROW_STEP, LEAST_BORROW = 900, 100, 500


def promise_carriers(tier: TierPolicy) -> tuple[LimitName, ...]:
    """The limits that state what is assured: the token limits that the tier has; where it has none, its requests."""
    tokens: tuple[LimitName, ...] = ("input_tokens", "output_tokens")
    requests: tuple[LimitName, ...] = ("requests",)
    had = tuple(name for name in tokens if name not in tier.unlimited)
    return had or tuple(name for name in requests if name not in tier.unlimited)


def may_borrow(tier: TierPolicy) -> bool:
    """Whether the tier takes what others leave idle; one without rated limits does, so that the pool bounds it."""
    return tier.share < tier.ceiling or not promise_carriers(tier)


def borrow_thresholds(tiers: Sequence[TierPolicy]) -> dict[str, int]:
    """Per tier, the thousandths of a pool's bucket that it may fill with borrowed work; 0 where it borrows nothing.

    Tiers that borrow are ranked by priority, equal ones together, so that the lower fill up while the best has room.
    """
    ranks = sorted({tier.priority for tier in tiers if may_borrow(tier)})
    return {
        tier.name: max(LEAST_BORROW, BEST_BORROW - BORROW_STEP * ranks.index(tier.priority)) if may_borrow(tier) else 0
        for tier in tiers
    }
