"""What a gateway believes of what it reads from Redis, and what gateways tell each other there."""

from __future__ import annotations

import asyncio
from time import time

import pytest
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, ReadOnlyError, RedisError, ResponseError

from ratelimit.gateway.directory import Directory, RedisRefusesError
from ratelimit.gateway.errors import Rejection
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.presence import GATEWAYS_KEY, HEARTBEAT_S, LIVE_S, Presence
from ratelimit.keyuse import read_uses
from ratelimit.publisher import KEYS_KEY, KEYS_USED_KEY, PUBLICATION_KEY
from tests.support.gateway import make_key, publication, publish


@pytest.fixture
async def directory(redis_client: Redis) -> Directory:
    """A directory of an empty Redis."""
    await redis_client.delete(PUBLICATION_KEY, KEYS_KEY)
    return Directory(redis_client, GatewayMetrics())


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
    assert directory.authenticate(secret) == record

    await publish(redis_client, publication(["http://a"], epoch=2), other)
    await directory.refresh()
    with pytest.raises(Rejection):
        directory.authenticate(secret)


async def test_one_unreadable_key_is_one_key(redis_client: Redis, directory: Directory) -> None:
    """A record that cannot be read is counted and left aside, and the others are taken."""
    secret, record = make_key()
    await publish(redis_client, publication(["http://a"]), record)
    await redis_client.hset(KEYS_KEY, "0" * 64, "{")
    await directory.refresh()
    assert directory.authenticate(secret) == record
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


def test_no_secret_is_no_key(directory: Directory) -> None:
    """A request without a key is refused as one with a wrong key is."""
    refused = []
    for secret in (None, "", "pn-wrong", "\ud800"):
        with pytest.raises(Rejection) as rejection:
            directory.authenticate(secret)
        refused.append((rejection.value.status, rejection.value.message))
    assert len(set(refused)) == 1


def presence(redis: Redis, gateway_id: str) -> Presence:
    """A gateway's presence, silent as yet."""
    return Presence(redis, gateway_id, GatewayMetrics())


async def test_gateways_count_each_other(redis_client: Redis) -> None:
    """Each knows how many live, but for those that were silent for long; before the first beat it knows of none."""
    first, second = presence(redis_client, "g1"), presence(redis_client, "g2")
    assert first.gateways() == 0
    now_s = (await redis_client.time())[0]
    await redis_client.zadd(GATEWAYS_KEY, {"dead": now_s - LIVE_S - 2})
    await first.beat()
    assert first.gateways() == 1
    await second.beat()
    await first.beat()
    assert (first.gateways(), second.gateways()) == (2, 2)
    assert {member async for member, _ in redis_client.zscan_iter(GATEWAYS_KEY)} == {b"g1", b"g2"}


async def test_a_redis_that_lost_everything_does_not_make_a_gateway_alone(redis_client: Redis) -> None:
    """The number before counts until the others have had time to say that they live."""
    first, second = presence(redis_client, "g1"), presence(redis_client, "g2")
    await second.beat()
    await first.beat()
    await redis_client.flushall()
    await first.beat()
    assert first.gateways() == 2


async def test_after_an_outage_the_number_before_it_counts(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat that failed is a break, whatever the first count after it finds."""
    first, second = presence(redis_client, "g1"), presence(redis_client, "g2")
    await second.beat()
    await first.beat()
    with monkeypatch.context() as broken:
        broken.setattr(redis_client, "time", _gone)
        with pytest.raises(RedisError):
            await first.beat()
    await redis_client.flushall()
    loop = asyncio.get_running_loop()
    now_s = loop.time()
    for passed_s in (HEARTBEAT_S, LIVE_S):  # within LIVE_S of each other, and the second that long after the count of 2
        monkeypatch.setattr(loop, "time", lambda at_s=now_s + passed_s + 0.5: at_s)
        await first.beat()
    assert first.gateways() == 2


async def _gone() -> None:
    raise RedisError("gone")


@pytest.mark.parametrize("odd", ["soon", "", "-5", "9" * 5_000])
async def test_an_odd_time_of_a_keys_use_is_replaced(redis_client: Redis, odd: str) -> None:
    """What is no time is as if nothing had been told, to gateways and to who reads it."""
    await redis_client.hset(KEYS_USED_KEY, "k_odd", odd)
    assert "k_odd" not in await read_uses(redis_client)
    told = presence(redis_client, "g1")
    told.note_use("k_odd")
    await told.tell_uses()
    assert (await read_uses(redis_client))["k_odd"] <= int(time())


async def test_the_last_uses_of_keys_are_told(redis_client: Redis, directory: Directory) -> None:
    """A key's use is told once, and a later one that another gateway told stays."""
    (secret, record), (other_secret, other) = make_key(), make_key()
    await publish(redis_client, publication(["http://a"]), record, other)
    await directory.refresh()
    before_s, later_s = int(time()), int(time()) + 1_000
    await redis_client.hset(KEYS_USED_KEY, other.id, later_s)
    directory.authenticate(secret)
    directory.authenticate(other_secret)
    await directory.presence.tell_uses()
    told = [int(at or 0) for at in await redis_client.hmget(KEYS_USED_KEY, [record.id, other.id])]
    assert before_s <= told[0] <= int(time())
    assert told[1] == later_s
    assert directory.presence.used == {}


async def test_a_redis_that_will_always_say_no_is_told_apart(redis_client: Redis, redis_url: str) -> None:
    """A database that is not there, or another's data in our place, ends the start."""
    no_such = f"{redis_url}{'&' if '?' in redis_url else '?'}db=99"
    async with Redis.from_url(no_such) as other:
        with pytest.raises(RedisRefusesError, match="out of range"):
            await Directory(other, GatewayMetrics()).read_first()
    await redis_client.delete(KEYS_KEY)
    await redis_client.set(KEYS_KEY, "another's")
    with pytest.raises(RedisRefusesError, match="WRONGTYPE"):
        await Directory(redis_client, GatewayMetrics()).read_first()
    await redis_client.delete(KEYS_KEY)


@pytest.mark.parametrize("error", [BusyLoadingError("loading"), ReadOnlyError("x"), ResponseError("BUSY a script")])
async def test_what_passes_is_waited_for(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch, error: RedisError
) -> None:
    """A Redis that loads its data, or is about to be replaced, is away, and not refusing."""
    directory = Directory(redis_client, GatewayMetrics())

    async def fail() -> None:
        raise error

    monkeypatch.setattr(directory, "refresh", fail)
    await directory.read_first()
    assert directory.redis_is_away


async def test_a_publication_that_cannot_be_read_is_told_apart(redis_client: Redis, directory: Directory) -> None:
    """Whoever asks why a gateway is not ready learns that there is something, until it can be read."""
    await redis_client.set(PUBLICATION_KEY, "{")
    await directory.refresh()
    assert (directory.is_unreadable, directory.ready) == (True, False)
    await publish(redis_client, publication(["http://a"]))
    await directory.refresh()
    assert (directory.is_unreadable, directory.ready) == (False, True)
