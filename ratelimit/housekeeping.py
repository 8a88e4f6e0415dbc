"""What runs beside the controller, where the state folder is: ended leases, usage records, the last uses of keys."""

from __future__ import annotations

from collections.abc import Coroutine

from redis.asyncio import Redis

from ratelimit.keyuse import KeyUseCopier
from ratelimit.knowncells import KnownCells
from ratelimit.reaper import Reaper
from ratelimit.usagedrain import UsageDrain
from ratelimit.watch import ConfigWatch


def housekeeping(redis: Redis, watch: ConfigWatch) -> tuple[Coroutine[None, None, None], ...]:
    """Each to be run until cancelled; all outlive a Redis that is away."""
    state_dir = watch.config.state_dir

    cells = KnownCells(redis, lambda: [pool.model for pool in watch.config.pools], state_dir)
    return (
        cells.run(),
        Reaper(redis, cells.names).run(),
        UsageDrain(redis, cells.names, state_dir).run(),
        KeyUseCopier(redis, state_dir).run(),
    )
