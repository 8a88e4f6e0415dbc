"""One key's part of a pool's usable capacity, as its four limits, each with the factors it was computed from. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import NamedTuple, TypeVar

import msgspec

from ratelimit.explain import Factor, factor_value, factor_value_up, formula, number, product, shown, shown_up
from ratelimit.policy import LimitName, TierPolicy, promise_carriers
from ratelimit.poolsupply import Supply
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


class Grant(NamedTuple):
    """What a tier is assured of a pool: requests/s to start from, as printed, and the factors on them.

    ``kept`` is the part of each minimum that can be kept.
    """

    start: Decimal
    said: str
    factors: tuple[Factor, ...]
    kept: Decimal = Decimal(1)


class _Base(NamedTuple):
    """What a limit is computed from: requests/s, as printed, and the factors up to one key's."""

    start: Decimal
    said: str
    factors: tuple[Factor, ...]


class Lengths(msgspec.Struct, frozen=True):
    """A mix in three numbers; ``big_requests`` is the size of a p99 request, in mean ones."""

    mean_input: Decimal
    mean_output: Decimal
    big_requests: Decimal


@lru_cache(maxsize=256)
def lengths_of(mix: WorkloadMix) -> Lengths:
    """Mean uncached input, mean output, and the larger of the two ratios of the 99th percentile to the mean."""
    big_input = nearest_rank((shape.input_tokens - shape.cached_tokens for shape in mix.shapes), BURST_PERCENTILE)
    big_output = nearest_rank((shape.output_tokens for shape in mix.shapes), BURST_PERCENTILE)
    # A mix whose input is all cached still needs a bucket for a prompt that is not.
    mean_input, mean_output = factor_value(max(mix.mean_input_tokens, 1.0)), factor_value(mix.mean_output_tokens)
    # Of the means as printed, which are rounded down: multiplied by them it must come to the whole request again.
    big_requests = max(big_input / float(mean_input), big_output / float(mean_output))
    return Lengths(mean_input, mean_output, factor_value_up(big_requests))


def key_limits(tier: TierPolicy, active_keys: int, supply: Supply, lengths: Lengths, grant: Grant) -> tuple[Limit, ...]:
    """The limits of one of the tier's ``active_keys`` keys, of a pool that can serve something.

    Those that carry the promise state the key's part of the grant, and as a ceiling all that the tier may take: one key
    may use whatever is idle. The others follow from the ceiling, so that they do not bind first.
    """
    fair = _Base(grant.start, grant.said, (*grant.factors, Factor("÷", Decimal(active_keys), "active keys")))
    most = _most(tier, active_keys, supply) if tier.share < tier.ceiling else fair
    carriers = promise_carriers(tier)
    limits = []
    for name, size in _sizes(lengths, carriers).items():
        bounds = _Bounds(tier.minimum.of(name), grant.kept, tier.maximum.of(name))
        rated = _rated(name, most, size, lengths, tier.burst_s, bounds)
        if name in carriers and 0 < tier.share < tier.ceiling:
            assured = _rated(name, fair, size, lengths, tier.burst_s, bounds)
            limits.append(_in_two_colours(supply, assured, rated))
        else:
            limits.append(_plain(supply, rated))
    in_flight = _Bounds(tier.minimum.concurrency, Decimal(1), tier.maximum.concurrency)
    limits.append(_concurrency(supply, most, limits[0].ceiling_burst or limits[0].burst, in_flight))
    return tuple(limit for limit in limits if limit.name not in tier.unlimited)


def carrier_sizes(tier: TierPolicy, lengths: Lengths) -> dict[LimitName, Decimal]:
    """What a mean request takes of each limit that carries the tier's promise."""
    carriers = promise_carriers(tier)
    return {name: size.value for name, size in _sizes(lengths, carriers).items() if name in carriers}


