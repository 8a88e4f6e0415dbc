"""A client of one Redis, wherever its URL says it is: a server, a TLS server, a Unix socket, or Sentinel's master.

The limiter has its own, faster way (``link``). This one is for all else: publications, keys, usage, presence. Nothing
that is raised here shows a password.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from ratelimit.link.endpoint import NodeUrls, parse_endpoint
from ratelimit.link.pipeline import is_unusable
from ratelimit.link.sentinel import Master

#: Connections of one process; more callers than these wait their turn.
MAX_CONNECTIONS = 64
#: For a connect, and for each reply; a URL may say otherwise.
SOCKET_TIMEOUT_S = 5.0
_SENTINEL_TIMEOUT_S = 2.0
_SENTINEL_PORT = 26379


class RedisUrlError(ValueError):
    """A URL that names no Redis, or one that cannot be used; the message shows no part of it."""


def redis_client(url: str) -> Redis:
    """A client, which connects when it is first used; the caller closes it. Raises ``RedisUrlError``.

    A connection that broke while idle is replaced once; there is no other retry, since every caller has its own limit.
    So is one whose server cannot serve any more, as a master that was demoted behind an address that has moved on.
    """
    try:
        _check(url)
        pool = _pool(url)
        pool.connection_class(**pool.connection_kwargs)  # connects to nothing, and says whether it knows the options
    except ValueError as error:
        raise RedisUrlError(f"redis: {error}") from None
    except TypeError:
        raise RedisUrlError(
            "redis: the Redis URL has an option behind its ? that such a connection does not know. Those of redis-py "
            "are known: db, socket_timeout, ssl_ca_certs and so on"
        ) from None
    pool.connection_class = _leaving(pool.connection_class)
    return Redis.from_pool(pool)


def shown(url: str) -> str:
    """The URL made anew from the parts that are no secret. Raises ``RedisUrlError``."""
    try:
        _check(url)
        scheme = url.partition("://")[0]
        if scheme.endswith("+sentinel"):
            urls = NodeUrls.parse(url, _SENTINEL_PORT)
            return f"{scheme}://{','.join(map(str, urls.seeds))}/{urls.path}"
        endpoint = parse_endpoint(url)
    except ValueError as error:
        raise RedisUrlError(f"redis: {error}") from None
    return f"unix://{endpoint}" if endpoint.path else f"{scheme}://{endpoint}/{endpoint.db}"


def _check(url: str) -> None:
    scheme, _, rest = url.partition("://")
    if scheme.endswith("+cluster"):
        raise ValueError(
            "a Redis Cluster cannot hold publications, keys and usage yet: use one Redis, or Sentinel "
            "(redis+sentinel://host:port,host:port/service/0)"
        )
    authority, *beyond = re.split("[/?#]", rest, maxsplit=1)
    if authority and "@" in "".join(beyond):  # a part of the password would be taken for the host, the port or the path
        raise ValueError("the Redis URL has an @ behind its host: write %-escapes for a password's special characters")
    if not scheme.endswith("+sentinel"):
        parse_endpoint(url)


def _pool(url: str) -> BlockingConnectionPool:
    options = {
        "max_connections": MAX_CONNECTIONS,
        "retry": Retry(NoBackoff(), 1),
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        # Only one vendor's service knows it; a user of few rights would be refused it at every connect.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if not url.partition("://")[0].endswith("+sentinel"):
        return BlockingConnectionPool.from_url(url, **options)
    urls = NodeUrls.parse(url, _SENTINEL_PORT)
    master = Master(urls, _SENTINEL_TIMEOUT_S)
    return _MasterPool(master, **parse_url(urls.at(urls.seeds[0], master.db)), **options)


class _Leaving(AbstractConnection):
    """A connection that is given up where its server cannot serve us, so that the next command dials anew."""

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except RedisError as error:
            if not is_unusable(error):
                raise
            await self.disconnect()
            raise RedisConnectionError(f"Redis cannot serve now: {type(error).__name__}: {error}") from error


def _leaving(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    return type(f"Leaving{kind.__name__}", (_Leaving, kind), {})


class _MasterPool(BlockingConnectionPool):
    """Connections to the master, asked for at each connect; as redis-py's managed connections expect of a pool."""

    is_master = True
    check_connection = False

    def __init__(self, master: Master, **options: Any) -> None:
        tls = options.pop("connection_class", None) is SSLConnection
        kind = SentinelManagedSSLConnection if tls else SentinelManagedConnection
        super().__init__(connection_class=kind, **options)
        self.connection_kwargs["connection_pool"] = weakref.proxy(self)
        self._master = master

    async def get_master_address(self) -> tuple[str, int]:
        return await self._master.find()
