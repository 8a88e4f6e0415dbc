"""From a use at a gateway to the controller's count, by a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import time
from typing import Any

import pytest
from redis.asyncio import Redis

from ratelimit import usereader
from ratelimit.gateway import activity as activity_module
from ratelimit.gateway.activity import Activity
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.keyactivity import KeyActivity, KeysNow
from ratelimit.keys import KeyFile
from ratelimit.keyuse import KeyUse, uses_file
from ratelimit.policy import OrgPolicy, Policy, PoolPolicy, TierPolicy
from ratelimit.usereader import UseReader, active_key
from serving.capacity import RequestShape, Slo, WorkloadMix
from tests.support.waiting import eventually_async

YEAR_S = 365 * 86_400.0
IDLE_S = 900.0


def policy(*models: str) -> Policy:
    mix, slo = WorkloadMix("one", (RequestShape(10, 10),)), Slo(1.0, 0.05)
    pools = tuple(PoolPolicy(model, slo, mix, None, 0, 4096, 1.0) for model in models)
    return Policy((TierPolicy("pro", 0.5, 1.0, 0, 5.0),), pools, True, (OrgPolicy("acme"),))


def keys_of_last_year(folder: Path, count: int) -> list[str]:
    """Keys that were made too long ago to count unused."""
    keys = KeyFile(folder, clock=lambda: time() - YEAR_S)
    return [keys.create(org="acme", tier="pro", name=f"key {n}")[1].id for n in range(count)]


async def counted(
    activity: KeyActivity, folder: Path, *models: str, later_s: float = 0.0
) -> dict[tuple[str, str], int]:
    return await activity.counts(KeysNow(folder).records(), [policy(*models)], time() + later_s)


async def test_what_a_gateway_tells_is_counted_by_model(redis_client: Redis, tmp_path: Path) -> None:
    """Keys count where they are used; a second word of the same key adds nothing."""
    ids = keys_of_last_year(tmp_path, 3)
    gateway = Activity(redis_client, GatewayMetrics())
    activity = KeyActivity(UseReader(redis_client), tmp_path, IDLE_S)
    assert await counted(activity, tmp_path, "a", "b") == {}

    for _ in range(2):
        gateway.note(ids[0], "a")
        gateway.note(ids[1], "a")
        gateway.note(ids[1], "b")
        await gateway.tell()

    assert await counted(activity, tmp_path, "a", "b") == {("pro", "a"): 2, ("pro", "b"): 1}


@pytest.mark.parametrize("first_told_s", [0.0, 30.0, 54.9, 59.9])
async def test_a_key_in_use_is_told_again_before_the_controller_counts_it_as_idle(
    redis_client: Redis, first_told_s: float
) -> None:
    """Whenever it was told first, its next use nearly a minute later is told, whether its loop has woken or not."""
    now_s = 0.0
    gateway = Activity(redis_client, GatewayMetrics(), clock=lambda: now_s)
    now_s = first_told_s
    gateway.note("k_1", "a")
    await gateway.tell()
    await redis_client.delete(active_key("a"))

    now_s = first_told_s + usereader.RETELL_S - 2
    gateway.note("k_1", "a")
    await gateway.tell()

    assert await redis_client.zscore(active_key("a"), "k_1")


async def test_a_new_controller_knows_who_is_in_use_before_it_publishes(redis_client: Redis, tmp_path: Path) -> None:
    """The first count is that of the whole window, so that a restart does not promise too much."""
    ids = keys_of_last_year(tmp_path, 50)
    gateway = Activity(redis_client, GatewayMetrics())
    for key_id in ids:
        gateway.note(key_id, "a")
    await gateway.tell()

    assert await counted(KeyActivity(UseReader(redis_client), tmp_path, IDLE_S), tmp_path, "a") == {("pro", "a"): 50}


async def test_a_redis_that_lost_everything_is_made_up_for_by_the_copy_on_disk(
    redis_client: Redis, tmp_path: Path
) -> None:
    """The copy of the last uses names no model: until the keys are idle they count on all."""
    ids = keys_of_last_year(tmp_path, 2)
    with uses_file(tmp_path).changing() as uses:
        uses[:] = [KeyUse(ids[0], int(time()) - 60), KeyUse(ids[1], int(time() - YEAR_S / 2))]

    activity = KeyActivity(UseReader(redis_client), tmp_path, IDLE_S)

    assert await counted(activity, tmp_path, "a", "b") == {("pro", "a"): 1, ("pro", "b"): 1}


async def test_only_what_is_new_is_read(redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round costs what has happened since the last one, in batches, not what the set holds."""
    monkeypatch.setattr(usereader, "_BATCH", 7)
    reader, seen = UseReader(redis_client), list[tuple[str, str]]()
    now_s, _ = await redis_client.time()
    await redis_client.zadd(active_key("a"), {f"k_{n}": now_s - 100 for n in range(30)})

    async def read() -> set[tuple[str, str]]:
        seen.clear()
        await reader.read(["a"], 1000.0, time(), lambda key_id, model, _at_s: seen.append((key_id, model)))
        return set(seen)

    assert await read() == {(f"k_{n}", "a") for n in range(30)}
    assert await read() == set()
    await redis_client.zadd(active_key("a"), {"k_3": now_s + 1})
    assert await read() == {("k_3", "a")}


