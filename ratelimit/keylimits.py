"""One key's part of a pool's usable capacity, as its four limits, each with the factors it was computed from. Pure."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from math import ceil

import msgspec

from ratelimit.explain import Factor, factor_value, factor_value_up, formula, number, product, shown, shown_up
from ratelimit.policy import TierPolicy
from ratelimit.publication import MOST_BURST, MOST_PER_MINUTE, Limit, LimitName
from serving.capacity import WorkloadMix

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
    big_input = _percentile([shape.input_tokens - shape.cached_tokens for shape in mix.shapes])
    big_output = _percentile([shape.output_tokens for shape in mix.shapes])
    # A mix whose input is all cached still needs a bucket for a prompt that is not.
    mean_input = max(mix.mean_input_tokens, 1.0)
    big_requests = max(big_input / mean_input, big_output / mix.mean_output_tokens)
    return Lengths(factor_value(mean_input), factor_value(mix.mean_output_tokens), factor_value_up(big_requests))


def key_limits(tier: TierPolicy, active_keys: int, supply: Supply, lengths: Lengths) -> tuple[Limit, ...]:
    """The limits of one of the tier's ``active_keys`` keys, of a pool that can serve something."""
    share = Factor("×", _decimal(tier.share), "tier share")
    if not tier.share:
        share = Factor("×", _decimal(tier.ceiling), "best-effort ceiling")
    fair = (share, Factor("÷", Decimal(active_keys), "active keys"))
    headroom = Factor("×", Decimal(REQUEST_HEADROOM), "headroom over the mean, so that tokens bind first")
    requests = _rated("requests", supply, (*fair, headroom), lengths, tier.burst_s)
    inputs = Factor("×", lengths.mean_input, "uncached input tokens")
    outputs = Factor("×", lengths.mean_output, "output tokens")
    return (
        requests,
        _rated("input_tokens", supply, (*fair, inputs), lengths, tier.burst_s),
        _rated("output_tokens", supply, (*fair, outputs), lengths, tier.burst_s),
        _concurrency(supply, fair, requests.burst),
    )


def countable(limit: Limit) -> Limit:
    """The limit, cut to what the meter counts exactly where it is beyond, which its explanation then says."""
    most_at_once = MOST_BURST if limit.per_minute else MOST_PER_MINUTE
    per_minute, burst = min(limit.per_minute, MOST_PER_MINUTE), min(limit.burst, most_at_once)
    if (per_minute, burst) == (limit.per_minute, limit.burst):
        return limit
    cut = f"{per_minute:,}/min, burst {burst:,}" if per_minute else f"{burst:,} in flight"
    return Limit(limit.name, per_minute, burst, f"{limit.explanation}\ncut to {cut}: more cannot be counted exactly")


def burst_of(per_minute: Fraction, burst_s: float) -> Fraction:
    """``burst_s`` seconds of a rate per minute."""
    return per_minute * Fraction(_decimal(burst_s)) / 60


def _rated(name: LimitName, supply: Supply, factors: tuple[Factor, ...], lengths: Lengths, burst_s: float) -> Limit:
    """A limit per minute; its burst is ``burst_s`` of it, or one p99 request where that is more.

    The last of ``factors`` is the size of a mean request in this limit's unit.
    """
    big = shown_up(Fraction(lengths.big_requests) * Fraction(factors[-1].value))
    factors = (*factors, Factor("×", Decimal(60), "s"))
    exact = product(supply.usable, factors)
    per_minute = shown(exact)
    burst = max(shown(burst_of(exact, burst_s)), big)
    text = formula(f"{number(supply.usable)} requests/s", factors, exact)
    return Limit(
        name,
        per_minute,
        burst,
        f"{supply.text}\n{text} → {per_minute:,}/min; burst {burst:,}: {burst_s:g} s of it, at least {big:,} "
        f"({number(lengths.big_requests)} mean requests, the p{BURST_PERCENTILE})",
    )


def _concurrency(supply: Supply, fair: tuple[Factor, ...], request_burst: int) -> Limit:
    """Little's law: the key's rate × the time a request may stay within the SLO, with headroom."""
    residence = Factor("×", supply.residence_s, supply.residence_text)
    factors = (*fair, residence, Factor("×", Decimal(CONCURRENCY_HEADROOM), "headroom over the mean"))
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


def _percentile(values: list[int]) -> int:
    """The nearest-rank percentile ``BURST_PERCENTILE``."""
    return sorted(values)[ceil(len(values) * BURST_PERCENTILE / 100) - 1]


def _decimal(value: float) -> Decimal:
    """The decimal that the operator wrote."""
    return Decimal(str(value))
