"""Keys are random, kept as digests, checked by time, and their file survives what happens to files."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from ratelimit.keys import ApiKeyError, KeyFile, KeyRecord, active_keys, digest, find, new_key, status, valid_records
from ratelimit.statefile import StateFileError


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def key(tier: str = "pro", expires_at: float | None = None, revoked_at: float | None = None) -> KeyRecord:
    made = new_key("acme", tier, "test", 0.0, expires_at)[1]
    return msgspec.structs.replace(made, revoked_at=revoked_at)


def test_secret_has_256_random_bits() -> None:
    """A secret is the prefix and 43 characters that are safe in a URL, different each time."""
    made = [new_key("acme", "pro", "test", 0.0)[0] for _ in range(20)]
    assert all(re.fullmatch(r"pn-[A-Za-z0-9_-]{43}", secret) for secret in made)
    assert len(set(made)) == 20


def test_record_keeps_the_digest_and_not_the_secret() -> None:
    """What is stored identifies the secret by SHA-256 and does not contain it."""
    secret, record = new_key("acme", "pro", "test", 5.0, 9.0)
    assert record.digest == hashlib.sha256(secret.encode()).hexdigest()
    assert secret.removeprefix("pn-") not in repr(record)
    assert re.fullmatch(r"k_[0-9a-f]{8}", record.id)
    assert (record.org, record.tier, record.name, record.created_at, record.expires_at) == ("acme", "pro", "test", 5, 9)


def test_find_by_secret() -> None:
    """A presented secret finds its record; any other finds none."""
    secret, record = new_key("acme", "pro", "test", 0.0)
    by_digest = {record.digest: record}
    assert find(by_digest, secret) is record
    assert find(by_digest, secret + "x") is None
    assert find(by_digest, record.digest) is None
    assert find(by_digest, "kéy \udcff") is None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (key(), "active"),
        (key(expires_at=100.1), "active"),
        (key(expires_at=100.0), "expired"),
        (key(revoked_at=99.0), "revoked"),
        (key(expires_at=50.0, revoked_at=99.0), "revoked"),
    ],
)
def test_status(record: KeyRecord, expected: str) -> None:
    """A key is active until it expires or is revoked, to the instant."""
    assert status(record, 100.0) == expected


def test_active_keys_are_counted_by_tier() -> None:
    """Only keys that may be used share in a tier."""
    records = [key("pro"), key("pro"), key("pro", revoked_at=1.0), key("free", expires_at=1.0), key("batch")]
    assert active_keys(records, 100.0) == {"pro": 2, "batch": 1}


def test_keys_of_unknown_orgs_and_tiers_take_no_share() -> None:
    """A key whose org or tier is gone from the config is not among the valid ones, which are what is counted."""
    records = [key("pro"), key("gone"), msgspec.structs.replace(key("pro"), org="removed")]
    assert valid_records(records, orgs={"acme"}, tiers={"pro"}) == [records[0]]


def test_create_list_revoke(tmp_path: Path) -> None:
    """A created key is listed by another reader of the file, and a revoked one stays listed as such."""
    clock = Clock(1000.0)
    keys = KeyFile(tmp_path / "state", clock)
    assert keys.records() == []
    secret, record = keys.create(org="acme", tier="pro", name="ci", valid_s=60)
    assert record.expires_at == 1060.0
    other = keys.create(org="acme", tier="free", name="app")[1]
    assert KeyFile(tmp_path / "state").records() == [record, other]
    clock.now_s = 1030.0
    assert [each.revoked_at for each in keys.revoke(record.id)] == [1030.0]
    clock.now_s = 1040.0
    assert [each.revoked_at for each in keys.revoke(record.id)] == [1030.0]
    assert [status(each, 1040.0) for each in keys.records()] == ["revoked", "active"]
    assert find({each.digest: each for each in keys.records()}, secret) is not None


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """The folder has mode 0700 and the file 0600, and no file holds the secret."""
    secret, _ = KeyFile(tmp_path / "state").create(org="acme", tier="pro", name="ci")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    for file in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert secret not in file.read_text()


def test_keys_are_not_kept_where_another_user_could_add_some(tmp_path: Path) -> None:
    """A folder that is open to writers is made private."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    KeyFile(tmp_path / "state").create(org="acme", tier="pro", name="ci")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"records": []}',
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "records": [{"id": 5}]}',
        b"\xff",
    ],
)
def test_a_damaged_file_is_reported_and_kept(tmp_path: Path, content: bytes) -> None:
    """A file that cannot be understood stops reading and writing, and stays as it was, byte for byte."""
    (tmp_path / "keys.json").write_bytes(content)
    keys = KeyFile(tmp_path)
    with pytest.raises(StateFileError, match=r"keys\.json is damaged"):
        keys.records()
    with pytest.raises(StateFileError, match="left as it is"):
        keys.create(org="acme", tier="pro", name="ci")
    assert (tmp_path / "keys.json").read_bytes() == content


