"""The caller's own limits, use and why: the body of ``GET /v1/limits``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import time
from typing import Any

from ratelimit.gateway.charges import charges_for, without_ceiling
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.errors import model_not_found
from ratelimit.gateway.headers import rfc3339
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.terms import Terms
from ratelimit.keys import KeyRecord
from ratelimit.meter import Charge, Reading
from ratelimit.publication import Limit

_UNITS = {
    "requests": "requests",
    "input_tokens": "tokens",
    "output_tokens": "tokens",
    "concurrency": "requests in flight",
}


def terms_asked(directory: Directory, record: KeyRecord, model: str | None) -> Terms:
    """The terms for ``model``, or for the first that the key may use; raises ``Rejection`` (404)."""
    if model is None:
        model = next(iter(directory.models(record)), "")
    if not model:
        raise model_not_found("(none)")
    return directory.terms(record, model)


def key_charges(record: KeyRecord, terms: Terms) -> tuple[Charge, ...]:
    """The caller's buckets, to be read: its limits, then their ceilings; without the pool's."""
    return charges_for(record.id, terms, Usage(0, 0), 0)[:-1]


def limits_body(record: KeyRecord, terms: Terms, readings: Sequence[Reading]) -> dict[str, Any]:
    """Each limit with what is left of it, in the order published.

    ``colour`` is what a request would be now, where there is room for it: green within what is assured, else borrowing.
    """
    now_s = time()
    ceilings = {without_ceiling(reading.bucket): reading for reading in readings[len(terms.limits) :]}
    told = list(zip(terms.limits, readings, strict=False))
    assured = [reading for limit, reading in told if limit.ceiling_per_minute]
    green = terms.assured and all(reading.remaining > 0 for reading in assured)
    return {
        "tier": record.tier,
        "org": record.org,
        "epoch": terms.epoch,
        "model": terms.pool.model,
        "enforced": terms.enforce and not terms.shadow,
        "colour": "green" if green else "borrowing",
        "limits": [_limit(limit, reading, ceilings, now_s) for limit, reading in told],
    }


def _limit(limit: Limit, reading: Reading, ceilings: Mapping[str, Reading], now_s: float) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": limit.name,
        "unit": _UNITS[limit.name],
        "per": limit.per,
        "window": limit.window,
        "per_minute": limit.per_minute,
        "burst": limit.burst,
        "remaining": reading.remaining,
        "reset_s": reading.reset_us / 1e6,
        "explanation": limit.explanation,
    }
    if limit.window != "minute":
        told["reset_at"] = rfc3339(now_s, reading.reset_us) if reading.reset_us else None
    ceiling = ceilings.get(reading.bucket)
    if ceiling is not None:
        told["ceiling"] = {
            "per_minute": limit.ceiling_per_minute,
            "burst": limit.ceiling_burst,
            "remaining": ceiling.remaining,
            "reset_s": ceiling.reset_us / 1e6,
        }
    return told
