"""What a gateway knows of the world: the newest publication and the API keys, read from Redis and swapped whole.

Changes are announced on a channel; a read every second catches what an announcement missed. While Redis is away the
last good state stays in force, and so it does while Redis has lost the publication. A publication that this version
cannot read is counted, logged once and left aside; so is a single key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from time import time

import msgspec
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    MasterDownError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from ratelimit.gateway.activity import Activity
from ratelimit.gateway.charges import check_countable
from ratelimit.gateway.errors import model_not_found, reduced_capacity, unauthorized
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.presence import Presence
from ratelimit.gateway.settings import new_gateway_id
from ratelimit.gateway.terms import Terms, TermsBook
from ratelimit.keys import KeyRecord, find, status
from ratelimit.publication import Publication
from ratelimit.publisher import CHANGED_CHANNEL, KEYS_KEY, PUBLICATION_KEY

log = logging.getLogger(__name__)

_RETRY_WHILE_EMPTY_US = 1_000_000
_REFRESH_TIMEOUT_S = 5.0
#: What Redis answers for a while, to everybody: by class where redis-py has one, else by its first word.
_PASSING = (MasterDownError, ReadOnlyError)
_PASSING_WORDS = frozenset({"BUSY", "UNKILLABLE", "LOADING", "MASTERDOWN", "READONLY", "MISCONF", "OOM", "NOREPLICAS"})


class RedisRefusesError(RuntimeError):
    """Redis is there and does not let us read: waiting would not mend that. The message is Redis's own."""


class Directory:
    """The publication and the keys in force; ``presence`` and ``activity`` are told which keys are used."""

    def __init__(
        self, redis: Redis, metrics: GatewayMetrics, poll_interval_s: float = 1.0, presence: Presence | None = None
    ) -> None:
        self.presence = presence or Presence(redis, new_gateway_id(), metrics)
        self.activity = Activity(redis, metrics)
        self._redis = redis
        self._metrics = metrics
        self._poll_interval_s = poll_interval_s
        self._document: bytes | None = None
        self._key_documents: Mapping[bytes, bytes] = {}
        self._keys: dict[str, KeyRecord] = {}
        self._terms: TermsBook | None = None
        self._changed = asyncio.Event()
        self._failed: set[str] = set()
        self.publication: Publication | None = None
        #: Whether limits were ever in force while a pool had a replica.
        self.could_serve = False

    @property
    def redis_is_away(self) -> bool:
        """Whether the last attempt to read failed."""
        return "redis" in self._failed

    @property
    def is_unreadable(self) -> bool:
        """Whether what is published now cannot be read."""
        return "publication" in self._failed

    @property
    def ready(self) -> bool:
        """Whether a publication has been read."""
        return self.publication is not None

    def records(self) -> tuple[KeyRecord, ...]:
        """Every secret of every key that is known, whatever its status."""
        return tuple(self._keys.values())

    def authenticate(self, secret: str | None) -> KeyRecord:
        """The active key of a secret as it was presented; raises ``Rejection`` (401), the same for every reason."""
        record = None if secret is None else find(self._keys, secret)
        if record is None or status(record, time()) != "active":
            raise unauthorized()
        self.presence.note_use(record.id)
        return record

    def terms(self, record: KeyRecord, model: str) -> Terms:
        """The terms for a key and a model; raises ``Rejection`` (404, or 503 before the first publication)."""
        if self.publication is None or self._terms is None:
            raise reduced_capacity("The gateway has not read the limits yet.", _RETRY_WHILE_EMPTY_US, "publication")
        terms = self._terms.find(record.id, record.org, record.tier, model)
        if terms is None or not self.publication.allows(record.org, model):
            raise model_not_found(model)
        return terms

    def every_tier(self) -> list[Terms]:
        """The terms of each tier for each model; without those of the rules that name orgs or keys."""
        return [] if self._terms is None else list(self._terms.each_tier().values())

    def models(self, record: KeyRecord) -> list[str]:
        """The models that a key may use."""
        published, terms = self.publication, self._terms
        if published is None or terms is None:
            return []
        return [model for model in terms.models(record.tier) if published.allows(record.org, model)]

    async def refresh(self) -> None:
        """Read both documents, and swap in what changed. Raises ``RedisError``."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.get(PUBLICATION_KEY)
            pipe.hgetall(KEYS_KEY)
            document, key_documents = await pipe.execute()
        if document is None:  # Redis came back empty, or was never filled: the keys are as little to be believed
            return
        if document != self._document:
            self._document = document
            try:
                self._swap_publication(document)
            except ValueError as error:  # msgspec's are ValueErrors too
                self._note_failure("publication", error)
            else:
                self._failed.discard("publication")
        if key_documents != self._key_documents:
            self._key_documents = key_documents
            self._swap_keys(key_documents)

    def _swap_publication(self, document: bytes) -> None:
        publication = msgspec.json.decode(document, type=Publication)
        check_countable(publication)
        self._terms = TermsBook(publication)
        self.publication = publication
        self.could_serve = self.could_serve or any(pool.replicas for pool in publication.pools)
        self._metrics.published(publication)

    def _swap_keys(self, documents: Mapping[bytes, bytes]) -> None:
        records: list[KeyRecord] = []
        unreadable: ValueError | None = None
        for document in documents.values():
            try:
                records.append(msgspec.json.decode(document, type=KeyRecord))
            except ValueError as error:
                unreadable = error
                self._metrics.directory_errors.labels("key").inc()
        self._keys = {record.digest: record for record in records}
        self._metrics.keys.set(len(records))
        if unreadable is None:
            self._failed.discard("keys")
        else:
            self._note_failure("keys", unreadable)

    def _note_failure(self, what: str, error: Exception) -> None:
        self._metrics.directory_errors.labels(what).inc()
        if what not in self._failed:
            log.error("cannot read %s, what was read before stays in force: %s", what, error)
            self._failed.add(what)

    async def run(self) -> None:
        """Follow changes until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._poll())
            tasks.create_task(self.presence.run())
            tasks.create_task(self.activity.run())

    async def read_first(self) -> None:
        """Read for the first time, or note that Redis is away. Raises ``RedisRefusesError``."""
        try:
            await self._refresh_within()
        except (RedisError, OSError) as error:
            if _is_refusal(error) or _is_refusal(error.__cause__):  # redis-py wraps some
                raise RedisRefusesError(str(error)) from error
            self._note_failure("redis", error)

    async def _refresh_within(self) -> None:
        async with asyncio.timeout(_REFRESH_TIMEOUT_S):
            await self.refresh()
        self._failed.discard("redis")

    async def _poll(self) -> None:
        while True:
            try:
                await self._refresh_within()
            except (RedisError, OSError) as error:  # OSError: TimeoutError too
                self._note_failure("redis", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_s):
                    await self._changed.wait()
            self._changed.clear()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(CHANGED_CHANNEL)
                    self._failed.discard("announcements")
                    while True:
                        message = await pubsub.get_message(timeout=30.0)
                        if message is not None:
                            self._changed.set()
            except (RedisError, OSError) as error:
                self._note_failure("announcements", error)
                await asyncio.sleep(self._poll_interval_s)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether Redis is there and says no, and would say so again."""
    if isinstance(error, AuthenticationError | AuthorizationError):
        return True
    if not isinstance(error, ResponseError) or isinstance(error, _PASSING):
        return False
    return str(error).partition(" ")[0] not in _PASSING_WORDS