def test_a_file_of_another_version_is_reported_and_kept(tmp_path: Path) -> None:
    """A newer Penstock's keys are neither misread nor overwritten by this one."""
    (tmp_path / "keys.json").write_text('{"schema_version": 2, "keys": {}}')
    with pytest.raises(StateFileError, match="schema_version 2, this Penstock reads 1"):
        KeyFile(tmp_path).create(org="acme", tier="pro", name="ci")
    assert "keys" in (tmp_path / "keys.json").read_text()


def test_unknown_key_and_senseless_validity(tmp_path: Path) -> None:
    """Revoking what is not there, or making what has expired, says what would be right."""
    keys = KeyFile(tmp_path)
    with pytest.raises(ApiKeyError, match=r"no key 'k_nothere'.*penstock keys list"):
        keys.revoke("k_nothere")
    with pytest.raises(ApiKeyError, match="time above 0"):
        keys.create(org="acme", tier="pro", name="ci", valid_s=0)


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    """Keys created at the same time by several writers are all there."""

    def create_some() -> None:
        keys = KeyFile(tmp_path)
        for _ in range(5):
            keys.create(org="acme", tier="pro", name=threading.current_thread().name)

    threads = [threading.Thread(target=create_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({record.id for record in KeyFile(tmp_path).records()}) == 20


def test_a_failed_write_keeps_the_old_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the new file cannot be put in place, the old one is still whole."""
    keys = KeyFile(tmp_path)
    kept = keys.create(org="acme", tier="pro", name="ci")[1]

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(StateFileError, match="No space left on device; the old file is unchanged"):
        keys.create(org="acme", tier="pro", name="second")
    assert keys.records() == [kept]


def test_the_demo_key_replaces_only_its_like(tmp_path: Path) -> None:
    """Each start revokes the last demo key and forgets older ones; an operator's key of that name is left alone."""
    clock = Clock(1000.0)
    keys = KeyFile(tmp_path, clock)
    operators = keys.create(org="acme", tier="pro", name="demo")[1]
    secrets = []
    for _ in range(4):
        clock.now_s += 1
        secrets.append(keys.replace_demo("acme", "pro", valid_s=60.0))
    kept, last, newest = keys.records()
    assert kept == operators
    assert (last.digest, last.revoked_at, last.issued_by) == (digest(secrets[2]), 1004.0, "up")
    assert (newest.digest, newest.expires_at, newest.name) == (digest(secrets[3]), 1064.0, "demo")
    assert status(newest, 1004.0) == "active"


def test_a_key_file_from_before_issuers_is_read(tmp_path: Path) -> None:
    """Records without an issuer are the operator's."""
    record = KeyFile(tmp_path).create(org="acme", tier="pro", name="ci")[1]
    path = tmp_path / "keys.json"
    document = json.loads(path.read_text())
    del document["records"][0]["issued_by"]
    path.write_text(json.dumps(document))
    assert KeyFile(tmp_path).records() == [record]
    assert record.issued_by == "operator"


def test_digest_is_hex_sha256() -> None:
    """The digest is the one any tool computes."""
    assert digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_rotated_key_is_one_key_with_two_secrets_for_a_while(tmp_path: Path) -> None:
    """Both secrets are active during the overlap, under one id that is counted once; then only the new one is."""
    clock = Clock(1000.0)
    keys = KeyFile(tmp_path, clock)
    old = keys.create(org="acme", tier="pro", name="ci")[1]
    keys.create(org="acme", tier="pro", name="other")
    clock.now_s = 2000.0

    secret, new = keys.rotate(old.id, overlap_s=60.0)

    assert (new.id, new.org, new.tier, new.name, new.created_at) == (old.id, "acme", "pro", "ci", 2000.0)
    assert new.digest == digest(secret)
    found = {each.digest: each for each in keys.records()}
    assert [each.name for each in keys.records()] == ["ci", "ci", "other"]
    assert (status(found[old.digest], 2059.9), status(found[old.digest], 2060.0)) == ("active", "expired")
    assert status(new, 2060.0) == "active"
    assert active_keys(keys.records(), 2001.0) == active_keys(keys.records(), 2060.0) == {"pro": 2}


def test_rotation_prolongs_nothing(tmp_path: Path) -> None:
    """A key made for an hour ends with it, rotated or not, unless a new time is given; so does each old secret."""
    clock = Clock(1000.0)
    keys = KeyFile(tmp_path, clock)
    key_id = keys.create(org="acme", tier="pro", name="ci", valid_s=3600)[1].id
    keys.rotate(key_id, overlap_s=86_400)
    assert [each.expires_at for each in keys.records()] == [4600.0, 4600.0]
    keys.rotate(key_id, overlap_s=10)
    keys.rotate(key_id, overlap_s=100, valid_s=9000)
    assert [each.expires_at for each in keys.records()] == [1010.0, 1010.0, 1100.0, 10_000.0]


def test_rotation_forgets_secrets_that_have_ended(tmp_path: Path) -> None:
    """Rotating every day does not make the file grow."""
    clock = Clock(0.0)
    keys = KeyFile(tmp_path, clock)
    key_id = keys.create(org="acme", tier="pro", name="ci")[1].id
    for _ in range(5):
        clock.now_s += 86_400
        keys.rotate(key_id, overlap_s=3600)
    assert [status(each, clock.now_s) for each in keys.records()] == ["active", "active"]


def test_no_overlap_ends_the_old_secret_at_once(tmp_path: Path) -> None:
    """A leaked secret can be replaced without giving it another moment."""
    clock = Clock(1000.0)
    keys = KeyFile(tmp_path, clock)
    key_id = keys.create(org="acme", tier="pro", name="ci")[1].id
    keys.rotate(key_id, overlap_s=0)
    assert [status(each, 1000.0) for each in keys.records()] == ["expired", "active"]


def test_revoking_ends_every_secret_of_a_key(tmp_path: Path) -> None:
    """A revoked key cannot go on under its other secret, nor be rotated back to life."""
    keys = KeyFile(tmp_path, Clock(1000.0))
    key_id = keys.create(org="acme", tier="pro", name="ci")[1].id
    other = keys.create(org="acme", tier="pro", name="other")[1]
    keys.rotate(key_id, overlap_s=60)

    assert [each.revoked_at for each in keys.revoke(key_id)] == [1000.0, 1000.0]

    assert active_keys(keys.records(), 1000.0) == {"pro": 1}
    assert keys.records()[-1] == other
    with pytest.raises(ApiKeyError, match="no active secret"):
        keys.rotate(key_id, overlap_s=60)


def test_rotating_what_is_not_there_or_backwards_is_refused(tmp_path: Path) -> None:
    """The message names the way to the ids, or the bound."""
    keys = KeyFile(tmp_path)
    with pytest.raises(ApiKeyError, match=r"no key 'k_nothere'.*penstock keys list"):
        keys.rotate("k_nothere", overlap_s=60)
    with pytest.raises(ApiKeyError, match="0 or more"):
        keys.rotate("k_nothere", overlap_s=-1)
