"""What a URL says about one Redis, or about the nodes of several. No message or repr shows a password."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from redis.asyncio.connection import SSLConnection, parse_url
from redis.exceptions import RedisError


class Address(NamedTuple):
    """A server's TCP address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where one Redis listens, a Unix socket where ``path`` is set, and how it is greeted."""

    address: Address
    path: str
    db: int
    username: str = field(repr=False)
    password: str = field(repr=False)
    tls: ssl.SSLContext | None = field(repr=False)

    def __str__(self) -> str:
        return self.path or str(self.address)


def parse_endpoint(url: str) -> Endpoint:
    """The Redis at a ``redis://``, ``rediss://`` or ``unix://`` URL; raises ValueError."""
    try:
        found: Mapping[str, Any] = parse_url(url)
        tls = _tls_context(found) if url.startswith("rediss://") else None
    except OSError as error:
        raise ValueError(f"the TLS files of a Redis's URL cannot be read: {error}") from None
    except (ValueError, TypeError, RedisError):  # whose text may hold a part of the password
        raise ValueError(
            "not the address of a Redis: write redis://host:6379/0, rediss://… or unix:///path/redis.sock, "
            "with %-escapes for the special characters of a password"
        ) from None
    return Endpoint(
        address=Address(found.get("host", "localhost"), found.get("port", 6379)),
        path=found.get("path", ""),
        db=found.get("db", 0),
        username=found.get("username", ""),
        password=found.get("password", ""),
        tls=tls,
    )


def _tls_context(found: Mapping[str, Any]) -> ssl.SSLContext:
    """The context that redis-py would use: certificates and host names are checked unless the URL says otherwise."""
    options = {name: value for name, value in found.items() if name.startswith("ssl_")}
    return SSLConnection(**options).ssl_context.get()


@dataclass(frozen=True, kw_only=True)
class NodeUrls:
    """A URL that names several servers: the ones to ask first, and the URL of each that they name."""

    seeds: tuple[Address, ...]
    path: str
    options: Mapping[str, str] = field(repr=False)
    _scheme: str
    _userinfo: str = field(repr=False)

    @classmethod
    def parse(cls, url: str, default_port: int) -> NodeUrls:
        """Of ``redis+kind://[user:password@]host:port[,host:port…]/path?options``; raises ValueError."""
        try:
            parts = urlsplit(url)
            userinfo, _, hosts = parts.netloc.rpartition("@")
            seeds = tuple(_address(host, default_port) for host in hosts.split(","))
        except ValueError:  # whose text may hold a part of the password
            raise ValueError(
                "a Redis URL of several servers is redis+cluster://host:port,host:port or "
                "redis+sentinel://host:port,host:port/service/0, with %-escapes for a password's special characters"
            ) from None
        scheme = parts.scheme.partition("+")[0]
        options = dict(parse_qsl(parts.query))
        found = cls(
            seeds=seeds, path=unquote(parts.path).strip("/"), options=options, _scheme=scheme, _userinfo=userinfo
        )
        parse_endpoint(found.at(seeds[0]))
        return found

    def at(self, address: Address, db: int = 0) -> str:
        """The URL of one server, with the credentials and options of this one."""
        return self._url(self._userinfo, address, db)

    def sentinel_at(self, address: Address) -> str:
        """The URL of a sentinel, which has credentials of its own."""
        username, password = (
            quote(self.options.get(f"sentinel_{name}", ""), safe="") for name in ("username", "password")
        )
        return self._url(f"{username}:{password}", address, 0)

    def _url(self, userinfo: str, address: Address, db: int) -> str:
        query = urlencode({name: value for name, value in self.options.items() if name.startswith("ssl_")})
        return f"{self._scheme}://{userinfo}@{address}/{db}?{query}"


def _address(text: str, default_port: int) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("no host")
    return Address(unquote(parts.hostname), parts.port or default_port)
