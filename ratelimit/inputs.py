"""What one round of the controller derives from, and how two of them differ. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

import msgspec

from ratelimit.groupsupply import GroupSupply, Trim
from ratelimit.overrides import Override
from ratelimit.policy import Policy
from ratelimit.publication import Publication
from serving.fleet import ReplicaSpec, ReplicaStatus
from serving.health import MOST_FLAP_DELAY_S, raise_delay_s


class FleetNow(msgspec.Struct, frozen=True, eq=False):
    """Every watched replica at one moment (monotonic seconds), by URL, and the trims, by model.

    The same object while nothing of it changes: a round that finds it, and the same decisions, has nothing to do.
    """

    by_url: Mapping[str, ReplicaStatus]
    now_s: float
    trims: Mapping[str, Trim]

    def statuses(self, specs: Iterable[ReplicaSpec]) -> list[ReplicaStatus]:
        """What these replicas' health is, where there is one at their URL."""
        pairs = ((spec, self.by_url.get(spec.url)) for spec in specs)
        return [
            status if status.spec is spec else ReplicaStatus(spec, status.health)
            for spec, status in pairs
            if status is not None
        ]

    def next_raise_s(self, raise_after_s: Mapping[str, float]) -> float:
        """When the next replica will have been healthy for long enough to count; infinity where none waits for that."""
        # Most have been healthy for long, and a look at their time alone is all that they cost.
        since_s = self.now_s - max([MOST_FLAP_DELAY_S, *raise_after_s.values()])
        recent = [s for s in self.by_url.values() if s.health.since_s >= since_s]
        healthy = [s for s in recent if s.health.phase == "healthy" and s.spec.model in raise_after_s]
        times_s = (s.health.since_s + raise_delay_s(raise_after_s[s.spec.model], s.health.losses) for s in healthy)
        return min((at_s for at_s in times_s if at_s > self.now_s), default=inf)


def counted(
    statuses: Iterable[ReplicaStatus], before: frozenset[str], raise_after_s: Mapping[str, float], now_s: float
) -> frozenset[str]:
    """The URLs of the replicas that count towards capacity.

    A healthy one that counted before still does; a new one does after ``raise_after_s`` of its model, or at once
    where no other of its model counts, for then it takes nothing back that was promised.
    """
    healthy = [status for status in statuses if status.health.phase == "healthy"]
    kept = before.intersection([status.spec.url for status in healthy])
    if len(kept) == len(healthy):
        return kept
    new = [status for status in healthy if status.spec.url not in kept]
    served = {
        model
        for model in {status.spec.model for status in new}
        if any(status.spec.model == model and status.spec.url in kept for status in healthy)
    }
    return kept.union(
        status.spec.url
        for status in new
        if status.spec.model not in served or status.health.has_stayed(raise_after_s[status.spec.model], now_s)
    )


class Inputs(msgspec.Struct, frozen=True):
    """All that limits are derived from; equal ones give equal limits. Of ``specs``, the config names ``configured``."""

    policy: Policy
    supplies: Mapping[str, tuple[GroupSupply, ...]]
    counted: frozenset[str]
    specs: tuple[ReplicaSpec, ...]
    configured: tuple[ReplicaSpec, ...]
    active_keys: Mapping[tuple[str, str], int]
    overrides: tuple[Override, ...]
    trims: Mapping[str, Trim]


def what_changed(before: Inputs | None, now: Inputs) -> str:
    """Why limits are derived anew, in words for the log and for `explain`."""
    if before is None:
        return "the controller started"
    changes = [f"{url} joined" for url in sorted(now.counted - before.counted)]
    changes += [f"{url} left" for url in sorted(before.counted - now.counted)]
    changes += ["the config changed"] if (now.policy, now.configured) != (before.policy, before.configured) else []
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
