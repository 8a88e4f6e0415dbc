"""What becomes of a demand under published limits, tier by tier. Pure; the rules are in ``throttling``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import fsum

import msgspec
import numpy as np

from ratelimit.planning.demand import CallerDemand, Demand
from ratelimit.planning.throttling import Array, Callers, Fluid, PoolMeter, callers_of, pool_meter, steady
from ratelimit.policy import LimitName
from ratelimit.publication import PublishedPool, TierLimits
from serving.capacity import ReplicaGroup, Slo, WorkloadMix
from serving.fleetcost import fleet_costs_s

#: Multiples of the demand that are looked at: from a quarter to four times, each a sixth of an octave apart.
MULTIPLES = tuple(2 ** (k / 6) for k in range(-12, 13))
#: Of a replay, no more bins than these are looked at for each multiple.
_SWEPT_BINS = 100


class Share(msgspec.Struct, frozen=True):
    """Of the work that a tier asked for: what was green, borrowed and throttled. ``offered_per_s`` is in requests/s."""

    offered_per_s: float
    green: float
    borrowed: float

    @property
    def throttled(self) -> float:
        """What was refused; of nothing, nothing, and rounding does not make a refusal."""
        share = 1 - self.green - self.borrowed
        return share if self.offered_per_s and share > 1e-9 else 0.0


class Load(msgspec.Struct, frozen=True):
    """A pool and those who ask of it, as the fluid takes them."""

    pool: PoolMeter
    callers: tuple[Callers, ...]
    demand: Demand

    def at_mean(self) -> dict[str, Share]:
        """Were every rate its mean, for good."""
        return self._shares([self._steady([each.requests_per_s for each in self.demand.callers])])

    def at_worst(self, times: float = 1.0) -> dict[str, Share]:
        """At everybody's peak at once, for good; of a replay, over all of it."""
        if not self.demand.bin_s:
            return self._shares([self._steady([e.requests_per_s * e.peak * times for e in self.demand.callers])])
        fluid = Fluid(self.pool, self.callers)
        served = []
        for rates in self._bins(times):
            green, borrowed = fluid.step(rates, self.demand.bin_s)
            served.append((rates, green / self.demand.bin_s, borrowed / self.demand.bin_s))
        return self._shares(served)

    def sweep(self) -> list[tuple[float, dict[str, Share]]]:
        """Throttled shares were the demand so many times what it is."""
        return [(times, self._roughly_at_worst(times)) for times in MULTIPLES]

    def work_share(self) -> float:
        """The work that is asked for in the mean, as a share of what the pool gives out."""
        work = fsum(d.requests_per_s * c.cost_s for d, c in zip(self.demand.callers, self.callers, strict=True))
        return work / self.pool.per_s if self.pool.per_s else float("inf")

    def heaviest(self) -> float:
        """The work asked for in the busiest bin, or at everybody's declared peak, as a share of what is given out."""
        peaks = [np.array([each.requests_per_s * each.peak for each in self.demand.callers])]
        costs_s = np.array([each.cost_s for each in self.callers])
        work = max(float(rates @ costs_s) for rates in (self._bins(1.0) if self.demand.bin_s else peaks))
        return work / self.pool.per_s if self.pool.per_s else float("inf")

    def _roughly_at_worst(self, times: float) -> dict[str, Share]:
        if not self.demand.bin_s:
            return self.at_worst(times)
        bins = self._bins(times)
        return self._shares([self._steady(rates) for rates in bins[:: max(1, len(bins) // _SWEPT_BINS)]])

    def _bins(self, times: float) -> list[Array]:
        courses = np.array([each.course for each in self.demand.callers], dtype=np.float64)
        means = np.array([each.requests_per_s * times for each in self.demand.callers], dtype=np.float64)
        return list((courses * means[:, None]).T)

    def _steady(self, rates: Sequence[float] | Array) -> tuple[Array, Array, Array]:
        green, borrowed = steady(self.pool, self.callers, list(rates))
        return np.asarray(rates, dtype=np.float64), green, borrowed

    def _shares(self, bins: Sequence[tuple[Array, Array, Array]]) -> dict[str, Share]:
        offered, green, borrowed = (sum(part) / len(bins) for part in zip(*bins, strict=True))
        # Where no replica is there to say what a request costs, all requests are alike.
        costs = np.array([each.cost_s or 1.0 for each in self.callers])
        shares = {}
        for tier in dict.fromkeys(each.tier for each in self.callers):
            mine = np.array([each.tier == tier for each in self.callers]) * costs
            asked = float(offered @ mine) or 1.0
            shares[tier] = Share(
                float(offered[mine > 0].sum()), float(green @ mine) / asked, float(borrowed @ mine) / asked
            )
        return shares


def load_of(demand: Demand, pool: PublishedPool, tiers: Mapping[str, TierLimits], slos: Mapping[str, Slo]) -> Load:
    """The demand under a pool's published budget and its tiers' limits; ``slos`` say how long a request may run."""
    callers = tuple(_callers(each, pool, tiers[each.tier], slos[each.tier]) for each in demand.callers)
    return Load(pool_meter(pool), callers, demand)


def _callers(each: CallerDemand, pool: PublishedPool, limits: TierLimits, slo: Slo) -> Callers:
    return callers_of(pool, limits, each.keys, sizes_of(each.mix, slo), mean_cost_s(pool.groups, each.mix))


def sizes_of(mix: WorkloadMix, slo: Slo) -> dict[LimitName, float]:
    """What a mean request takes of each limit; it is in flight for as long as the SLO allows."""
    return {
        "requests": 1.0,
        "input_tokens": mix.mean_input_tokens,
        "output_tokens": mix.mean_output_tokens,
        "concurrency": slo.ttft_s + mix.mean_output_tokens * slo.tpot_s,
    }


def mean_cost_s(groups: Sequence[ReplicaGroup], mix: WorkloadMix) -> float:
    """Replica-seconds that a request of the mix costs in the mean; 0 where no replica is there to cost any."""
    if not groups:
        return 0.0
    fleet: Counter[ReplicaGroup] = Counter()
    for group in groups:
        fleet[msgspec.structs.replace(group, count=1)] += group.count
    return float(fleet_costs_s(fleet, mix).mean())
