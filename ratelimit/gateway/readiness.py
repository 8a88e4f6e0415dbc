"""Whether a gateway is to be sent requests, and why not. Pure.

Readiness latches. A gateway that could serve once stays ready while Redis is away, since it then serves from what it
knows, and while every replica is lost, since its refusal tells callers when to come back: if all gateways became
unready together, callers would meet a load balancer with nothing behind it. Only its own end makes it unready.
"""

from __future__ import annotations

import msgspec


class Readiness(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ``/health`` answers; ``why`` is empty where the gateway is ready."""

    ready: bool
    why: str = ""


READY = Readiness(True)
_DRAINING = Readiness(False, "This gateway is draining: it ends when its open requests have.")
_NO_REPLICA = Readiness(False, "Limits are in force, and no pool has had a replica yet.")
_NO_LIMITS = Readiness(False, "No limits have been published yet. The controller publishes them: see its log.")
_UNREADABLE = Readiness(
    False, "Limits are published, and this gateway cannot read them: its log says why. Is it older than the controller?"
)
_NO_REDIS = Readiness(False, "Redis has not answered yet, so no limits are known. The gateway's log says why.")


def readiness(
    *, draining: bool, could_serve: bool, has_limits: bool, redis_is_away: bool, is_unreadable: bool
) -> Readiness:
    """The rule. ``could_serve``: at some time limits were in force, and a pool had a replica.

    ``is_unreadable``: what is published is nothing that this version can read.
    """
    if draining:
        return _DRAINING
    if could_serve:
        return READY
    if has_limits:
        return _NO_REPLICA
    if is_unreadable:
        return _UNREADABLE
    return _NO_REDIS if redis_is_away else _NO_LIMITS
