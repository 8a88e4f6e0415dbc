"""The keys in use by tier and model, from the key file and from what the gateways say; see ``activekeys``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from ratelimit.activekeys import ActiveKeys, owners
from ratelimit.keys import KeyFile, KeyRecord, valid_records
from ratelimit.keyuse import uses_file
from ratelimit.policy import Policy
from ratelimit.statefile import StateFileError
from ratelimit.usereader import RETELL_S, UseReader

log = logging.getLogger(__name__)


class KeysNow:
    """The records of the key file, read when it has changed."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "keys.json"
        self._file = KeyFile(state_dir)
        self._signature: tuple[int, int, int] | None = None
        self._records: tuple[KeyRecord, ...] = ()

    def records(self) -> tuple[KeyRecord, ...]:
        """All records; the same object while the file is the same. Raises ``StateFileError``."""
        signature = self._signed()
        if signature is None or signature != self._signature:
            self._records = tuple(self._file.records())
            self._signature = signature
        return self._records

    def _signed(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:  # what is wrong with it is said by reading it
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


class KeyActivity:
    """The keys in use by tier and model, from the key file and from what the gateways say."""

    def __init__(self, reader: UseReader, state_dir: Path, idle_s: float) -> None:
        self._reader = reader
        self._state_dir = state_dir
        self._keep_s = idle_s + RETELL_S
        self._active = ActiveKeys(self._keep_s)
        self._adopted: tuple[tuple[KeyRecord, ...], tuple[Policy, ...]] | None = None

    async def counts(
        self, records: tuple[KeyRecord, ...], policies: Sequence[Policy], now_s: float
    ) -> dict[tuple[str, str], int]:
        """By tier and model, how many keys of the orgs and tiers that the policies know share what is assured.

        ``now_s`` is the clock of the key file. Raises ``RedisError`` or ``OSError``.
        """
        models = sorted({pool.model for policy in policies for pool in policy.pools})
        if self._adopted is None or self._adopted[0] is not records or self._adopted[1] != tuple(policies):
            await self._adopt(records, policies, models, now_s)
        await self._reader.read(models, self._keep_s, now_s, self._active.used)
        return self._active.counts(now_s)

    async def _adopt(
        self, records: tuple[KeyRecord, ...], policies: Sequence[Policy], models: Sequence[str], now_s: float
    ) -> None:
        orgs = {org.name for policy in policies for org in policy.orgs}
        tiers = {tier.name for policy in policies for tier in policy.tiers}
        # In a thread, for with very many keys it takes a second, in which replicas must be watched.
        known = await asyncio.to_thread(lambda: owners(valid_records(records, orgs, tiers)))
        self._active.adopt(known, models, now_s)
        if self._adopted is None:
            self._resume(models)
        self._adopted = records, tuple(policies)

    def _resume(self, models: Sequence[str]) -> None:
        """A Redis that has lost everything does not say who was in use: the copy of last uses does, of no model."""
        try:
            uses = uses_file(self._state_dir).read()
        except StateFileError as error:
            log.error("which keys were in use is not known, they count from their next use on: %s", error)
            return
        for use in uses:
            for model in models:
                self._active.used(use.id, model, float(use.used_at))
