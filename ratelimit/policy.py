"""What the operator decides: tiers, pools and whether limits are enforced. Plain values, checked by ``config``."""

from __future__ import annotations

import msgspec

from serving.capacity import Slo, WorkloadMix


class TierPolicy(msgspec.Struct, frozen=True):
    """A class of callers.

    ``share`` of every pool's usable capacity is assured to the tier's active keys together; a tier with share 0 is
    best effort and is limited by ``ceiling``, the most of a pool that it may take. ``burst_s`` seconds of its rate may
    come at once.

    Two fields do nothing yet. ``ceiling`` has no effect where the share is above 0: an assured tier does not borrow
    what others leave. ``priority`` (vLLM's: lower is served first) is read by nothing.
    """

    name: str
    share: float
    ceiling: float
    priority: int
    burst_s: float


class PoolPolicy(msgspec.Struct, frozen=True):
    """One model's promise (the SLO, as for a device at full speed) and the traffic it is sized for.

    ``spare_replicas`` of the largest replicas are kept free. ``default_max_output`` tokens are held for a request
    that names no maximum. ``max_model_len`` and ``tokens_per_byte`` hold for every replica the pool may have, so
    that they outlive the loss of all of them.
    """

    model: str
    slo: Slo
    mix: WorkloadMix
    default_max_output: int
    spare_replicas: int
    max_model_len: int
    tokens_per_byte: float


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
