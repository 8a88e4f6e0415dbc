"""Finds knees while another controller leads, so that a leader which takes over waits for none.

Until the knees of all its healthy replicas are known a new leader publishes nothing, and no limit falls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ratelimit.config import Config, policy_of
from ratelimit.policy import Promise, promises_of
from ratelimit.replicaspecs import pool_discoveries, replica_specs
from ratelimit.supply import Knees, SupplyBook
from serving.fleet import ReplicaSpec

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0


async def find_ahead(config: Callable[[], Config], knees: Knees, is_leading: Callable[[], bool]) -> None:
    """Find the knees of all that the config of the moment lets serve, one at a time, until cancelled.

    Not while this process leads itself: then its controller finds those that it needs first.
    """
    book, found_for = SupplyBook(lambda: None, knees), None
    while True:
        await asyncio.sleep(LOOK_INTERVAL_S)
        now = config()
        try:
            if now is not found_for and await _find_all(now, book, is_leading):
                found_for = now
        except ValueError as error:  # a profile's or a policy's
            log.error("no knees are found ahead: %s", error)
            found_for = now


async def _find_all(config: Config, book: SupplyBook, is_leading: Callable[[], bool]) -> bool:
    """Whether all are found. Raises ``ProfileError``."""
    kinds = _kinds(config)
    book.read({spec.profile for spec, _ in kinds})
    for spec, promises in kinds:
        for promise in promises:
            if is_leading():
                return False
            await book.find(spec, promise)
    return True


def _kinds(config: Config) -> list[tuple[ReplicaSpec, Sequence[Promise]]]:
    """One replica of each profile that a pool has or may discover, and its promises. Raises ``ProfileError``."""
    policy = policy_of(config)
    promises = {pool.model: promises_of(policy.tiers, pool) for pool in policy.pools}
    named = [(spec.model, spec.profile) for spec in replica_specs(config)]
    named += [(each.model, name) for each in pool_discoveries(config) for name in each.profiles.values()]
    return [(ReplicaSpec("any", model, "", profile), promises[model]) for model, profile in dict.fromkeys(named)]
