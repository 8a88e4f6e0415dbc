"""When a replica takes requests: the rules, over plain observations.

    starting ──healthy probe──▶ healthy ──no step ends while work waits──▶ stuck
        ▲                        │    ▲                                     │
        └── (first seen)         │    └──────────── a step ends ────────────┘
                                 └── refused, or silent twice ──▶ down ──healthy probe──▶ healthy

vLLM's ``/health`` says 200 while its engine is frozen, so health alone proves nothing: a replica is stuck when it
holds work and no engine step has ended for ``stuck_after_s``, which must be longer than any step takes (see
``stuck_time_s``). The clock that this is measured by starts when work is first seen without progress, never while the
replica is idle.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from serving.capacity import EngineLimits, StepTimeModel, longest_step_s

ReplicaPhase = Literal["starting", "healthy", "stuck", "down"]

#: Probes in a row that may time out before a replica counts as down; a refused connection counts at once.
SILENT_PROBES_ALLOWED = 1

#: A replica is stuck only when it has not moved for this many of its longest steps: one may just have begun to wait
#: for the other when it was last seen to move, and the step-time model is a mean.
STEPS_BEFORE_STUCK = 2

#: A replica that was lost again is flapping, unless it had been healthy for this long before. Its delay until it counts
#: again doubles with each loss, up to the bound, from the configured one or the least where that is less.
FLAP_QUIET_S = 600.0
LEAST_FLAP_DELAY_S, MOST_FLAP_DELAY_S = 1.0, 600.0
_MOST_FLAPS = 32


class Observation(msgspec.Struct, frozen=True):
    """What one probe saw at ``at_s``: how the replica answered, the work it holds, and its progress.

    ``progress`` is any number that changes whenever an engine step ends; only whether it changed means something.
    """

    at_s: float
    answer: Literal["healthy", "refused", "silent"]
    requests_held: float = 0.0
    progress: float = 0.0


class ReplicaHealth(msgspec.Struct, frozen=True):
    """The phase a replica is in since ``since_s``, and what the next observation is compared with.

    ``losses`` counts how often it was lost without a quiet time in between; ``held_work``: when it was last seen.
    """

    phase: ReplicaPhase = "starting"
    since_s: float = 0.0
    silent_probes: int = 0
    progress: float = -1.0
    progress_at_s: float = 0.0
    losses: int = 0
    held_work: bool = False

    def healthy_for_s(self, now_s: float) -> float:
        """How long the replica has been healthy without a break; 0 if it is not."""
        return now_s - self.since_s if self.phase == "healthy" else 0.0

    def has_stayed(self, raise_after_s: float, now_s: float) -> bool:
        """Whether it has been healthy for so long, or if it flaps for as much longer, that it may count."""
        return self.phase == "healthy" and self.healthy_for_s(now_s) >= raise_delay_s(raise_after_s, self.losses)


def lost(health: ReplicaHealth, now_s: float) -> ReplicaHealth:
    """The health of a replica that is watched no longer."""
    phase: ReplicaPhase = "starting" if health.phase == "starting" else "down"
    return _enter(health, phase, now_s, silent_probes=0)


def found_again(before: ReplicaHealth, now_s: float) -> ReplicaHealth:
    """The health of a replica that is watched again: nothing is known but how often it was lost, if not long ago."""
    quiet = now_s - before.since_s >= FLAP_QUIET_S
    return ReplicaHealth(since_s=now_s, losses=0 if quiet else before.losses)


def raise_delay_s(raise_after_s: float, losses: int) -> float:
    """How long a replica must be healthy before it counts: as configured, doubled by each loss after the first."""
    if losses < 2:
        return raise_after_s
    doubled = max(raise_after_s, LEAST_FLAP_DELAY_S) * 2 ** min(losses - 1, _MOST_FLAPS)
    return max(raise_after_s, min(float(doubled), MOST_FLAP_DELAY_S))


def observe(health: ReplicaHealth, seen: Observation, stuck_after_s: float) -> ReplicaHealth:
    """The health after one more observation."""
    if seen.answer == "silent" and health.silent_probes < SILENT_PROBES_ALLOWED:
        return msgspec.structs.replace(health, silent_probes=health.silent_probes + 1)
    if seen.answer != "healthy":
        phase: ReplicaPhase = "starting" if health.phase == "starting" else "down"
        return _enter(health, phase, seen.at_s, silent_probes=health.silent_probes)
    # In a large fleet probes are further apart than stuck_after_s: work that was not there yet has not waited so long.
    progressed = seen.requests_held == 0 or not health.held_work or seen.progress != health.progress
    progress_at_s = seen.at_s if progressed else health.progress_at_s
    stuck = seen.at_s - progress_at_s >= stuck_after_s
    moved = msgspec.structs.replace(
        health, progress=seen.progress, progress_at_s=progress_at_s, held_work=seen.requests_held > 0
    )
    return _enter(moved, "stuck" if stuck else "healthy", seen.at_s, silent_probes=0)


def stuck_time_s(configured_s: float, step_time: StepTimeModel, limits: EngineLimits) -> float:
    """How long a replica, slowed as it is, must rest with work before it is stuck: as configured, or longer if its
    longest steps are.
    """
    return max(configured_s, STEPS_BEFORE_STUCK * longest_step_s(step_time, limits))


def _enter(health: ReplicaHealth, phase: ReplicaPhase, now_s: float, silent_probes: int) -> ReplicaHealth:
    since_s = health.since_s if phase == health.phase else now_s
    losses = health.losses
    if health.phase == "healthy" and phase != "healthy":
        losses = 1 if health.healthy_for_s(now_s) >= FLAP_QUIET_S else losses + 1
    return msgspec.structs.replace(health, phase=phase, since_s=since_s, silent_probes=silent_probes, losses=losses)