def tier_limits(
    tier: TierPolicy, active_keys: int, supply: Supply, lengths: Lengths, keyed: Iterable[Limit]
) -> tuple[Limit, ...]:
    """What bounds the keys of a tier together, where they may take more than the tier may.

    Only needed below a ceiling of 1 (the pool bounds the whole) and with several keys.
    """
    if active_keys < 2 or not tier.share < tier.ceiling < 1:
        return ()
    carried = [limit for limit in keyed if limit.name in promise_carriers(tier)]
    sizes = _sizes(lengths, promise_carriers(tier))
    whole = _Base(supply.usable, f"{number(supply.usable)} requests/s", (_ceiling(tier),))
    together = []
    for limit in carried:
        if tier.oversell is not None or tier.maximum.of(limit.name) is not None:
            rated = _rated(limit.name, whole, sizes[limit.name], lengths, tier.burst_s, _NO_BOUNDS)
            together.append(_lifted(tier, active_keys, supply, limit, rated))
        else:
            together.append(_together(tier, active_keys, limit))
    return tuple(together)


def countable(limit: Limit) -> Limit:
    """The limit, cut to what the meter counts exactly where it is beyond, which its explanation then says."""
    if max(limit.per_minute, limit.burst, limit.ceiling_per_minute, limit.ceiling_burst) <= MOST_BURST:
        return limit
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
    above, below = _decimal(burst_s).as_integer_ratio()
    return Fraction(per_minute.numerator * above, per_minute.denominator * below * 60)


def _ceiling(tier: TierPolicy) -> Factor:
    return Factor("×", _decimal(tier.ceiling), "ceiling" if tier.share else "best-effort ceiling")


def _most(tier: TierPolicy, active_keys: int, supply: Supply) -> _Base:
    """All that one key may take: the tier's whole ceiling, or its part of an oversold one where that is less."""
    said = f"{number(supply.usable)} requests/s"
    if tier.oversell is None or tier.oversell >= active_keys:
        return _Base(supply.usable, said, (_ceiling(tier),))
    oversold = Factor("×", _decimal(tier.oversell), "oversell")
    keys = Factor("÷", Decimal(active_keys), "active keys")
    return _Base(supply.usable, said, (_ceiling(tier), oversold, keys))


class _Bounds(NamedTuple):
    """The least and the most that a limit may be, by policy; ``kept`` of the least is what the pool can give."""

    least: int | None
    kept: Decimal
    most: int | None

    def apply(self, amount: int) -> tuple[int, str]:
        """The amount within the bounds, and how that is said."""
        text = ""
        if self.least is not None:
            least = self.least if self.kept == 1 else shown(self.least * Fraction(self.kept))
            part = "" if self.kept == 1 else f", {number(self.kept)} of {self.least:,}"
            amount, text = max(amount, least), f", at least {least:,} (the tier's minimum{part})"
        if self.most is not None:
            amount, text = min(amount, self.most), f"{text}, at most {self.most:,} (the tier's maximum)"
        return amount, f"{text} → {amount:,}" if text else ""

    def clamp(self, exact: Fraction) -> Fraction:
        """The exact value within the same bounds."""
        if self.least is not None:
            exact = max(exact, self.least * Fraction(self.kept))
        return exact if self.most is None else min(exact, Fraction(self.most))


_NO_BOUNDS = _Bounds(None, Decimal(1), None)


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


@lru_cache(maxsize=1024)
def _rated(name: LimitName, base: _Base, size: Factor, lengths: Lengths, burst_s: float, bounds: _Bounds) -> _Rated:
    """A rate per minute; its burst is ``burst_s`` of it, or one p99 request where that is more.

    ``size`` is that of a mean request in this limit's unit. Kept, since tiers of one promise often have one ceiling.
    """
    big = _big(lengths.big_requests, size.value)
    factors = (*base.factors, size, Factor("×", Decimal(60), "s"))
    exact = product(base.start, factors)
    rounded = shown(exact)
    per_minute, bounded = bounds.apply(rounded)
    burst = max(shown(burst_of(bounds.clamp(exact), burst_s)), big)
    text = formula(base.said, factors, exact)
    return _Rated(
        name,
        per_minute,
        burst,
        f"{text} → {rounded:,}/min{bounded}; burst {burst:,}: {number(_decimal(burst_s))} s of it, at least {big:,} "
        f"({number(lengths.big_requests)} mean requests, the p{BURST_PERCENTILE})",
    )


