"""One key's part of a pool's usable capacity, as its four limits, each with the factors it was computed from. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import NamedTuple, TypeVar

import msgspec

from ratelimit.explain import Factor, factor_value, factor_value_up, formula, number, product, shown, shown_up
from ratelimit.policy import LimitName, TierPolicy, promise_carriers
from ratelimit.publication import MOST_BURST, MOST_PER_MINUTE, Limit
from serving.capacity import WorkloadMix

T = TypeVar("T", int, float)

#: A full token bucket lets small requests pass more easily than big ones, so a caller over its limits is admitted more
#: requests per token than the mix has. A request limit at the mean rate would then bind before the tokens that carry
#: the promise, and leave capacity idle.
REQUEST_HEADROOM = 2

#: Concurrency bounds what overruns can hold at once. Arrivals bunch, and over the limits small requests crowd in: four
#: times the mean number in flight keeps it from binding before the tokens do.
CONCURRENCY_HEADROOM = 4
LEAST_CONCURRENCY = 2

#: Bursts admit at least one request of this size, as a percentile of the mix.
BURST_PERCENTILE = 99


class Supply(msgspec.Struct, frozen=True):
    """What one pool can serve, in requests/s of its mix, and how long a request may stay within the SLO.

    The texts are the printed derivations: of ``usable``, and of what ``residence_s`` is made of.
    """

    usable: Decimal
    text: str
    residence_s: Decimal
    residence_text: str


class Lengths(msgspec.Struct, frozen=True):
    """A mix in three numbers; ``big_requests`` is the size of a p99 request, in mean ones."""

    mean_input: Decimal
    mean_output: Decimal
    big_requests: Decimal


def lengths_of(mix: WorkloadMix) -> Lengths:
    """Mean uncached input, mean output, and the larger of the two ratios of the 99th percentile to the mean."""
    big_input = nearest_rank((shape.input_tokens - shape.cached_tokens for shape in mix.shapes), BURST_PERCENTILE)
    big_output = nearest_rank((shape.output_tokens for shape in mix.shapes), BURST_PERCENTILE)
    # A mix whose input is all cached still needs a bucket for a prompt that is not.
    mean_input, mean_output = factor_value(max(mix.mean_input_tokens, 1.0)), factor_value(mix.mean_output_tokens)
    # Of the means as printed, which are rounded down: multiplied by them it must come to the whole request again.
    big_requests = max(big_input / float(mean_input), big_output / float(mean_output))
    return Lengths(mean_input, mean_output, factor_value_up(big_requests))


def key_limits(tier: TierPolicy, active_keys: int, supply: Supply, lengths: Lengths) -> tuple[Limit, ...]:
    """The limits of one of the tier's ``active_keys`` keys, of a pool that can serve something.

    Those that carry the promise state the key's part of the share, and as a ceiling all that the tier may take: one key
    may use whatever is idle. The others follow from the ceiling, so that they do not bind first.
    """
    fair = (
        Factor("×", _decimal(tier.share), "tier share"),
        Factor("÷", Decimal(active_keys), "active keys"),
    )
    ceiling = (Factor("×", _decimal(tier.ceiling), "ceiling" if tier.share else "best-effort ceiling"),)
    most = ceiling if tier.share < tier.ceiling else fair
    carriers = promise_carriers(tier)
    limits = []
    for name, size in _sizes(lengths, carriers).items():
        rated = _rated(name, supply, (*most, size), lengths, tier.burst_s)
        if name in carriers and 0 < tier.share < tier.ceiling:
            assured = _rated(name, supply, (*fair, size), lengths, tier.burst_s)
            limits.append(_in_two_colours(supply, assured, rated))
        else:
            limits.append(_plain(supply, rated))
    limits.append(_concurrency(supply, most, limits[0].ceiling_burst or limits[0].burst))
    return tuple(limit for limit in limits if limit.name not in tier.unlimited)


def tier_limits(tier: TierPolicy, active_keys: int, keyed: Iterable[Limit]) -> tuple[Limit, ...]:
    """What bounds the keys of a tier together, where each alone may take all that the tier may.

    Only needed below a ceiling of 1 (the pool bounds the whole) and with several keys.
    """
    if active_keys < 2 or not tier.share < tier.ceiling < 1:
        return ()
    carriers = promise_carriers(tier)
    return tuple(_together(tier, active_keys, limit) for limit in keyed if limit.name in carriers)


def countable(limit: Limit) -> Limit:
    """The limit, cut to what the meter counts exactly where it is beyond, which its explanation then says."""
    most_at_once = MOST_BURST if limit.per_minute else MOST_PER_MINUTE
    cut = msgspec.structs.replace(
        limit,
        per_minute=min(limit.per_minute, MOST_PER_MINUTE),
        burst=min(limit.burst, most_at_once),
        ceiling_per_minute=min(limit.ceiling_per_minute, MOST_PER_MINUTE),
        ceiling_burst=min(limit.ceiling_burst, MOST_BURST),
    )
    if cut == limit:
        return limit
    said = f"{limit.explanation}\ncut to {amount_text(cut)}: more cannot be counted exactly"
    return msgspec.structs.replace(cut, explanation=said)


def amount_text(limit: Limit) -> str:
    """A limit's numbers: ``600/min, burst 50``, its ceiling behind them, or ``9 in flight``."""
    if not limit.per_minute:
        return f"{limit.burst:,} in flight"
    text = f"{limit.per_minute:,}/min, burst {limit.burst:,}"
    if limit.ceiling_per_minute:
        text += f", ceiling {limit.ceiling_per_minute:,}/min, burst {limit.ceiling_burst:,}"
    return text


