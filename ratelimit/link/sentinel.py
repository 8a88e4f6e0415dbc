"""A link to the master that sentinels name, asked for anew at each connect."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ratelimit.link.endpoint import Address, Endpoint, NodeUrls, parse_endpoint
from ratelimit.link.node import Link


class Master:
    """The master of a service, as its sentinels name it. Raises ValueError for a URL without a service."""

    def __init__(self, urls: NodeUrls, timeout_s: float) -> None:
        self.service, _, db = urls.path.partition("/")
        if not self.service or not (db or "0").isdecimal():
            raise ValueError("name the service that the sentinels watch: redis+sentinel://host:port/service/0")
        self.db = int(db or "0")
        self._urls = urls
        self._timeout_s = timeout_s

    async def find(self) -> Address:
        """Where it is now. Raises ConnectionError."""
        failures = []
        for sentinel in self._urls.seeds:
            try:
                return await self._ask(sentinel)
            except (RedisError, TimeoutError) as error:
                failures.append(f"{sentinel}: {error or 'no answer'}")
        raise RedisConnectionError(f"no sentinel names it ({'; '.join(failures)})")

    async def _ask(self, sentinel: Address) -> Address:
        """Whom one sentinel holds for the master; each gets its share of the time."""
        share_s = self._timeout_s / (len(self._urls.seeds) + 1)
        async with aclosing(Link(self._urls.sentinel_at(sentinel), share_s)) as link, asyncio.timeout(share_s):
            found = await link.command("", "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        if not found:
            raise RedisConnectionError("it does not know this service")
        host, port = found
        return Address(host.decode(), int(port))


class SentinelLink(Link):
    """One connection at a time to the current master of a service.

    A master that lost its office says READONLY, or breaks its connections: either makes the link ask again.
    """

    def __init__(self, urls: NodeUrls, connect_timeout_s: float) -> None:
        self._master = Master(urls, connect_timeout_s)
        self._urls = urls
        super().__init__(urls.at(urls.seeds[0]), connect_timeout_s)
        self._name = f"the master of {self._master.service}"

    async def _locate(self) -> Endpoint:
        return parse_endpoint(self._urls.at(await self._master.find(), self._master.db))
