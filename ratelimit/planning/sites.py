"""The hardware of a plan: GPUs by type at each site, and what adding or losing some makes of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from re import fullmatch
from typing import NamedTuple

import msgspec

#: More GPUs of one type than this are a slip of the pen.
MOST_GPUS = 100_000_000
_MOST_DIGITS = 12


class FleetError(ValueError):
    """A fleet, or a change of it, that makes no sense; the message says how to mend it."""


class Site(msgspec.Struct, frozen=True):
    """GPUs by type at one place. ``joins``: not there yet before. ``power_limit_w``: what the place may draw in all."""

    name: str
    gpus: Mapping[str, int]
    joins: bool = False
    power_limit_w: float | None = None


class Change(msgspec.Struct, frozen=True):
    """So many GPUs of one type more (or, below 0, fewer); ``site`` None: at the last one that suits."""

    gpu: str
    count: int
    site: str | None = None


class Fleets(NamedTuple):
    """The hardware before and after; ``before`` is None where nothing changes. ``change`` says what does."""

    before: tuple[Site, ...] | None
    after: tuple[Site, ...]
    change: str = ""


def parse_changes(texts: Iterable[str], sign: int) -> list[Change]:
    """From ``H200=1000`` or ``SITE:H200=1000,H100=8``; ``sign`` is -1 for what is lost. Raises ``FleetError``."""
    changes = []
    for text in texts:
        for part in text.split(","):
            match = fullmatch(r"(?:(?P<site>.+):)?(?P<gpu>[A-Za-z0-9_-]+)=(?P<count>[0-9]+(?:_[0-9]+)*)", part.strip())
            if match is None or len(match["count"]) > _MOST_DIGITS or not (count := int(match["count"])):
                raise FleetError(
                    f"{part.strip()!r} is no change; write GPU=COUNT, such as H200=1000, or SITE:GPU=COUNT"
                )
            changes.append(Change(match["gpu"], sign * count, match["site"]))
    return changes


def fleets(sites: Sequence[Site], changes: Sequence[Change]) -> Fleets:
    """With changes: the whole fleet without and with them. Else, where sites join: the fleet without and with those."""
    if changes:
        changed = tuple(sites)
        for change in changes:
            changed = _changed(changed, change)
        return Fleets(tuple(sites), changed, ", ".join(f"{c.count:+,} {c.gpu}" for c in changes))
    joining = [site.name for site in sites if site.joins]
    if joining and len(joining) < len(sites):
        return Fleets(tuple(site for site in sites if not site.joins), tuple(sites), f"{', '.join(joining)} joins")
    return Fleets(None, tuple(sites))


def totals(sites: Iterable[Site]) -> dict[str, int]:
    """GPUs of each type at all sites together."""
    found: dict[str, int] = {}
    for site in sites:
        for gpu, count in site.gpus.items():
            found[gpu] = found.get(gpu, 0) + count
    return found


def _changed(sites: tuple[Site, ...], change: Change) -> tuple[Site, ...]:
    index = _place(sites, change)
    site = sites[index]
    left = site.gpus.get(change.gpu, 0) + change.count
    if left < 0:
        raise FleetError(
            f"{site.name} has {site.gpus.get(change.gpu, 0):,} {change.gpu}, so it cannot lose {-change.count:,}; "
            "lose at most those"
        )
    if left > MOST_GPUS:
        raise FleetError(f"{site.name} would have {left:,} {change.gpu}; a plan has at most {MOST_GPUS:,} of a type")
    replaced = msgspec.structs.replace(site, gpus={**site.gpus, change.gpu: left})
    return (*sites[:index], replaced, *sites[index + 1 :])


def _place(sites: Sequence[Site], change: Change) -> int:
    """The site named; else the last that has that type of GPU; else, to add some, the last."""
    names = [site.name for site in sites]
    if change.site is not None:
        if change.site not in names:
            raise FleetError(f"there is no site {change.site!r}; there are {', '.join(names)}")
        return names.index(change.site)
    having = [i for i, site in enumerate(sites) if site.gpus.get(change.gpu)]
    if having:
        return having[-1]
    if change.count < 0:
        raise FleetError(f"no site has {change.gpu} to lose; there are {', '.join(sorted(totals(sites)))}")
    return len(sites) - 1
