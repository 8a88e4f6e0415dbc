"""A key's rotation from the key file through Redis to what a gateway lets in."""

from __future__ import annotations

from pathlib import Path
from time import time

import pytest
from redis.asyncio import Redis

from ratelimit.gateway import directory as directory_module
from ratelimit.gateway.directory import Directory
from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.keys import KeyFile
from ratelimit.publisher import Publisher
from tests.support.gateway import publication
from tests.support.leading import SoleLeader


class Installation:
    """A key file, what publishes it, and a gateway's view of it."""

    def __init__(self, redis: Redis, state_dir: Path) -> None:
        self.keys = KeyFile(state_dir)
        self._publisher = Publisher(redis, state_dir, SoleLeader(redis))
        self._directory = Directory(redis, GatewayMetrics())

    async def published(self) -> Installation:
        await self._publisher.publish(publication([], epoch=await self._publisher.next_epoch()))
        await self._publisher.publish_keys(self.keys.records())
        await self._directory.refresh()
        return self

    def id_of(self, secret: str) -> str | None:
        """Whose the gateway takes it for; None where it is refused."""
        try:
            return self._directory.authenticate(secret).id
        except Rejection:
            return None


async def test_both_secrets_are_one_key_until_the_overlap_ends(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers change over when they like, within the same limits; afterwards only the new secret is let in."""
    stack = Installation(redis_client, tmp_path)
    old, record = stack.keys.create(org="acme", tier="pro", name="ci")
    new, _ = stack.keys.rotate(record.id, overlap_s=3600)
    await stack.published()

    assert stack.id_of(old) == stack.id_of(new) == record.id
    monkeypatch.setattr(directory_module, "time", lambda: time() + 3601)
    assert (stack.id_of(old), stack.id_of(new)) == (None, record.id)


async def test_a_revoked_key_lets_no_secret_in(redis_client: Redis, tmp_path: Path) -> None:
    """Revoking by id reaches the secret that is about to end and the one that follows it."""
    stack = Installation(redis_client, tmp_path)
    old, record = stack.keys.create(org="acme", tier="pro", name="ci")
    new, _ = stack.keys.rotate(record.id, overlap_s=3600)
    stack.keys.revoke(record.id)
    await stack.published()

    assert (stack.id_of(old), stack.id_of(new)) == (None, None)
