"""The groups of a fleet by GPU type, with what those of one type serve together of every promise.

A pool's supply is made of these sums. They are kept between derivations, so that a replica that comes or goes has those
of its own GPU type found again, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cached_property, lru_cache
from operator import is_

import msgspec

from ratelimit.explain import number
from ratelimit.groupsupply import GroupSupply
from ratelimit.policy import Promise

#: In the text of a sum, this many profiles are named.
MOST_SOURCES = 3
#: GPU types that are kept, with all their groups: those of a fleet as it is and as it was.
_TYPES = 16


class AbleGroups(msgspec.Struct, frozen=True, dict=True, eq=False):
    """The groups of one GPU type that can meet a promise, one at least; in columns what each is worth (``Worth``)."""

    groups: Sequence[GroupSupply]
    of_one: Sequence[Decimal]
    of_all: Sequence[Decimal]
    of_full_domain: Sequence[float]

    @cached_property
    def total(self) -> Decimal:
        """The requests/s of all of them."""
        return sum(self.of_all, Decimal(0))

    @cached_property
    def most_of_one(self) -> Decimal:
        """The requests/s of the largest replica."""
        return max(self.of_one)

    @cached_property
    def slowest(self) -> float:
        """The largest slowdown."""
        return max([group.slowdown for group in self.groups])

    @cached_property
    def text(self) -> str:
        """What they serve, in one addend."""
        count = sum([group.group.count for group in self.groups])
        found = sorted({group.provenance for group in self.groups})
        more = f" and {len(found) - MOST_SOURCES} more" if len(found) > MOST_SOURCES else ""
        return (
            f"{number(self.total)} requests/s by {count:,} {self.groups[0].gpu} "
            f"[{'; '.join(found[:MOST_SOURCES])}{more} in {len(self.groups):,} groups]"
        )

    @cached_property
    def dearest_first(self) -> Sequence[int]:
        """The groups by what a full domain of them serves."""
        return sorted(range(len(self.groups)), key=self.of_full_domain.__getitem__, reverse=True)


class GpuType:
    """The groups of one GPU type, and for each promise what those that can meet it are worth, found once.

    It is its own key: two are equal where their groups are the very same objects, which as mappings have no hash.
    """

    def __init__(self, groups: Sequence[GroupSupply]) -> None:
        self.groups = groups
        self._hash = hash(tuple(map(id, groups)))
        self._able: dict[Promise, AbleGroups | None] = {}

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GpuType):
            return NotImplemented
        return len(self.groups) == len(other.groups) and all(map(is_, self.groups, other.groups))

    def able(self, promise: Promise) -> AbleGroups | None:
        """Those that can meet the promise; None where there are none."""
        if promise not in self._able:
            self._able[promise] = _able(promise, self.groups)
        return self._able[promise]


def by_gpu(groups: Iterable[GroupSupply]) -> list[GpuType]:
    """The groups of a fleet by GPU type, of each type as they were found last where they are the same."""
    found: dict[str, list[GroupSupply]] = {}
    for group in groups:
        found.setdefault(group.gpu, []).append(group)
    return [_kept(GpuType(those)) for _, those in sorted(found.items())]


def clear_gpu_types() -> None:
    """Forget all that is kept, as in a process that has just started."""
    _kept.cache_clear()


@lru_cache(maxsize=_TYPES)
def _kept(gpu_type: GpuType) -> GpuType:
    return gpu_type


def _able(promise: Promise, groups: Sequence[GroupSupply]) -> AbleGroups | None:
    worths = [group.worth.get(promise) for group in groups]
    found = [worth for worth in worths if worth]
    if len(found) < len(worths):
        groups = [group for group, worth in zip(groups, worths, strict=True) if worth]
    return AbleGroups(groups, *zip(*found, strict=True)) if found else None
