"""The formula of the recording rules ``penstock:replicas_needed`` and ``penstock:pool_replicas_needed``, in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

_Gpu = TypeVar("_Gpu")


def replicas_needed(count: float, demand: float, usable: float, adds: float) -> float:
    """The replicas of one GPU type that the demand needs; one more adds ``adds``. All in requests/s of the mix."""
    return max(0.0, count + (demand - usable) / adds)


def pool_replicas_needed(
    counts: Mapping[_Gpu, float], demand: float, usable: float, adds: Mapping[_Gpu, float]
) -> float:
    """The same of a whole pool, its GPU types in their proportions; in equal ones where there is no replica."""
    total = sum(counts.values())
    weighted = sum(counts[gpu] * adds[gpu] for gpu in counts)
    one = weighted / total if total else sum(adds.values()) / len(adds)
    return max(0.0, total + (demand - usable) / one)
