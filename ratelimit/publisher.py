"""Makes a publication known: in Redis, where gateways read it, and on disk, so that its epoch outlives Redis.

Redis names, shared with the gateways: ``penstock:publication`` (JSON), ``penstock:keys`` (hash: digest of the secret to
JSON ``KeyRecord``), and the channel ``penstock:changed``, on which "publication" or "keys" is said after a write.
``penstock:keys:used`` is the gateways' (hash: key id to the second since 1970 of its last use).
``penstock:keys:version`` is the publisher's own: which keys the hash holds. So is ``penstock:keys:next:…``: keys that
are about to take the place of those in force. They are written in slices, so that Redis stands still for nobody, then
all of them change at once; what a publisher leaves of them when it dies expires. A Redis has one publisher at a time,
the leader (see ``leadership``, which what it puts in force goes through): whatever else it is found to hold, for one
restarted from an old dump or failed over to a lagging replica does, is not what is in force.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from ratelimit.gateway.charges import work_charge
from ratelimit.keys import KeyRecord
from ratelimit.leadership import Draft, Writes
from ratelimit.meter import THOUSANDTHS, Role
from ratelimit.publication import Publication
from ratelimit.statefile import StateFile, StateFileError
from ratelimit.store import Store, StoreUnavailableError
from ratelimit.threads import to_its_end
from ratelimit.usereader import UseReader

log = logging.getLogger(__name__)

PUBLICATION_KEY = "penstock:publication"
KEYS_KEY = "penstock:keys"
KEYS_USED_KEY = "penstock:keys:used"
KEYS_VERSION_KEY = "penstock:keys:version"
CHANGED_CHANNEL = "penstock:changed"
STORE_TIMEOUT_S = 1.0


def published_file(state_dir: Path) -> StateFile[Publication]:
    """Where the newest publication is kept on disk."""
    return StateFile(state_dir / "publication.json", Publication)


def read_published(state_dir: Path) -> Publication | None:
    """The newest publication on disk, or ``None`` where there is none yet. Raises ``StateFileError``."""
    return next(iter(published_file(state_dir).read()), None)


#: Redis takes them in some milliseconds.
KEYS_AT_A_TIME = 1000
#: From one slice to the next, and to the change.
DRAFT_KEPT_MS = 60_000


class Lost(NamedTuple):
    """What Redis no longer holds as it was published."""

    publication: bool
    keys: bool


class Publisher:
    """Writes publications and keys to one Redis, in one term of a leader.

    Redis errors pass through: the caller tries again. So does ``NotLeadingError``: what is not led is not written.
    """

    def __init__(self, redis: Redis, state_dir: Path, leader: Writes) -> None:
        self._redis = redis
        self._leader = leader
        self._state_dir = state_dir
        self._newest_epoch = 0
        self._looked_for_epochs = False
        self._document: bytes | None = None
        self._keys: _KeysState | None = None
        self._left_behind = ""
        self._unsaved: Publication | None = None
        self._save_failure = ""

    def check_leading(self) -> None:
        """Raise ``NotLeadingError`` where nothing may be decided any more."""
        self._leader.check()

    def use_reader(self) -> UseReader:
        """What reads from the same Redis which keys are in use."""
        return UseReader(self._redis)

    async def next_epoch(self, above: int = 0) -> int:
        """An epoch ``above`` all that were given out, by this publisher or by others that left one on disk or in Redis.

        Raises ``StateFileError`` where the file on disk cannot be understood when it is first asked for.
        """
        if not self._looked_for_epochs:
            on_disk = read_published(self._state_dir)
            self._note_epoch(on_disk.epoch if on_disk else 0)
            self._note_epoch(_epoch_of(await self._redis.get(PUBLICATION_KEY)))
            self._looked_for_epochs = True
        self._note_epoch(above)
        return self._newest_epoch + 1

    async def newest(self) -> Publication | None:
        """The limits in force before anything is published here: what Redis holds, else what the disk does.

        None where there are none, or nothing that can be understood.
        """
        document = await self._redis.get(PUBLICATION_KEY)
        try:
            if document is not None:
                return msgspec.json.decode(document, type=Publication)
            return await asyncio.to_thread(read_published, self._state_dir)
        except (msgspec.DecodeError, StateFileError) as error:
            log.error("the limits of before cannot be read: %s", error)
            return None

    async def epoch_in_redis(self) -> int:
        """The epoch that Redis holds now; 0 where it holds none."""
        return _epoch_of(await self._redis.get(PUBLICATION_KEY))

    async def publish(self, publication: Publication) -> None:
        """Make these limits the ones in force.

        They are in force once Redis has them. The disk follows, now or by a later ``save``. The epoch counts as given
        out before Redis is asked: an error may come after Redis took the publication.
        """
        self._note_epoch(publication.epoch)
        document = msgspec.json.encode(publication)
        await self._leader.write(("SET", PUBLICATION_KEY, document), ("PUBLISH", CHANGED_CHANNEL, "publication"))
        self._document = document
        self._unsaved = publication
        await to_its_end(self.save)
        await self._configure(publication)

    async def _configure(self, publication: Publication) -> None:
        """Tell the pools' buckets too, so that what is left of them is right before the next request comes.

        Where Redis does not answer, that request tells them. No fence is needed: a bucket keeps to its newest epoch.
        """
        for pool in publication.pools:
            bucket = work_charge(pool, Role.POOL, THOUSANDTHS)
            try:
                await Store(self._redis, pool.model, STORE_TIMEOUT_S).configure([bucket], publication.epoch)
            except StoreUnavailableError as error:
                log.warning("the pool of %s takes up its limits with its next request: %s", pool.model, error)

    def save(self) -> None:
        """Write to disk what is not there yet; a failure is logged once, and the next call tries again."""
        if self._unsaved is None:
            return
        try:
            with published_file(self._state_dir).changing() as newest:
                # A leader that slept since it published has another's after its own.
                newest[:] = [max([self._unsaved, *newest], key=lambda each: each.epoch)]
        except (StateFileError, OSError) as error:
            if str(error) != self._save_failure:
                log.error("the limits are in force but not on disk: %s", error)
            self._save_failure = str(error)
        else:
            self._unsaved, self._save_failure = None, ""

    async def publish_keys(self, records: Iterable[KeyRecord]) -> None:
        """Make exactly these API keys the known ones, all at once."""
        by_digest = await asyncio.to_thread(lambda: {record.digest: record for record in records})
        draft = Draft(f"{KEYS_KEY}:next:{token_hex(8)}", len(by_digest))  # never again: a late slice harms no other
        if self._left_behind:
            await self._redis.unlink(self._left_behind)
        self._left_behind = draft.key
        version = await self._drafted(draft.key, list(by_digest.values()))
        await self._leader.replace(
            KEYS_KEY, draft, ("SET", KEYS_VERSION_KEY, version), ("PUBLISH", CHANGED_CHANNEL, "keys")
        )
        self._left_behind = ""
        self._keys = _KeysState(version.encode(), draft.fields)

    async def _drafted(self, key: str, records: Sequence[KeyRecord]) -> str:
        """Write them there; their version. In slices and off the loop: there may be some 100,000, and leases to renew.

        This needs no fence, for nobody reads it.
        """
        version = hashlib.sha256()
        for start in range(0, len(records), KEYS_AT_A_TIME):
            self._leader.check()
            fields = await asyncio.to_thread(_fields, records[start : start + KEYS_AT_A_TIME])
            version.update(b"".join(fields))
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(key, items=fields)
                pipe.pexpire(key, DRAFT_KEPT_MS)
                await pipe.execute()
        return version.hexdigest()

    async def lost(self) -> Lost:
        """What Redis no longer holds of what this publisher has published, as after a restart or a failover."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.get(PUBLICATION_KEY)
            pipe.get(KEYS_VERSION_KEY)
            pipe.hlen(KEYS_KEY)
            document, *keys = await pipe.execute()
        publication = self._document is not None and document != self._document
        if publication:
            self._note_epoch(_epoch_of(document))
        return Lost(publication, self._keys is not None and tuple(keys) != self._keys)

    def _note_epoch(self, epoch: int) -> None:
        self._newest_epoch = max(self._newest_epoch, epoch)


class _KeysState(NamedTuple):
    version: bytes
    known: int


def _fields(records: Sequence[KeyRecord]) -> list[bytes]:
    """Field and value in turn."""
    return [part for record in records for part in (record.digest.encode(), msgspec.json.encode(record))]


class _EpochOnly(msgspec.Struct):
    epoch: int


def _epoch_of(document: bytes | str | None) -> int:
    """The epoch of what Redis holds; 0 where that is nothing, or nothing that anyone published."""
    if document is None:
        return 0
    try:
        return msgspec.json.decode(document, type=_EpochOnly).epoch
    except msgspec.DecodeError as error:
        log.error("%s in Redis is damaged and will be replaced: %s", PUBLICATION_KEY, error)
        return 0
