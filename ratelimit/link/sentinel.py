"""A link to the master that sentinels name, asked for anew at each connect."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ratelimit.link.endpoint import Address, Endpoint, NodeUrls, parse_endpoint
from ratelimit.link.node import Link


class SentinelLink(Link):
    """One connection at a time to the current master of a service.

    A master that lost its office says READONLY, or breaks its connections: either makes the link ask again.
    """

    def __init__(self, urls: NodeUrls, connect_timeout_s: float) -> None:
        self._service, _, db = urls.path.partition("/")
        if not self._service or not (db or "0").isdecimal():
            raise ValueError("name the service that the sentinels watch: redis+sentinel://host:port/service/0")
        self._urls = urls
        self._db = int(db or "0")
        super().__init__(urls.at(urls.seeds[0]), connect_timeout_s)
        self._name = f"the master of {self._service}"

    async def _locate(self) -> Endpoint:
        failures = []
        for address in self._urls.seeds:
            try:
                return parse_endpoint(self._urls.at(await self._ask(address), self._db))
            except (RedisError, TimeoutError) as error:
                failures.append(f"{address}: {error or 'no answer'}")
        raise RedisConnectionError(f"no sentinel names it ({'; '.join(failures)})")

    async def _ask(self, sentinel: Address) -> Address:
        """Whom one sentinel holds for the master; each gets its share of the time for connecting."""
        share_s = self._connect_timeout_s / (len(self._urls.seeds) + 1)
        async with aclosing(Link(self._urls.sentinel_at(sentinel), share_s)) as link, asyncio.timeout(share_s):
            found = await link.command("", "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        if not found:
            raise RedisConnectionError("it does not know this service")
        host, port = found
        return Address(host.decode(), int(port))
