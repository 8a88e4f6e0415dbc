"""The last uses of keys, as gateways leave them in a real Redis, and the copy that outlives it."""

from __future__ import annotations

from pathlib import Path

from redis.asyncio import Redis

from ratelimit.keys import KeyFile
from ratelimit.keyuse import KeyUseCopier, last_uses, read_uses, uses_file
from ratelimit.publisher import KEYS_USED_KEY


def new_ids(state_dir: Path, count: int) -> list[str]:
    keys = KeyFile(state_dir)
    return [keys.create(org="acme", tier="pro", name="test")[1].id for _ in range(count)]


async def test_uses_are_copied_and_those_of_keys_that_are_gone_forgotten(redis_client: Redis, tmp_path: Path) -> None:
    """The state folder has the use of each key there is; the hash in Redis does not grow by keys that are gone."""
    one, two, _ = new_ids(tmp_path, 3)
    await redis_client.hset(KEYS_USED_KEY, mapping={one: 100, two: 200, "k_gone": 300, "odd": "x"})

    await KeyUseCopier(redis_client, tmp_path).round()

    assert last_uses(tmp_path) == {one: 100, two: 200}
    assert await read_uses(redis_client) == {
        one: 100,
        two: 200,
    }


async def test_a_redis_that_lost_everything_takes_no_use_back(redis_client: Redis, tmp_path: Path) -> None:
    """What was known stays known, also to a new controller; a later use counts, an earlier one does not."""
    one, two = new_ids(tmp_path, 2)
    await redis_client.hset(KEYS_USED_KEY, mapping={one: 100, two: 200})
    await KeyUseCopier(redis_client, tmp_path).round()
    await redis_client.delete(KEYS_USED_KEY)

    copier = KeyUseCopier(redis_client, tmp_path)
    await copier.round()
    assert last_uses(tmp_path) == {one: 100, two: 200}
    await redis_client.hset(KEYS_USED_KEY, mapping={one: 101, two: 199})
    await copier.round()
    assert last_uses(tmp_path) == {one: 101, two: 200}


async def test_nothing_is_written_where_nothing_changed(redis_client: Redis, tmp_path: Path) -> None:
    """An idle installation does not write to its disk every few seconds."""
    (one,) = new_ids(tmp_path, 1)
    await redis_client.hset(KEYS_USED_KEY, one, 100)
    copier = KeyUseCopier(redis_client, tmp_path)
    await copier.round()
    path = uses_file(tmp_path).path
    path.unlink()

    await copier.round()

    assert not path.exists()
