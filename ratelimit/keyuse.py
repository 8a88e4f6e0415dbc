"""When each key was last used: gateways say so in Redis, the controller keeps a copy in the state folder.

The command line reads the state folder only, and the copy outlives a Redis that lost everything.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.cancellation import is_cancelled
from ratelimit.keys import KeyFile
from ratelimit.publisher import KEYS_USED_KEY
from ratelimit.statefile import StateFile, StateFileError

log = logging.getLogger(__name__)

COPY_INTERVAL_S = 5.0
REDIS_TIMEOUT_S = 5.0
_TIME = re.compile(r"[0-9]{1,12}")


class KeyUse(msgspec.Struct, frozen=True):
    """A key's id and when it was last used, in whole seconds since 1970."""

    id: str
    used_at: int


def uses_file(state_dir: Path) -> StateFile[KeyUse]:
    """Where the copy is kept."""
    return StateFile(state_dir / "keys-used.json", KeyUse)


def last_uses(state_dir: Path) -> dict[str, int]:
    """The last use of each key that was ever used, by id. Raises ``StateFileError``."""
    return {use.id: use.used_at for use in uses_file(state_dir).read()}


async def read_uses(redis: Redis) -> dict[str, int]:
    """What the gateways have said. Raises ``RedisError``, or ``OSError``, of which ``TimeoutError`` is one."""
    async with asyncio.timeout(REDIS_TIMEOUT_S):
        said = await redis.hgetall(KEYS_USED_KEY)
    return {_text(key_id): used_at for key_id, told in said.items() if (used_at := told_time(told)) is not None}


def told_time(told: bytes | str | None) -> int | None:
    """Seconds since 1970 as Redis holds them; None where there are none, or what is there is no time."""
    text = _text(told or b"")
    return int(text) if _TIME.fullmatch(text) else None


def merged(known: Mapping[str, int], said: Mapping[str, int], ids: Collection[str]) -> dict[str, int]:
    """The later of two uses of each key that there still is."""
    return {
        key_id: max(known.get(key_id, 0), said.get(key_id, 0))
        for key_id in sorted(ids)
        if key_id in known or key_id in said
    }


class KeyUseCopier:
    """Copies the last uses from Redis into the state folder, and forgets those of keys that are gone."""

    def __init__(self, redis: Redis, state_dir: Path) -> None:
        self._redis = redis
        self._state_dir = state_dir
        self._copied: dict[str, int] | None = None
        self._failure = ""

    async def run(self) -> None:
        """Copy every few seconds what has changed, until cancelled. A fault is logged once, and tried again."""
        while not is_cancelled():
            try:
                await self.round()
            except (RedisError, OSError, StateFileError) as error:  # OSError: TimeoutError too
                if str(error) != self._failure:
                    log.error("when keys were last used is not noted: %s", error)
                self._failure = str(error)
            else:
                self._failure = ""
            await asyncio.sleep(COPY_INTERVAL_S)

    async def round(self) -> None:
        """Copy once. Raises ``RedisError``, ``OSError`` or ``StateFileError``."""
        said = await read_uses(self._redis)
        ids = {record.id for record in KeyFile(self._state_dir).records()}
        known = last_uses(self._state_dir) if self._copied is None else self._copied
        uses = merged(known, said, ids)
        if uses != self._copied:
            with uses_file(self._state_dir).changing() as kept:
                kept[:] = [KeyUse(key_id, used_at) for key_id, used_at in uses.items()]
            self._copied = uses
        if gone := said.keys() - ids:
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                await self._redis.hdel(KEYS_USED_KEY, *gone)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