@lru_cache(maxsize=256)
def _big(requests: Decimal, size: Decimal) -> int:
    return shown_up(Fraction(requests) * Fraction(size))


def _plain(supply: Supply, rated: _Rated) -> Limit:
    return Limit(rated.name, rated.per_minute, rated.burst, f"{supply.text}\n{rated.text}")


def _in_two_colours(supply: Supply, assured: _Rated, ceiling: _Rated) -> Limit:
    """The ceiling is at least what is assured: a minimum may lift that above it."""
    return Limit(
        assured.name,
        assured.per_minute,
        assured.burst,
        f"{supply.text}\nassured: {assured.text}\nceiling, while others leave it idle: {ceiling.text}",
        ceiling_per_minute=max(ceiling.per_minute, assured.per_minute),
        ceiling_burst=max(ceiling.burst, assured.burst),
    )


def _lifted(tier: TierPolicy, active_keys: int, supply: Supply, limit: Limit, ceiling: _Rated) -> Limit:
    """As ``_together``, where one key alone may take only a part of the tier's ceiling."""
    if not limit.ceiling_per_minute:
        text = f"{supply.text}\nall keys of {tier.name} together: {ceiling.text}"
        return Limit(ceiling.name, ceiling.per_minute, ceiling.burst, text, per="tier")
    whole = msgspec.structs.replace(limit, ceiling_per_minute=ceiling.per_minute, ceiling_burst=ceiling.burst)
    together = added_up(tier.name, active_keys, whole)
    text = f"{together.explanation}\nthat ceiling without bounds: {ceiling.text}"
    return msgspec.structs.replace(together, explanation=f"{supply.text}\n{text}")


def _together(tier: TierPolicy, active_keys: int, limit: Limit) -> Limit:
    """A key's limit as that of all the tier's keys; without two colours one key alone may take what all may."""
    if limit.ceiling_per_minute:
        return added_up(tier.name, active_keys, limit)
    text = f"all keys of {tier.name} together: what one alone may take → {amount_text(limit)}"
    return msgspec.structs.replace(limit, per="tier", explanation=text)


def added_up(tier: str, keys: int, limit: Limit, why: str = "") -> Limit:
    """The limit of all of a tier's ``keys`` together: what each is assured added up, under the ceiling of one alone."""
    per_minute, burst = keys * limit.per_minute, keys * limit.burst
    two_colours = limit.ceiling_per_minute > 0
    together = msgspec.structs.replace(
        limit,
        per="tier",
        per_minute=per_minute,
        burst=burst,
        ceiling_per_minute=max(per_minute, limit.ceiling_per_minute) if two_colours else 0,
        ceiling_burst=max(burst, limit.ceiling_burst) if two_colours else 0,
    )
    ceiling = ", and the ceiling that one alone has (at least what is assured)" if two_colours else ""
    text = (
        f"all keys of {tier} together: {keys:,} × what each is assured{ceiling}{why}; of each: {amount_text(limit)} "
        f"→ {amount_text(together)}"
    )
    return msgspec.structs.replace(together, explanation=text)


def _concurrency(supply: Supply, most: _Base, request_burst: int, bounds: _Bounds) -> Limit:
    """Little's law: the most that the key may take × the time a request may stay within the SLO, with headroom."""
    residence = Factor("×", supply.residence_s, supply.residence_text)
    factors = (*most.factors, residence, Factor("×", Decimal(CONCURRENCY_HEADROOM), "headroom over the mean"))
    exact = product(most.start, factors)
    least = max(LEAST_CONCURRENCY, request_burst)
    rounded = max(shown(exact), least)
    in_flight, bounded = bounds.apply(rounded)
    text = formula(most.said, factors, exact)
    return Limit(
        "concurrency",
        0,
        in_flight,
        f"{supply.text}\n{text} → {rounded:,} in flight, at least {least:,} (a burst of requests){bounded}",
    )


def nearest_rank(values: Iterable[T], percentile: int) -> T:
    """The smallest value that ``percentile`` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[ceil(len(ordered) * percentile / 100) - 1]


@lru_cache(maxsize=256)
def _decimal(value: float) -> Decimal:
    """The decimal that the operator wrote."""
    return Decimal(str(value))
