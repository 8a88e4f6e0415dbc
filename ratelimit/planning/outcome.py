"""What a plan comes to: the values that its table, JSON and pictures show. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class ProvenanceNote(msgspec.Struct, frozen=True):
    """How the supply of a GPU type is known; ``text`` is what to print beside any figure that follows from it."""

    kind: str
    profile: str
    date: str
    engine: str
    source: str
    anchors: tuple[str, ...]
    text: str


class GpuSupply(msgspec.Struct, frozen=True):
    """What all GPUs of one type serve at their knee. Rates are per second; input tokens are uncached ones.

    ``idle_gpus`` do not make up a whole replica. ``problems``: promises that this type cannot meet.
    """

    gpus: int
    idle_gpus: int
    gpus_per_replica: int
    replicas: int
    domain_gpus: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    output_tokens_per_s_per_gpu: float
    knee_bound: str
    knee_ttft_s: float
    knee_tpot_s: float
    provenance: ProvenanceNote
    problems: tuple[str, ...] = ()


class Usable(msgspec.Struct, frozen=True):
    """What is given out: the supply less what is kept spare, a second."""

    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    supply_requests_per_s: float
    spare_domains: int
    explanation: str
    problems: tuple[str, ...]


class TierOutcome(msgspec.Struct, frozen=True):
    """One tier: the limits of each of its keys, and what becomes of what they ask.

    Limits are per key and minute, assured ones where ``assured``; ``ceilings`` may be had while others leave it idle.
    None: unlimited, though the pool bounds what it borrows; 0 where the pool gives out nothing. ``throttled_share`` is
    that of the work asked for at the peak, or in a whole replay, as the plan's ``demand`` says; the green, borrowed and
    throttled shares add up to 1.
    """

    tier: str
    rpm: int | None
    itpm: int | None
    otpm: int | None
    concurrency: int | None
    keys: int
    throttled_share: float
    throttled_share_at_mean: float
    green_share: float
    borrowed_share: float
    assured: bool
    ceilings: Mapping[str, int]
    offered_requests_per_s: float
    mean_requests_per_s: float
    explanations: Mapping[str, str]


class CellsNeeded(msgspec.Struct, frozen=True):
    """Redis primaries, one for each cell; ``arithmetic`` has every factor."""

    cells: int
    redis_primaries: int
    calls_per_s: float
    calls_per_request: float
    gpus_per_primary: float
    arithmetic: str


class SiteEnergy(msgspec.Struct, frozen=True):
    """What a site draws with every GPU at full power; ``share_of_limit`` is None where no limit is known."""

    site: str
    gpus: int
    gpu_w: float
    site_w: float
    limit_w: float | None
    share_of_limit: float | None
    problem: str | None


class Energy(msgspec.Struct, frozen=True):
    """Power of all sites, and the tokens that a joule and (where prices are given) a unit of money buys at the knee."""

    sites: tuple[SiteEnergy, ...]
    site_w: float
    output_tokens_per_joule: float
    tokens_per_joule: float
    cost_per_hour: float | None
    cost_per_million_output_tokens: float | None
    currency: str
    arithmetic: str


class SweepPoint(msgspec.Struct, frozen=True):
    """Throttled share of each tier, were the demand so many times what it is."""

    times: float
    throttled_share: Mapping[str, float]


class Side(msgspec.Struct, frozen=True):
    """The plan for one fleet."""

    fleet: Mapping[str, object]
    supply: Mapping[str, GpuSupply]
    usable: Usable
    tiers: tuple[TierOutcome, ...]
    cells: CellsNeeded
    energy: Energy
    sweep: tuple[SweepPoint, ...]


class Outcome(msgspec.Struct, frozen=True):
    """The plan for the fleet as it will be, and, where something changes, as it was before."""

    name: str
    title: str
    model: str
    promise: str
    demand: str
    change: str
    after: Side
    before: Side | None
    assumptions: tuple[str, ...]

    def document(self) -> dict[str, object]:
        """For scripts: the fleet as it will be at the top, and the one before under ``before``."""
        shared = {name: getattr(self, name) for name in ("name", "title", "model", "promise", "demand", "change")}
        after = msgspec.to_builtins(self.after)
        before = None if self.before is None else msgspec.to_builtins(self.before)
        return {**after, "before": before, "assumptions": list(self.assumptions), **shared}
