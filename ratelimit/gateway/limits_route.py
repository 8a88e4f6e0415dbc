"""The caller's own limits, use and why: the body of ``GET /v1/limits``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.gateway.charges import charges_for
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.errors import model_not_found
from ratelimit.gateway.hold import Usage
from ratelimit.gateway.terms import Terms
from ratelimit.keys import KeyRecord
from ratelimit.meter import Charge, Reading

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
    """The key's buckets, to be read; without the pool's."""
    return charges_for(record.id, terms, Usage(0, 0), 0)[:-1]


def limits_body(record: KeyRecord, terms: Terms, readings: Sequence[Reading]) -> dict[str, Any]:
    """Each limit with what is left of it, in the order published."""
    return {
        "tier": record.tier,
        "epoch": terms.epoch,
        "model": terms.pool.model,
        "limits": [
            {
                "name": limit.name,
                "unit": _UNITS[limit.name],
                "per_minute": limit.per_minute,
                "burst": limit.burst,
                "remaining": reading.remaining,
                "reset_s": reading.reset_us / 1e6,
                "explanation": limit.explanation,
            }
            for limit, reading in zip(terms.limits, readings, strict=True)
        ],
    }
