"""What one round of the controller derives from, and how two of them differ. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from ratelimit.groupsupply import GroupSupply, Trim
from ratelimit.overrides import Override
from ratelimit.policy import Policy
from ratelimit.publication import Publication
from serving.fleet import ReplicaSpec, ReplicaStatus
from serving.health import ReplicaHealth


class FleetNow(NamedTuple):
    """The health of every watched replica at one moment (monotonic seconds), by URL, and the trims, by model."""

    health: Mapping[str, ReplicaHealth]
    now_s: float
    trims: Mapping[str, Trim]

    def statuses(self, specs: Iterable[ReplicaSpec]) -> list[ReplicaStatus]:
        """What these replicas' health is, where there is one at their URL."""
        return [ReplicaStatus(spec, self.health[spec.url]) for spec in specs if spec.url in self.health]


class Inputs(msgspec.Struct, frozen=True):
    """All that limits are derived from; equal ones give equal limits."""

    policy: Policy
    supplies: Mapping[str, tuple[GroupSupply, ...]]
    counted: frozenset[str]
    specs: tuple[ReplicaSpec, ...]
    active_keys: Mapping[tuple[str, str], int]
    overrides: tuple[Override, ...]
    trims: Mapping[str, Trim]


def what_changed(before: Inputs | None, now: Inputs) -> str:
    """Why limits are derived anew, in words for the log and for `explain`."""
    if before is None:
        return "the controller started"
    changes = [f"{url} joined" for url in sorted(now.counted - before.counted)]
    changes += [f"{url} left" for url in sorted(before.counted - now.counted)]
    changes += ["the config changed"] if (now.policy, now.specs) != (before.policy, before.specs) else []
    changes += ["supplies changed"] if not changes and now.supplies != before.supplies else []
    changes += [
        _trim_text(model, now.trims) for model in now.supplies if now.trims.get(model) != before.trims.get(model)
    ]
    changes += ["active keys changed"] if now.active_keys != before.active_keys else []
    changes += ["overrides changed"] if now.overrides != before.overrides else []
    return ", ".join(changes) or "Redis had lost the limits"


def _trim_text(model: str, trims: Mapping[str, Trim]) -> str:
    return (
        f"the supply of {model} is trimmed to {trims[model].factor:g}"
        if model in trims
        else f"{model} is trimmed no more"
    )


def same_limits(one: Publication, other: Publication | None) -> bool:
    """Whether two publications differ at most in epoch, time and reason."""
    if other is None:
        return False
    return msgspec.structs.replace(one, epoch=0, published_at="", reason="") == msgspec.structs.replace(
        other, epoch=0, published_at="", reason=""
    )
