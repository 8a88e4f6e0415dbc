"""When a replica takes requests: the rules, over plain observations.

    starting ──healthy probe──▶ healthy ──no token moves while work waits──▶ stuck
        ▲                        │    ▲                                       │
        └── (first seen)         │    └──────────── a token moves ────────────┘
                                 └── refused, or silent twice ──▶ down ──healthy probe──▶ healthy

vLLM's ``/health`` says 200 while its engine is frozen, so health alone proves nothing: a replica is stuck when it
holds work and neither its prompt nor its generation counter has moved for ``stuck_after_s``. The clock that this is
measured by starts when work is first seen without progress, never while the replica is idle.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ReplicaPhase = Literal["starting", "healthy", "stuck", "down"]

#: Probes in a row that may time out before a replica counts as down; a refused connection counts at once.
SILENT_PROBES_ALLOWED = 1


class Observation(msgspec.Struct, frozen=True):
    """What one probe saw at ``at_s``: how the replica answered, the work it holds, the tokens it has processed."""

    at_s: float
    answer: Literal["healthy", "refused", "silent"]
    requests_held: float = 0.0
    tokens_processed: float = 0.0


class ReplicaHealth(msgspec.Struct, frozen=True):
    """The phase a replica is in since ``since_s``, and what the next observation is compared with."""

    phase: ReplicaPhase = "starting"
    since_s: float = 0.0
    silent_probes: int = 0
    tokens_processed: float = -1.0
    progress_at_s: float = 0.0

    def healthy_for_s(self, now_s: float) -> float:
        """How long the replica has been healthy without a break; 0 if it is not."""
        return now_s - self.since_s if self.phase == "healthy" else 0.0


def observe(health: ReplicaHealth, seen: Observation, stuck_after_s: float) -> ReplicaHealth:
    """The health after one more observation."""
    if seen.answer == "silent" and health.silent_probes < SILENT_PROBES_ALLOWED:
        return msgspec.structs.replace(health, silent_probes=health.silent_probes + 1)
    if seen.answer != "healthy":
        phase: ReplicaPhase = "starting" if health.phase == "starting" else "down"
        return _enter(health, phase, seen.at_s, silent_probes=health.silent_probes)
    progressed = seen.requests_held == 0 or seen.tokens_processed != health.tokens_processed
    progress_at_s = seen.at_s if progressed else health.progress_at_s
    stuck = seen.at_s - progress_at_s >= stuck_after_s
    moved = msgspec.structs.replace(
        health, tokens_processed=seen.tokens_processed, progress_at_s=progress_at_s, silent_probes=0
    )
    return _enter(moved, "stuck" if stuck else "healthy", seen.at_s, silent_probes=0)


def _enter(health: ReplicaHealth, phase: ReplicaPhase, now_s: float, silent_probes: int) -> ReplicaHealth:
    since_s = health.since_s if phase == health.phase else now_s
    return msgspec.structs.replace(health, phase=phase, since_s=since_s, silent_probes=silent_probes)