def burst_of(per_minute: Fraction, burst_s: float) -> Fraction:
    """``burst_s`` seconds of a rate per minute."""
    return per_minute * Fraction(_decimal(burst_s)) / 60


class _Rated(NamedTuple):
    name: LimitName
    per_minute: int
    burst: int
    text: str


def _sizes(lengths: Lengths, carriers: tuple[LimitName, ...]) -> dict[LimitName, Factor]:
    """What a mean request takes of each rated limit."""
    headroom = Factor("×", Decimal(REQUEST_HEADROOM), "headroom over the mean, so that tokens bind first")
    alone = Factor("×", Decimal(1), "headroom, since the requests carry the promise alone")
    return {
        "requests": alone if "requests" in carriers else headroom,
        "input_tokens": Factor("×", lengths.mean_input, "uncached input tokens"),
        "output_tokens": Factor("×", lengths.mean_output, "output tokens"),
    }


def _rated(name: LimitName, supply: Supply, factors: tuple[Factor, ...], lengths: Lengths, burst_s: float) -> _Rated:
    """A rate per minute; its burst is ``burst_s`` of it, or one p99 request where that is more.

    The last of ``factors`` is the size of a mean request in this limit's unit.
    """
    big = shown_up(Fraction(lengths.big_requests) * Fraction(factors[-1].value))
    factors = (*factors, Factor("×", Decimal(60), "s"))
    exact = product(supply.usable, factors)
    per_minute = shown(exact)
    burst = max(shown(burst_of(exact, burst_s)), big)
    text = formula(f"{number(supply.usable)} requests/s", factors, exact)
    return _Rated(
        name,
        per_minute,
        burst,
        f"{text} → {per_minute:,}/min; burst {burst:,}: {burst_s:g} s of it, at least {big:,} "
        f"({number(lengths.big_requests)} mean requests, the p{BURST_PERCENTILE})",
    )


def _plain(supply: Supply, rated: _Rated) -> Limit:
    return Limit(rated.name, rated.per_minute, rated.burst, f"{supply.text}\n{rated.text}")


def _in_two_colours(supply: Supply, assured: _Rated, ceiling: _Rated) -> Limit:
    return Limit(
        assured.name,
        assured.per_minute,
        assured.burst,
        f"{supply.text}\nassured: {assured.text}\nceiling, while others leave it idle: {ceiling.text}",
        ceiling_per_minute=ceiling.per_minute,
        ceiling_burst=ceiling.burst,
    )


def _together(tier: TierPolicy, active_keys: int, limit: Limit) -> Limit:
    """A key's limit as that of all the tier's keys: their assured amounts added up, and the same ceiling."""
    if not limit.ceiling_per_minute:
        text = f"all keys of {tier.name} together: what one alone may take, {amount_text(limit)}"
        return msgspec.structs.replace(limit, per="tier", explanation=text)
    per_minute, burst = active_keys * limit.per_minute, active_keys * limit.burst
    together = msgspec.structs.replace(
        limit,
        per="tier",
        per_minute=per_minute,
        burst=burst,
        ceiling_per_minute=max(per_minute, limit.ceiling_per_minute),
        ceiling_burst=max(burst, limit.ceiling_burst),
    )
    text = (
        f"all keys of {tier.name} together: {active_keys} × what each is assured, and the ceiling that one alone has "
        f"(at least what is assured) → {amount_text(together)}"
    )
    return msgspec.structs.replace(together, explanation=text)


def _concurrency(supply: Supply, most: tuple[Factor, ...], request_burst: int) -> Limit:
    """Little's law: the most that the key may take × the time a request may stay within the SLO, with headroom."""
    residence = Factor("×", supply.residence_s, supply.residence_text)
    factors = (*most, residence, Factor("×", Decimal(CONCURRENCY_HEADROOM), "headroom over the mean"))
    exact = product(supply.usable, factors)
    least = max(LEAST_CONCURRENCY, request_burst)
    in_flight = max(shown(exact), least)
    text = formula(f"{number(supply.usable)} requests/s", factors, exact)
    return Limit(
        "concurrency",
        0,
        in_flight,
        f"{supply.text}\n{text} → {in_flight:,} in flight, at least {least:,} (a burst of requests)",
    )


def nearest_rank(values: Iterable[T], percentile: int) -> T:
    """The smallest value that ``percentile`` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[ceil(len(ordered) * percentile / 100) - 1]


def _decimal(value: float) -> Decimal:
    """The decimal that the operator wrote."""
    return Decimal(str(value))
