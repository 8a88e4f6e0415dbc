"""API keys: random secrets, of which only the digest is kept.

A secret is ``pn-`` and 256 random bits. SHA-256 without salt or stretching is enough for it: salts and slow hashes
defend secrets that people choose, and nobody can enumerate 2²⁵⁶. It also lets a gateway find a key by one lookup of
its digest in a dict, whose timing says nothing about how much of a wrong secret was right.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from time import time
from typing import Literal

import msgspec

from ratelimit.statefile import StateFile

SECRET_PREFIX = "pn-"  # noqa: S105  # the public part of a key
MOST_KEYS = 100_000
_SECRET_BYTES = 32
_ID_BYTES = 4

DEMO_KEY_NAME = "demo"

KeyStatus = Literal["active", "expired", "revoked"]
KeyIssuer = Literal["operator", "up"]


class ApiKeyError(ValueError):
    """A key that cannot be made or found; the message says what would be right."""


class KeyRecord(msgspec.Struct, frozen=True):
    """What is kept of a key. ``id`` is public; times are seconds since 1970, None for never.

    ``issued_by`` tells the demo keys that `penstock up` makes, and replaces at its next start, from an operator's.
    """

    id: str
    digest: str
    org: str
    tier: str
    name: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    issued_by: KeyIssuer = "operator"


def digest(secret: str) -> str:
    """SHA-256 of a secret, in hex; of any text at all, for callers present what they like."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def new_key(
    org: str, tier: str, name: str, created_at: float, expires_at: float | None = None
) -> tuple[str, KeyRecord]:
    """A new secret, to be shown once, and its record, to be kept."""
    secret = SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    key_id = "k_" + secrets.token_hex(_ID_BYTES)
    return secret, KeyRecord(key_id, digest(secret), org, tier, name, created_at, expires_at)


def find(by_digest: Mapping[str, KeyRecord], secret: str) -> KeyRecord | None:
    """The record of a presented secret, whatever its status."""
    return by_digest.get(digest(secret))


def status(record: KeyRecord, now_s: float) -> KeyStatus:
    """Whether the key may be used at ``now_s``; revoked outranks expired."""
    if record.revoked_at is not None and record.revoked_at <= now_s:
        return "revoked"
    if record.expires_at is not None and record.expires_at <= now_s:
        return "expired"
    return "active"


def active_keys(records: Iterable[KeyRecord], now_s: float) -> dict[str, int]:
    """How many keys of each tier may be used at ``now_s``."""
    return dict(Counter(record.tier for record in records if status(record, now_s) == "active"))


def valid_records(records: Iterable[KeyRecord], orgs: Collection[str], tiers: Collection[str]) -> list[KeyRecord]:
    """The records whose org and tier are known: a key that can reach nothing must take no part of a tier's share."""
    return [record for record in records if record.org in orgs and record.tier in tiers]


class KeyFile:
    """The keys of one installation, in ``keys.json`` of its state folder. Every method may raise ``StateFileError``."""

    def __init__(self, state_dir: Path, clock: Callable[[], float] = time) -> None:
        self._file = StateFile(state_dir / "keys.json", KeyRecord)
        self._clock = clock

    def records(self) -> list[KeyRecord]:
        """All records, oldest first."""
        return self._file.read()

    def create(
        self, *, org: str, tier: str, name: str, valid_s: float | None = None, issued_by: KeyIssuer = "operator"
    ) -> tuple[str, KeyRecord]:
        """Make and keep a key, valid for ``valid_s`` seconds or until revoked; its secret cannot be had again."""
        now_s = self._clock()
        expires_at = _expiry(now_s, valid_s)
        with self._file.changing() as records:
            secret, record = _unlike(records, org, tier, name, now_s, expires_at)
            record = msgspec.structs.replace(record, issued_by=issued_by)
            records.append(record)
        return secret, record

    def replace_demo(self, org: str, tier: str, valid_s: float) -> str:
        """The secret of a new demo key, which takes the place of the last one, in one change of the file.

        Only keys that `penstock up` issued are touched: the one still active is revoked, those that had ended before
        are dropped, so that starts do not make the file grow.
        """
        now_s = self._clock()
        expires_at = _expiry(now_s, valid_s)
        with self._file.changing() as records:
            records[:] = [
                record if record.issued_by != "up" else msgspec.structs.replace(record, revoked_at=now_s)
                for record in records
                if record.issued_by != "up" or status(record, now_s) == "active"
            ]
            secret, record = _unlike(records, org, tier, DEMO_KEY_NAME, now_s, expires_at)
            records.append(msgspec.structs.replace(record, issued_by="up"))
        return secret

    def revoke(self, key_id: str) -> KeyRecord:
        """Revoke a key by its public id; one already revoked keeps its time. Raises ``ApiKeyError``."""
        with self._file.changing() as records:
            position = next((i for i, record in enumerate(records) if record.id == key_id), None)
            if position is None:
                raise ApiKeyError(f"there is no key {key_id!r}; `penstock keys list` shows the ids, such as k_1a2b3c4d")
            if records[position].revoked_at is None:
                records[position] = msgspec.structs.replace(records[position], revoked_at=self._clock())
            return records[position]


def _expiry(now_s: float, valid_s: float | None) -> float | None:
    if valid_s is not None and valid_s <= 0:
        raise ApiKeyError(f"a key cannot be valid for {valid_s:g} s; give a time above 0")
    return None if valid_s is None else now_s + valid_s


def _unlike(
    records: Sequence[KeyRecord], org: str, tier: str, name: str, now_s: float, expires_at: float | None
) -> tuple[str, KeyRecord]:
    """A new key whose public id no other has, if there is room for one."""
    if len(records) >= MOST_KEYS:
        raise ApiKeyError(f"there are {MOST_KEYS} keys already, the most this file keeps")
    taken = {record.id for record in records}
    while True:
        secret, record = new_key(org, tier, name, now_s, expires_at)
        if record.id not in taken:
            return secret, record