class Disturbed:
    """A Redis to which something happens after the first page."""

    def __init__(self, redis: Redis, after_a_page: Callable[[], Awaitable[object]]) -> None:
        self._redis = redis
        self._after_a_page = after_a_page
        self.pages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    async def zrange(self, *args: Any, **options: Any) -> Any:
        self.pages += 1
        if self.pages == 2:
            await self._after_a_page()
        return await self._redis.zrange(*args, **options)


async def test_keys_told_again_while_they_are_read_hide_no_others(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave their places in the set and the rest move up; who was behind them is in use all the same."""
    monkeypatch.setattr(usereader, "_BATCH", 7)
    now_s, _ = await redis_client.time()
    await redis_client.zadd(active_key("a"), {f"k_{n:02}": now_s - 100 + n for n in range(30)})

    async def tell_again() -> None:
        await redis_client.zadd(active_key("a"), {f"k_{n:02}": now_s for n in range(7)})

    seen = set[str]()
    disturbed: Any = Disturbed(redis_client, tell_again)
    await UseReader(disturbed).read(["a"], 1000.0, time(), lambda key_id, *_: seen.add(key_id))

    assert seen == {f"k_{n:02}" for n in range(30)}


async def test_a_first_read_that_is_broken_off_goes_on_where_it_was(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many keys there are, each try comes further: a controller that starts gets to its first round."""
    monkeypatch.setattr(usereader, "_BATCH", 10)
    now_s, _ = await redis_client.time()
    await redis_client.zadd(active_key("a"), {f"k_{n:02}": now_s - 100 + n for n in range(30)})

    async def hang() -> None:
        raise TimeoutError

    seen = list[str]()
    disturbed: Any = Disturbed(redis_client, hang)
    reader = UseReader(disturbed)
    with pytest.raises(TimeoutError):
        await reader.read(["a"], 1000.0, time(), lambda key_id, *_: seen.append(key_id))
    await reader.read(["a"], 1000.0, time(), lambda key_id, *_: seen.append(key_id))

    assert set(seen) == {f"k_{n:02}" for n in range(30)}
    assert seen.count("k_00") == 1


async def test_each_page_has_its_own_time(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that takes longer than any one call may is not broken off for that."""
    monkeypatch.setattr(usereader, "_BATCH", 10)
    now_s, _ = await redis_client.time()
    await redis_client.zadd(active_key("a"), {f"k_{n:02}": now_s - 100 + n for n in range(30)})
    allowed = list[float]()
    timeout = asyncio.timeout

    def counted_timeout(delay_s: float) -> asyncio.Timeout:
        allowed.append(delay_s)
        return timeout(delay_s)

    monkeypatch.setattr(asyncio, "timeout", counted_timeout)
    disturbed: Any = Disturbed(redis_client, redis_client.ping)
    await UseReader(disturbed).read(["a"], 1000.0, time(), lambda *_: None)

    assert disturbed.pages >= 3
    assert allowed.count(usereader.REDIS_TIMEOUT_S) >= 1 + disturbed.pages


async def test_uses_of_the_past_are_forgotten(redis_client: Redis) -> None:
    """The sets hold the keys in use, not all that ever were."""
    now_s, _ = await redis_client.time()
    await redis_client.zadd(active_key("a"), {"old": now_s - 2000, "new": now_s - 10})

    await UseReader(redis_client).read(["a"], 1000.0, time(), lambda *_: None)

    assert await redis_client.zrange(active_key("a"), 0, -1) == [b"new"]


async def test_a_key_file_is_read_again_only_when_it_changes(tmp_path: Path) -> None:
    """A round with a hundred thousand keys looks at the file's date, not at the keys."""
    keys_of_last_year(tmp_path, 1)
    now = KeysNow(tmp_path)
    before = now.records()
    assert now.records() is before

    keys_of_last_year(tmp_path, 1)

    assert len(now.records()) == 2


async def test_uses_are_told_by_themselves_and_kept_while_redis_is_away(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A gateway tells within moments; what it could not tell is told when Redis is back. A fault is logged once."""
    monkeypatch.setattr(activity_module, "GATHER_S", 0.01)
    monkeypatch.setattr(activity_module, "RETRY_S", 0.01)
    metrics, away = GatewayMetrics(), Redis(unix_socket_path="/nowhere/redis.sock")
    gateway = Activity(away, metrics)
    telling = asyncio.create_task(gateway.run())
    try:
        gateway.note("k_1", "a")

        async def failed_twice() -> bool:
            found = metrics.registry.get_sample_value("penstock_directory_errors_total", {"what": "activity"})
            return (found or 0) >= 2

        await eventually_async(failed_twice, 20, "two failures")
        monkeypatch.setattr(gateway, "_redis", redis_client)

        async def told() -> bool:
            return bool(await redis_client.zscore(active_key("a"), "k_1"))

        await eventually_async(told, 20, "the use in Redis")
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await away.aclose()
    assert caplog.text.count("cannot tell which keys are in use") == 1
