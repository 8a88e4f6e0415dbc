"""The client of publications, keys and the lease, where a server cannot serve any more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from ratelimit.embedded_redis import redis_server_executable
from ratelimit.redisclient import SOCKET_TIMEOUT_S, redis_client
from tests.support.servers import Server, valkey_server_executable

WRITE = "return redis.call('SET', KEYS[1], '1')"


@pytest.mark.parametrize("executable", [redis_server_executable, valkey_server_executable], ids=["redis", "valkey"])
async def test_a_demoted_master_is_left_for_whoever_has_its_address_now(
    executable: Callable[[], str], tmp_path: Path
) -> None:
    """A command, a transaction and a script reach the new master, though the old one keeps its connections open."""
    address = tmp_path / "redis.sock"
    with Server(executable()) as old, Server(executable()) as new:
        for write in ("command", "transaction", "script"):
            address.symlink_to(old.url.removeprefix("unix://"))
            async with aclosing(redis_client(f"unix://{address}")) as client:
                script = client.register_script(WRITE)
                await script(keys=["before"])
                address.unlink()
                address.symlink_to(new.url.removeprefix("unix://"))
                old.call("REPLICAOF", "127.0.0.1", 1)
                if write == "command":
                    await client.set(write, 1)
                elif write == "transaction":
                    async with client.pipeline(transaction=True) as pipe:
                        pipe.set(write, 1)
                        await pipe.execute()
                else:
                    await script(keys=[write])
                assert new.call("GET", write) == "1"
            address.unlink()
            old.call("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "unix:///s", "redis+sentinel://h/service/0"])
async def test_no_reply_is_waited_for_without_end(url: str) -> None:
    """Whatever the default of redis-py's version is."""
    async with aclosing(redis_client(url)) as client:
        options = client.connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (SOCKET_TIMEOUT_S, SOCKET_TIMEOUT_S)
