"""What running a fleet takes: power and money for the GPUs, Redis primaries for the decisions. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import msgspec

from ratelimit.planning.outcome import CellsNeeded, Energy, GpuSupply, SiteEnergy
from ratelimit.planning.sites import Site, totals

#: A gateway renews a reservation each third of its lease of 15 s, and once at the first chunk.
RENEWED_EACH_S = 5.0
#: A site whose limit and need differ by more than this factor has one of them in other units.
_UNITS_APART = 30.0


class Power(msgspec.Struct, frozen=True):
    """``gpu_w``: the most a GPU of each type draws. A site draws ``server_factor`` × ``pue`` watts for one of them."""

    gpu_w: Mapping[str, float]
    server_factor: float
    pue: float


class Prices(msgspec.Struct, frozen=True):
    """What a GPU of each type costs an hour; empty where nothing is known."""

    per_gpu_hour: Mapping[str, float]
    currency: str


class Redis(msgspec.Struct, frozen=True):
    """Admissions a second of one primary that does nothing else, and the share of it that is planned with."""

    admits_per_s: float
    utilization: float


def watts(value: float) -> str:
    """Power as people say it: 65 W, 13.5 kW, 295.2 MW."""
    for size, unit in ((1e6, "MW"), (1e3, "kW")):
        if value >= size:
            return f"{value / size:,.4g} {unit}"
    return f"{value:,.4g} W"


def energy(sites: Sequence[Site], supply: Mapping[str, GpuSupply], power: Power, prices: Prices) -> Energy:
    """Power with every GPU at its most, and what a joule and an hour's price buy at the knee."""
    by_site = tuple(_site_energy(site, power) for site in sites)
    site_w = sum(each.site_w for each in by_site)
    output = sum(gpu.output_tokens_per_s for gpu in supply.values())
    inputs = sum(gpu.input_tokens_per_s for gpu in supply.values())
    hourly = _hourly(sites, prices)
    return Energy(
        sites=by_site,
        site_w=site_w,
        output_tokens_per_joule=output / site_w if site_w else 0.0,
        tokens_per_joule=(inputs + output) / site_w if site_w else 0.0,
        cost_per_hour=hourly,
        cost_per_million_output_tokens=hourly / (output * 3600) * 1e6 if hourly and output else None,
        currency=prices.currency,
        arithmetic=(
            f"GPUs × board power × {power.server_factor:g} (server) × {power.pue:g} (PUE) = {watts(site_w)}; "
            f"{output:,.4g} output tokens/s ÷ that = {output / site_w if site_w else 0.0:.3g} output tokens/J"
        ),
    )


def _site_energy(site: Site, power: Power) -> SiteEnergy:
    gpu_w = sum(count * power.gpu_w[gpu] for gpu, count in site.gpus.items())
    site_w = gpu_w * power.server_factor * power.pue
    share = None if site.power_limit_w is None else site_w / site.power_limit_w
    problem = None
    if share is not None and site.power_limit_w is not None and share > 1:
        problem = (
            f"{site.name} would draw {watts(site_w)}, its limit is {watts(site.power_limit_w)}: "
            f"all its GPUs cannot run at full power; cap them at {1 / share:.0%} of it, or plan with fewer"
        )
    return SiteEnergy(site.name, sum(site.gpus.values()), gpu_w, site_w, site.power_limit_w, share, problem)


def power_problem(site: Site, power: Power) -> str | None:
    """What is wrong where a site's limit and its need are orders of magnitude apart."""
    found = _site_energy(site, power)
    if found.share_of_limit is None or not found.site_w:
        return None
    if 1 / _UNITS_APART <= found.share_of_limit <= _UNITS_APART:
        return None
    return (
        f"{site.name} would draw {watts(found.site_w)} of a limit of {watts(found.limit_w or 0)}; "
        "power_limit_mw is in megawatts"
    )


def _hourly(sites: Sequence[Site], prices: Prices) -> float | None:
    gpus = {gpu: count for gpu, count in totals(sites).items() if count}
    if not gpus or not set(gpus) <= set(prices.per_gpu_hour):
        return None
    return sum(count * prices.per_gpu_hour[gpu] for gpu, count in gpus.items())


def cells(offered_per_s: float, usable_per_s: float, residence_s: float, gpus: int, redis: Redis) -> CellsNeeded:
    """Primaries for the load of a fleet that is fully used, and asked for no less than that.

    Every request asked for is one admit; every one served is a settle too, and extends while it runs, which within the
    SLO is ``residence_s`` at most. An extend or a settle is counted as an admit: all three touch the same buckets.
    """
    extends = 1 + residence_s / RENEWED_EACH_S
    asked = max(offered_per_s, usable_per_s)
    calls = asked + usable_per_s * (1 + extends)
    primaries = ceil(calls / (redis.admits_per_s * redis.utilization))
    return CellsNeeded(
        cells=primaries,
        redis_primaries=primaries,
        calls_per_s=calls,
        calls_per_request=2 + extends,
        gpus_per_primary=gpus / primaries if primaries else 0.0,
        arithmetic=(
            f"{asked:,.0f} admits/s (the larger of what is asked at the peak and what is usable) + {usable_per_s:,.0f} "
            f"served/s × (1 settle + {extends:.3g} extends: 1 at the first chunk, one each {RENEWED_EACH_S:g} s of "
            f"{residence_s:.3g} s) = {calls:,.0f} calls/s ÷ ({redis.admits_per_s:,.0f} admits/s of a primary × "
            f"{redis.utilization:g}) = {primaries:,} primaries, one for each cell"
        ),
    )
