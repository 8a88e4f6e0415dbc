"""Usage records go from a real Redis into the files exactly once, whatever dies in between."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit import usagedrain
from ratelimit.usagedrain import UsageDrain, usage_stream
from ratelimit.usagefiles import UsageFiles
from tests.support.usage import settle, usage_record
from tests.support.waiting import eventually_async

EVER_MS = 1 << 45


def drain(redis: Redis, state_dir: Path, *models: str) -> UsageDrain:
    return UsageDrain(redis, lambda: models or ("llama",), state_dir)


def written(state_dir: Path) -> list[str]:
    return [line.id for line in UsageFiles(state_dir).lines(0, EVER_MS)]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usagedrain, "BATCH", 3)


async def test_records_of_every_cell_are_written_and_trimmed(
    redis_client: Redis, tmp_path: Path, small_batches: None
) -> None:
    """More than a batch, settled and expired, of two cells: each is there once and gone from Redis."""
    for number in range(7):
        await settle(redis_client, f"a{number}")
    await settle(redis_client, "b", cell="other")
    held = msgspec.msgpack.encode([("k:k_1:output_tokens", 40)])
    memo = msgspec.json.encode(usage_record("lost"))
    await redis_client.xadd(usage_stream("other"), {b"expired": memo, b"held": held})

    await drain(redis_client, tmp_path, "llama", "other").round()

    assert written(tmp_path) == [*(f"a{number}" for number in range(7)), "b", "lost"]
    assert [line.output_tokens for line in UsageFiles(tmp_path).lines(0, EVER_MS)][-1] == 40
    assert [await redis_client.xlen(usage_stream(cell)) for cell in ("llama", "other")] == [0, 0]


async def test_a_crash_between_writing_and_trimming_repeats_nothing(
    redis_client: Redis, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process finds the entries again, sees that they are written, and goes on after them."""
    for number in range(4):
        await settle(redis_client, f"a{number}")

    async def dies(*_args: object, **_named: object) -> int:
        raise RedisError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(redis_client, "xtrim", dies)
        with pytest.raises(RedisError):
            await drain(redis_client, tmp_path).round()
    assert await redis_client.xlen(usage_stream("llama")) == 4
    assert written(tmp_path) == ["a0", "a1", "a2"]

    await drain(redis_client, tmp_path).round()

    assert written(tmp_path) == ["a0", "a1", "a2", "a3"]
    assert await redis_client.xlen(usage_stream("llama")) == 0


