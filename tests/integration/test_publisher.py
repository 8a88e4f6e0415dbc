"""What a publisher leaves in a real Redis and on disk, and what it notices when Redis holds something else."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.gateway.charges import POOL_BUCKET
from ratelimit.keys import KeyRecord
from ratelimit.meter import Charge, Role
from ratelimit.publication import POOL_TICK_US, Publication
from ratelimit.publisher import KEYS_KEY, PUBLICATION_KEY, Publisher, published_file, read_published
from ratelimit.store import Store, StoreUnavailableError
from tests.support.gateway import MODEL, publication
from tests.support.leading import SoleLeader
from tests.support.waiting import eventually_async

VALID = KeyRecord("k_1", "digest-1", "acme", "pro", "one", created_at=1.0)
REVOKED = msgspec.structs.replace(VALID, revoked_at=2.0)


def limits(epoch: int, reason: str = "test") -> Publication:
    return Publication(epoch, "2026-01-01T00:00:00Z", reason, True, (), ())


async def older_dump(redis: Redis) -> dict[bytes, bytes]:
    """Everything that Redis holds, to be restored later as a lagging replica would have it."""
    return {key: await redis.dump(key) for key in await redis.keys()}  # type: ignore[misc]  # of a client that decodes nothing, keys that are there


async def fail_over(redis: Redis, dump: dict[bytes, bytes]) -> None:
    await redis.flushall()
    for key, value in dump.items():
        await redis.restore(key, 0, value)


async def test_nothing_is_lost_while_redis_holds_what_was_published(redis_client: Redis, tmp_path: Path) -> None:
    """A Redis that keeps the newest limits and keys is left alone."""
    publisher = Publisher(redis_client, tmp_path, SoleLeader(redis_client))
    assert not any(await publisher.lost())

    await publisher.publish(limits(await publisher.next_epoch()))
    await publisher.publish_keys([VALID])

    assert not any(await publisher.lost())


async def test_a_failover_to_a_lagging_replica_is_noticed(redis_client: Redis, tmp_path: Path) -> None:
    """Older limits, and the keys before a revocation, are as good as lost, though both exist."""
    publisher = Publisher(redis_client, tmp_path, SoleLeader(redis_client))
    await publisher.publish(limits(await publisher.next_epoch()))
    await publisher.publish_keys([VALID])
    dump = await older_dump(redis_client)
    await publisher.publish(limits(await publisher.next_epoch(), "newer"))
    await publisher.publish_keys([REVOKED])

    await fail_over(redis_client, dump)

    assert await publisher.lost() == (True, True)


async def test_a_key_that_went_missing_is_noticed(redis_client: Redis, tmp_path: Path) -> None:
    """Keys are judged by how many there are too, not by their version alone."""
    publisher = Publisher(redis_client, tmp_path, SoleLeader(redis_client))
    await publisher.publish_keys([VALID])

    await redis_client.hdel(KEYS_KEY, VALID.digest)

    assert (await publisher.lost()).keys


async def test_the_next_epoch_is_above_what_redis_was_found_to_hold(redis_client: Redis, tmp_path: Path) -> None:
    """Gateways never see an epoch twice, whichever side had the higher one."""
    publisher = Publisher(redis_client, tmp_path, SoleLeader(redis_client))
    await publisher.publish(limits(await publisher.next_epoch()))

    await redis_client.set(PUBLICATION_KEY, msgspec.json.encode(limits(70)))

    assert (await publisher.lost()).publication
    assert await publisher.next_epoch() == 71


async def test_damaged_limits_in_redis_are_replaced(redis_client: Redis, tmp_path: Path) -> None:
    """What is no publication holds no epoch, and stops nobody from publishing."""
    await redis_client.set(PUBLICATION_KEY, "not JSON")
    publisher = Publisher(redis_client, tmp_path, SoleLeader(redis_client))

    await publisher.publish(limits(await publisher.next_epoch()))

    assert not (await publisher.lost()).publication


async def test_an_epoch_is_not_given_out_again_when_the_disk_fails(redis_client: Redis, tmp_path: Path) -> None:
    """Limits are in force once Redis has them; the disk follows when it can."""
    state_dir = tmp_path / "state"
    publisher = Publisher(redis_client, state_dir, SoleLeader(redis_client))
    first = await publisher.next_epoch()
    state_dir.write_text("a file where the folder should be")

    await publisher.publish(limits(first))
    assert await publisher.next_epoch() == first + 1
    assert not (await publisher.lost()).publication

    state_dir.unlink()
    publisher.save()
    on_disk = read_published(state_dir)
    assert on_disk is not None
    assert on_disk.epoch == first


async def test_an_epoch_is_not_given_out_again_when_redis_fails(redis_client: Redis, tmp_path: Path) -> None:
    """An error may come after Redis took the publication, so its epoch is spent."""
    publisher = Publisher(redis_client, tmp_path, SoleLeader(redis_client))
    spent = await publisher.next_epoch()
    await redis_client.config_set("maxmemory", 1)
    try:
        with pytest.raises(RedisError):
            await publisher.publish(limits(spent))
    finally:
        await redis_client.config_set("maxmemory", 0)

    assert await publisher.next_epoch() == spent + 1


async def test_epochs_go_on_from_disk_where_redis_starts_empty(redis_client: Redis, tmp_path: Path) -> None:
    """A new controller with an empty Redis does not begin at 1 again."""
    with published_file(tmp_path).changing() as newest:
        newest[:] = [limits(41)]

    assert await Publisher(redis_client, tmp_path, SoleLeader(redis_client)).next_epoch() == 42


async def test_published_limits_are_in_force_in_the_pools_bucket_at_once(redis_client: Redis, tmp_path: Path) -> None:
    """What is left of a pool falls with its publication, and not only when the next request brings the epoch."""
    store, publisher = (
        Store(redis_client, MODEL, timeout_s=5),
        Publisher(redis_client, tmp_path, SoleLeader(redis_client)),
    )
    for burst in (10**6, 500):
        await publisher.publish(publication([], epoch=await publisher.next_epoch(), pool_budget=(10**9, burst)))
    requests = itertools.count()

    async def room() -> bool:
        """What a gateway is told that still has the limits of the epoch before; a new pool takes 60 ms to drain."""
        asked = Charge(POOL_BUCKET, 0, 10**6, 10**9, POOL_TICK_US, Role.COUNTED)
        answer = await store.admit(f"r{next(requests)}", [asked], epoch=1, lease_ms=1000)
        return answer.remaining == (500,)

    await eventually_async(room, 10, "the pool's new capacity")
    assert await room()


async def test_limits_are_published_though_a_pools_bucket_cannot_be_told(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next request brings them anyway."""

    async def unavailable(*_args: object) -> None:
        raise StoreUnavailableError("Redis did not answer configure in 1 s")

    monkeypatch.setattr(Store, "configure", unavailable)
    publisher = Publisher(redis_client, tmp_path, SoleLeader(redis_client))

    await publisher.publish(publication([], epoch=await publisher.next_epoch()))

    assert not (await publisher.lost()).publication
    assert "takes up its limits with its next request" in caplog.text
