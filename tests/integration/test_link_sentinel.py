"""Links and clients of the master that a real sentinel names, through a failover."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from functools import partial
from typing import NamedTuple

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from ratelimit.embedded_redis import redis_server_executable
from ratelimit.link import open_link
from ratelimit.redisclient import redis_client
from tests.support.servers import Server, free_port
from tests.support.waiting import eventually, eventually_async

CONNECT_S = 5.0
LONG_S = 30.0


class Watched(NamedTuple):
    """A master, its replica, and the sentinel that watches both."""

    master: Server
    replica: Server
    sentinel: Server


@pytest.fixture
def watched() -> Iterator[Watched]:
    """A sentinel that knows both servers of the service "limits"."""
    executable = redis_server_executable()
    with ExitStack() as running:
        master, replica = (running.enter_context(Server(executable, port=free_port())) for _ in range(2))
        replica.call("REPLICAOF", "127.0.0.1", master.port)
        eventually(lambda: replica.call("INFO", "replication")["master_link_status"] == "up", LONG_S, "replication")
        config = f"sentinel monitor limits 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds limits 1000\n"
        sentinel = running.enter_context(Server(executable, ["--sentinel"], free_port(), config))
        yield Watched(master, replica, sentinel)


async def fails_over(sentinel: Server) -> bool:
    """Whether the sentinel, told to, has found a replica that it can promote."""
    try:
        return bool(sentinel.call("SENTINEL", "FAILOVER", "limits") == "OK")
    except ResponseError:
        return False


@pytest.mark.slow
async def test_the_link_follows_the_master_through_a_failover(watched: Watched) -> None:
    """Writes go to the master; after a failover, and with a sentinel that is down, they go to the new one."""
    dead = free_port()
    url = f"redis+sentinel://127.0.0.1:{dead},127.0.0.1:{watched.sentinel.port}/limits/1"
    async with aclosing(open_link(url, CONNECT_S)) as link:
        assert await link.command("k", "SET", "k", 1) == b"OK"
        assert watched.master.call("INFO", "keyspace")["db1"]["keys"] == 1
        await eventually_async(partial(fails_over, watched.sentinel), LONG_S, "the failover's begin")

        async def new_master_serves() -> bool:
            try:
                return bool((await link.command("k", "CONFIG", "GET", "port"))[1] == b"%d" % watched.replica.port)
            except RedisConnectionError:
                return False

        await eventually_async(new_master_serves, LONG_S, "an answer of the new master")
        assert await link.command("k", "SET", "k", 2) == b"OK"


@pytest.mark.slow
async def test_the_plain_client_follows_it_too(watched: Watched) -> None:
    """Transactions, reads and announcements, as publications, keys and presence need them, before and after."""
    url = f"redis+sentinel://127.0.0.1:{watched.sentinel.port}/limits/1"
    async with redis_client(url) as client:
        assert (await written(client, b"1"), await heard(client)) == (b"1", b"said")
        assert watched.master.call("INFO", "keyspace")["db1"]["keys"] == 1
        await eventually_async(partial(fails_over, watched.sentinel), LONG_S, "the failover's begin")

        async def new_master_serves() -> bool:
            try:
                return await written(client, b"2") == b"2" and await port_of(client) == watched.replica.port
            except (RedisError, OSError):
                return False

        await eventually_async(new_master_serves, LONG_S, "a write on the new master")
        assert await heard(client) == b"said"


async def written(client: Redis, value: bytes) -> bytes | None:
    """What a transaction reads of what it has written."""
    async with client.pipeline(transaction=True) as pipe:
        pipe.set("k", value)
        pipe.get("k")
        _, read = await pipe.execute()
    return bytes(read)


async def port_of(client: Redis) -> int:
    """Where the server that answers listens."""
    return int(str((await client.config_get("port"))["port"]))


async def heard(client: Redis) -> bytes:
    """What a subscriber hears of what is said after it has subscribed."""
    async with client.pubsub(ignore_subscribe_messages=True) as pubsub, asyncio.timeout(LONG_S):
        await pubsub.subscribe("c")
        await pubsub.get_message(timeout=LONG_S)
        await client.publish("c", "said")
        while True:
            message = await pubsub.get_message(timeout=LONG_S)
            if message is not None:
                return bytes(message["data"])


async def test_sentinels_that_name_no_master_are_said(watched: Watched) -> None:
    """The error has each sentinel's reason: one is down, the other does not know the service."""
    dead = free_port()
    url = f"redis+sentinel://:secret@127.0.0.1:{dead},127.0.0.1:{watched.sentinel.port}/other"
    async with aclosing(open_link(url, CONNECT_S)) as link, asyncio.timeout(LONG_S):
        with pytest.raises(RedisError, match=rf"{dead}.*failed.*{watched.sentinel.port}.*know this service") as caught:
            await link.command("k", "PING")
    assert "secret" not in str(caught.value)