async def test_the_same_process_tries_again_without_repeating(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle makes it look into the files before it goes on, not only at what it remembers."""
    drainer = drain(redis_client, tmp_path)
    await settle(redis_client, "before")
    await drainer.round()
    await settle(redis_client, "a")

    async def dies(*_args: object, **_named: object) -> int:
        raise TimeoutError

    with monkeypatch.context() as broken:
        broken.setattr(redis_client, "xtrim", dies)
        with pytest.raises(TimeoutError):
            await drainer.round()
    await drainer.round()

    assert written(tmp_path) == ["before", "a"]


async def test_a_crash_within_a_line_loses_nothing(redis_client: Redis, tmp_path: Path) -> None:
    """Half a line of an entry that was not trimmed is replaced by the whole one."""
    entries = [await settle(redis_client, name) for name in ("a", "b")]
    stream = await redis_client.dump(usage_stream("llama"))
    assert stream is not None
    await drain(redis_client, tmp_path).round()
    (path,) = (tmp_path / "usage").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    await redis_client.restore(usage_stream("llama"), 0, stream, replace=True)

    await drain(redis_client, tmp_path).round()

    assert [(line.id, line.entry) for line in UsageFiles(tmp_path).lines(0, EVER_MS)] == [
        ("a", entries[0]),
        ("b", entries[1]),
    ]


async def test_an_older_redis_that_comes_back_repeats_nothing(
    redis_client: Redis, tmp_path: Path, small_batches: None
) -> None:
    """After a failover to a lagging replica the running process skips what it wrote, and takes what is new after it."""
    drainer = drain(redis_client, tmp_path)
    for number in range(8):
        await settle(redis_client, f"a{number}")
    stream = await redis_client.dump(usage_stream("llama"))
    assert stream is not None
    await drainer.round()
    await settle(redis_client, "lost by Redis, and written")
    await drainer.round()

    await redis_client.restore(usage_stream("llama"), 0, stream, replace=True)
    for number in range(8, 11):
        await settle(redis_client, f"a{number}")
    await drainer.round()

    names = [f"a{number}" for number in range(11)]
    assert written(tmp_path) == [*names[:8], "lost by Redis, and written", *names[8:]]


async def test_a_redis_that_starts_empty_with_its_clock_behind_loses_nothing(
    redis_client: Redis, tmp_path: Path
) -> None:
    """Ids that have gone back are no sign that a record was written; the same id with another request is another."""
    drainer = drain(redis_client, tmp_path)
    await settle(redis_client, "a", entry="1700000005000-0")
    await drainer.round()
    await redis_client.delete(usage_stream("llama"))
    for name, entry in (("b", "1700000001000-0"), ("c", "1700000005000-0"), ("d", "1700000009000-0")):
        await settle(redis_client, name, entry=entry)
        await drainer.round()

    assert written(tmp_path) == ["a", "b", "c", "d"]


async def test_files_are_searched_only_when_it_is_not_known_what_is_written(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running drain reads no file: a day's file may be large."""
    drainer = drain(redis_client, tmp_path)
    await settle(redis_client, "a")
    await drainer.round()
    monkeypatch.setattr(UsageFiles, "written", None)
    for name in ("b", "c"):
        await settle(redis_client, name)
        await drainer.round()
    assert written(tmp_path) == ["a", "b", "c"]


async def test_what_cannot_be_read_is_set_aside_and_holds_up_nothing(
    redis_client: Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A record of a version that this one does not know is kept and told; those after it are written."""
    await redis_client.xadd(usage_stream("llama"), {b"record": b'{"id": 5}'})
    await settle(redis_client, "a")

    await drain(redis_client, tmp_path).round()

    assert written(tmp_path) == ["a"]
    assert '{\\"id\\": 5}' in (tmp_path / "usage" / "unreadable.jsonl").read_text()
    assert "1 usage records cannot be read" in caplog.text


async def test_a_full_stream_is_told_once(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where records may have been dropped unseen, the log says so."""
    monkeypatch.setattr(usagedrain, "MOST_USAGE_RECORDS", usagedrain.BATCH + 2)
    drainer = drain(redis_client, tmp_path)
    await settle(redis_client, "a")
    await drainer.round()
    assert "is full" not in caplog.text
    for number in range(3):
        await settle(redis_client, f"b{number}")
    await drainer.round()
    assert caplog.text.count("the usage stream of llama is full (3 records)") == 1


async def test_a_model_that_left_the_config_is_drained_on(redis_client: Redis, tmp_path: Path) -> None:
    """Requests that were running when a pool was removed are recorded too."""
    models = ["llama"]
    drainer = UsageDrain(redis_client, lambda: models, tmp_path)
    await drainer.round()
    models.clear()
    await settle(redis_client, "a")
    await drainer.round()
    assert written(tmp_path) == ["a"]


async def test_a_full_disk_is_told_once_and_tried_again(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Records stay in Redis until they can be written, and the drain goes on by itself."""
    monkeypatch.setattr(usagedrain, "DRAIN_INTERVAL_S", 0.01)
    tries = asyncio.Semaphore(0)

    def full(*_args: object) -> None:
        tries.release()
        raise OSError(28, "No space left on device")

    await settle(redis_client, "a")
    with monkeypatch.context() as broken:
        broken.setattr(UsageFiles, "append", full)
        task = asyncio.create_task(drain(redis_client, tmp_path).run())
        async with asyncio.timeout(20):
            for _ in range(3):
                await tries.acquire()
    try:

        async def is_written() -> bool:
            return written(tmp_path) == ["a"]

        await eventually_async(is_written, 20, "the record's way to the disk")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert caplog.text.count("No space left on device") == 1


async def test_what_was_settled_last_is_written_when_the_controller_ends(redis_client: Redis, tmp_path: Path) -> None:
    """Cancelling the drain drains once more."""
    task = asyncio.create_task(drain(redis_client, tmp_path).run())

    async def is_at_work() -> bool:
        return (tmp_path / "usage" / "writer.lock").exists() and await settle(redis_client, "a") != ""

    await eventually_async(is_at_work, 20, "the drain's start")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert written(tmp_path) == ["a"]


async def test_a_second_controller_waits_for_the_first_to_end(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two controllers by mistake write no record twice: one drains, the other says why it does not."""
    monkeypatch.setattr(usagedrain, "DRAIN_INTERVAL_S", 0.01)
    await settle(redis_client, "a")

    async def is_written() -> bool:
        return written(tmp_path) == ["a"]

    async def is_told() -> bool:
        return "another process writes the files" in caplog.text

    with UsageFiles(tmp_path).writing() as first:
        assert first
        task = asyncio.create_task(drain(redis_client, tmp_path).run())
        try:
            await eventually_async(is_told, 20, "the line in the log")
            assert written(tmp_path) == []
        except BaseException:
            task.cancel()
            raise
    try:
        await eventually_async(is_written, 20, "the second's turn")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_cancellation_that_is_lost_ends_it_all_the_same(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a client library swallows the exception, the loop still ends, with its last round done."""
    monkeypatch.setattr(usagedrain, "DRAIN_INTERVAL_S", 0.01)
    draining, rounds = drain(redis_client, tmp_path), asyncio.Event()

    async def swallowing() -> None:
        rounds.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    monkeypatch.setattr(draining, "round", swallowing)
    task = asyncio.create_task(draining.run())
    await asyncio.wait_for(rounds.wait(), 20)
    monkeypatch.setattr(draining, "round", UsageDrain.round.__get__(draining))
    await settle(redis_client, "a")
    task.cancel()
    await asyncio.wait({task}, timeout=20)
    assert task.done()
    assert written(tmp_path) == ["a"]
