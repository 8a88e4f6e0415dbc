"""The servers that benches run: one Redis without persistence, and the tool that loads it."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.embedded_redis import redis_server_executable
from tests.support.stack import free_ports

START_TIMEOUT_S = 10.0


class RedisServer(NamedTuple):
    """A running Redis, reached on a Unix socket (quicker) or on TCP at 127.0.0.1."""

    socket: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        """The Unix socket's."""
        return f"unix://{self.socket}"


@contextmanager
def bench_redis() -> Iterator[RedisServer]:
    """A Redis of this bench alone, which keeps nothing on disk."""
    with tempfile.TemporaryDirectory(prefix="pn-bench-") as folder:
        socket, (port,) = f"{folder}/redis.sock", free_ports(1)
        argv = [redis_server_executable(), "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", socket]
        with (
            (Path(folder) / "redis.log").open("wb") as log,
            subprocess.Popen([*argv, "--dir", folder, "--save", ""], stdout=log) as process,
        ):
            try:
                _wait_for(socket)
                yield RedisServer(socket, port, process.pid)
            finally:
                process.kill()


def _wait_for(socket: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with redis.Redis(unix_socket_path=socket) as client:
        while True:
            try:
                client.ping()
            except RedisConnectionError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)
            else:
                return


class RedisBenchmark(NamedTuple):
    """``redis-benchmark`` (or ``valkey-benchmark``) against one server: 50 connections, one command at a time each."""

    executable: str
    socket: str

    def rate(self, command: Sequence[bytes | str | int], requests: int) -> float:
        """Commands a second; each ``__rand_int__`` in the command becomes 12 random digits anew for each request.

        The command may hold no NUL byte: the tool takes it as its own arguments. Raises RuntimeError where Redis
        refuses it.
        """
        options = ("-s", self.socket, "-c", "50", "-n", str(requests), "-r", str(2**31 - 1), "--csv")
        parts = [part if isinstance(part, bytes) else str(part).encode() for part in command]
        done = subprocess.run([self.executable, *options, *parts], capture_output=True, check=False)
        if done.returncode or b"rror" in done.stderr:
            raise RuntimeError(f"redis-benchmark failed: {done.stderr.decode(errors='replace').strip()}")
        return float(done.stdout.rstrip().splitlines()[-1].rsplit(b'","', 7)[1])
