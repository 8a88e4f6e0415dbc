"""Makes a publication known: in Redis, where gateways read it, and on disk, from where an empty Redis is refilled.

Redis names, shared with the gateways: ``penstock:publication`` (JSON), ``penstock:keys`` (hash: digest of the secret to
JSON ``KeyRecord``), and the channel ``penstock:changed``, on which "publication" or "keys" is said after a write.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
from redis.asyncio import Redis

from ratelimit.keys import KeyRecord
from ratelimit.publication import Publication
from ratelimit.statefile import StateFile

PUBLICATION_KEY = "penstock:publication"
KEYS_KEY = "penstock:keys"
CHANGED_CHANNEL = "penstock:changed"


def published_file(state_dir: Path) -> StateFile[Publication]:
    """Where the newest publication is kept on disk."""
    return StateFile(state_dir / "publication.json", Publication)


def read_published(state_dir: Path) -> Publication | None:
    """The newest publication on disk, or ``None`` where there is none yet. Raises ``StateFileError``."""
    return next(iter(published_file(state_dir).read()), None)


#: What redis-py takes for a hash's fields and values; its mapping type is invariant.
_Encodable = bytes | bytearray | memoryview | str | int | float


class Publisher:
    """Writes publications and keys to one Redis. Redis errors pass through: the caller tries again."""

    def __init__(self, redis: Redis, state_dir: Path) -> None:
        self._redis = redis
        self._state_dir = state_dir

    async def newest_epoch(self) -> int:
        """The highest epoch known on disk or in Redis, so that no epoch is ever given out twice."""
        on_disk = read_published(self._state_dir)
        in_redis = await self._redis.get(PUBLICATION_KEY)
        epochs = [on_disk.epoch if on_disk else 0]
        if in_redis is not None:
            epochs.append(msgspec.json.decode(in_redis, type=_EpochOnly).epoch)
        return max(epochs)

    async def publish(self, publication: Publication) -> None:
        """Make these limits the ones in force."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(PUBLICATION_KEY, msgspec.json.encode(publication))
            pipe.publish(CHANGED_CHANNEL, "publication")
            await pipe.execute()
        with published_file(self._state_dir).changing() as newest:
            newest[:] = [publication]

    async def publish_keys(self, records: Iterable[KeyRecord]) -> None:
        """Make exactly these API keys the known ones."""
        fields: dict[_Encodable, _Encodable] = {record.digest: msgspec.json.encode(record) for record in records}
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(KEYS_KEY)
            if fields:
                pipe.hset(KEYS_KEY, mapping=fields)
            pipe.publish(CHANGED_CHANNEL, "keys")
            await pipe.execute()

    async def is_missing(self) -> bool:
        """Whether Redis has lost the publication, as one restarted empty has."""
        return not await self._redis.exists(PUBLICATION_KEY)


class _EpochOnly(msgspec.Struct):
    epoch: int
