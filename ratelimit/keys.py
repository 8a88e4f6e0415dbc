"""API keys: random secrets, of which only the digest is kept.

A secret is ``pn-`` and 256 random bits. SHA-256 without salt or stretching is enough for it: salts and slow hashes
defend secrets that people choose, and nobody can enumerate 2²⁵⁶. It also lets a gateway find a key by one lookup of
its digest in a dict, whose timing says nothing about how much of a wrong secret was right.

A key that is rotated has several secrets for a while: one record each, of one id. Limits, counts and revocations go by
the id, so that a rotation gives its caller neither new limits nor a second share.
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
_FULL = f"there are {MOST_KEYS} keys already, the most this file keeps"
_SECRET_BYTES = 32
_ID_BYTES = 4

DEMO_KEY_NAME = "demo"

KeyStatus = Literal["active", "expired", "revoked"]
KeyIssuer = Literal["operator", "up"]


class ApiKeyError(ValueError):
    """A key that cannot be made or found; the message says what would be right."""


class KeyRecord(msgspec.Struct, frozen=True):
    """What is kept of one secret of a key. ``id`` is the key's, and public; times are seconds since 1970, None: never.

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
    """A new key: its secret, to be shown once, and its record, to be kept."""
    secret = _new_secret()
    key_id = "k_" + secrets.token_hex(_ID_BYTES)
    return secret, KeyRecord(key_id, digest(secret), org, tier, name, created_at, expires_at)


def rotated(
    records: Iterable[KeyRecord], now_s: float, overlap_s: float, expires_at: float | None
) -> tuple[str, list[KeyRecord]]:
    """A new secret for the key whose records these are, and the records that it has from then on, the newest last.

    The secrets it has end after the overlap, or earlier where they did before; those that have ended are dropped.
    Raises ``ApiKeyError`` where none is active.
    """
    current = [record for record in records if status(record, now_s) == "active"]
    if not current:
        raise ApiKeyError("the key has no active secret to take over from; make a new key with `penstock keys create`")
    ends_at = now_s + overlap_s
    ending = [
        record
        if record.expires_at is not None and record.expires_at <= ends_at
        else msgspec.structs.replace(record, expires_at=ends_at)
        for record in current
    ]
    secret = _new_secret()
    newest = msgspec.structs.replace(
        current[-1], digest=digest(secret), created_at=now_s, expires_at=expires_at or current[-1].expires_at
    )
    return secret, [*ending, newest]


def _new_secret() -> str:
    return SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def find(by_digest: Mapping[str, KeyRecord], secret: str) -> KeyRecord | None:
    """The record of a presented secret, whatever its status."""
    return by_digest.get(digest(secret))


def status(record: KeyRecord, now_s: float) -> KeyStatus:
    """Whether the secret may be used at ``now_s``; revoked outranks expired."""
    if record.revoked_at is not None and record.revoked_at <= now_s:
        return "revoked"
    if record.expires_at is not None and record.expires_at <= now_s:
        return "expired"
    return "active"


def active_keys(records: Iterable[KeyRecord], now_s: float) -> dict[str, int]:
    """How many keys of each tier may be used at ``now_s``; one with several secrets is one key."""
    active = {(record.id, record.tier) for record in records if status(record, now_s) == "active"}
    return dict(Counter(tier for _, tier in active))


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

    def rotate(self, key_id: str, overlap_s: float, valid_s: float | None = None) -> tuple[str, KeyRecord]:
        """Give a key a new secret, to be shown once; those it has end after the overlap. Raises ``ApiKeyError``.

        The new secret is valid for ``valid_s`` seconds, or for as long as the newest one was to be.
        """
        if overlap_s < 0:
            raise ApiKeyError(f"secrets cannot overlap for {overlap_s:g} s; give 0 or more")
        now_s = self._clock()
        expires_at = _expiry(now_s, valid_s)
        with self._file.changing() as records:
            own = _records_of(records, key_id)
            secret, kept = rotated(own, now_s, overlap_s, expires_at)
            position = records.index(own[0])
            records[:] = [record for record in records if record.id != key_id]
            records[position:position] = kept
            if len(records) > MOST_KEYS:
                raise ApiKeyError(_FULL)
        return secret, kept[-1]

    def revoke(self, key_id: str) -> tuple[KeyRecord, ...]:
        """Revoke every secret of a key by its public id; one already revoked keeps its time. Raises ``ApiKeyError``."""
        now_s = self._clock()
        with self._file.changing() as records:
            _records_of(records, key_id)
            records[:] = [
                msgspec.structs.replace(record, revoked_at=now_s)
                if record.id == key_id and record.revoked_at is None
                else record
                for record in records
            ]
            return tuple(_records_of(records, key_id))


def _records_of(records: Iterable[KeyRecord], key_id: str) -> list[KeyRecord]:
    found = [record for record in records if record.id == key_id]
    if not found:
        raise ApiKeyError(f"there is no key {key_id!r}; `penstock keys list` shows the ids, such as k_1a2b3c4d")
    return found


def _expiry(now_s: float, valid_s: float | None) -> float | None:
    if valid_s is not None and valid_s <= 0:
        raise ApiKeyError(f"a key cannot be valid for {valid_s:g} s; give a time above 0")
    return None if valid_s is None else now_s + valid_s


def _unlike(
    records: Sequence[KeyRecord], org: str, tier: str, name: str, now_s: float, expires_at: float | None
) -> tuple[str, KeyRecord]:
    """A new key whose public id no other has, if there is room for one."""
    if len(records) >= MOST_KEYS:
        raise ApiKeyError(_FULL)
    taken = {record.id for record in records}
    while True:
        secret, record = new_key(org, tier, name, now_s, expires_at)
        if record.id not in taken:
            return secret, record
