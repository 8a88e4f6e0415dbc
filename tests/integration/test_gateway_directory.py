"""What a gateway believes of what it reads from Redis."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from ratelimit.gateway.directory import Directory
from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.publisher import KEYS_KEY, PUBLICATION_KEY
from tests.support.gateway import make_key, publication, publish


@pytest.fixture
async def directory(redis_client: Redis) -> Directory:
    """A directory of an empty Redis."""
    await redis_client.delete(PUBLICATION_KEY, KEYS_KEY)
    return Directory(redis_client, GatewayMetrics())


def bearer(secret: str) -> bytes:
    """The header that a key is sent in."""
    return f"Bearer {secret}".encode()


def errors(directory: Directory, what: str) -> float:
    """The failed reads counted."""
    found = directory._metrics.registry.get_sample_value("penstock_directory_errors_total", {"what": what})
    return found or 0.0


async def test_a_redis_that_lost_everything_keeps_the_keys(redis_client: Redis, directory: Directory) -> None:
    """Until the controller has published again, valid keys stay valid; afterwards what it published counts."""
    (secret, record), (_, other) = make_key(), make_key()
    await publish(redis_client, publication(["http://a"]), record)
    await directory.refresh()
    await redis_client.delete(PUBLICATION_KEY, KEYS_KEY)
    await directory.refresh()
    assert directory.authenticate(bearer(secret)) == record

    await publish(redis_client, publication(["http://a"], epoch=2), other)
    await directory.refresh()
    with pytest.raises(Rejection):
        directory.authenticate(bearer(secret))


async def test_one_unreadable_key_is_one_key(redis_client: Redis, directory: Directory) -> None:
    """A record that cannot be read is counted and left aside, and the others are taken."""
    secret, record = make_key()
    await publish(redis_client, publication(["http://a"]), record)
    await redis_client.hset(KEYS_KEY, "0" * 64, "{")
    await directory.refresh()
    assert directory.authenticate(bearer(secret)) == record
    assert errors(directory, "key") == 1


async def test_a_fault_that_returns_is_told_again(
    redis_client: Redis, directory: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault is one line in the log however long it lasts, and another one where it was mended in between."""
    _, record = make_key()
    for epoch, document in enumerate(["{", "[", None, "{"], start=1):
        await publish(redis_client, publication(["http://a"], epoch), record)
        if document is not None:
            await redis_client.set(PUBLICATION_KEY, document)
            await redis_client.hset(KEYS_KEY, "0" * 64, document)
        else:
            await redis_client.hdel(KEYS_KEY, "0" * 64)
        await directory.refresh()
    lines = [record.getMessage().split(",")[0] for record in caplog.records]
    assert lines == 2 * ["cannot read publication", "cannot read keys"]
