"""A link to a Redis Cluster: each command goes to the node that serves its key's slot.

The map of slots is asked for at the first command, and again when a node redirects us or cannot be reached, or when it
is old. A command is sent again only where a node refused to run it, never where a connection broke. While a slot is
being moved, a script over keys of which some exist and some do not is refused (TRYAGAIN) until the move is over.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit.link.endpoint import Address, NodeUrls
from ratelimit.link.node import Link
from ratelimit.link.pipeline import Command

#: How often one command is sent at most.
MOST_ATTEMPTS: Final = 6
#: Before a command is sent again to nodes that cannot run it yet; doubles each time.
FIRST_PAUSE_S: Final = 0.002
#: The map is not asked for more often than this.
REFRESH_EVERY_S: Final = 0.1
#: A map this old is asked for anew, so that replicas that joined are known when their primary dies.
MAP_LASTS_S: Final = 30.0
ASKING: Final[Command] = ("ASKING",)


class SlotMap:
    """Which node serves each slot, and every node, replicas too."""

    def __init__(self, owners: list[Address | None], nodes: frozenset[Address]) -> None:
        self.owners = owners
        self.nodes = nodes

    @classmethod
    def read(cls, reply: Sequence[Sequence[Any]], teller: Address) -> SlotMap:
        """Of CLUSTER SLOTS as ``teller`` answered it; a node that it names without a host is at its own."""
        owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        nodes = set()
        for first, last, *servers in reply:
            addresses = [Address((host or b"").decode() or teller.host, port) for host, port, *_ in servers]
            owners[first : last + 1] = [addresses[0]] * (last + 1 - first)
            nodes.update(addresses)
        return cls(owners, frozenset(nodes))


class ClusterLink:
    """A link to each node of a cluster that is needed."""

    def __init__(self, urls: NodeUrls, connect_timeout_s: float, map_lasts_s: float = MAP_LASTS_S) -> None:
        self._urls = urls
        self._connect_timeout_s = connect_timeout_s
        self._map_lasts_s = map_lasts_s
        self._map_until_s = 0.0
        self._links: dict[Address, Link] = {}
        self._map: SlotMap | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._refresh_from_s = 0.0
        self._failure = ""
        self._closed = False

    def __repr__(self) -> str:
        return f"<ClusterLink {', '.join(map(str, self._urls.seeds))}>"

    async def command(self, key: str, *parts: bytes | str | int) -> Any:
        """The reply of the node that serves ``key``, undecoded; raises as ``Link.command``."""
        slot = key_slot(key.encode())
        at = await self._owner(slot)
        commands: tuple[Command, ...] = (parts,)
        refused: ResponseError | None = None
        for attempt in range(MOST_ATTEMPTS):
            try:
                return await self._link(at).send(*commands)
            except MovedError as moved:
                refused, at, commands = moved, self._named(moved, at), (parts,)
                self._learn(slot, at)
            except AskError as asked:
                refused, at, commands = asked, self._named(asked, at), (ASKING, parts)
            except (TryAgainError, ClusterDownError) as error:
                refused = error
                self._refresh()
                await asyncio.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1))  # noqa: S311 -- jitter
                at, commands = await self._owner(slot), (parts,)
            except RedisConnectionError:
                self._refresh()
                raise
        assert refused is not None  # noqa: S101 -- MOST_ATTEMPTS is not 0
        raise refused

    async def aclose(self) -> None:
        """End every connection for good: what is in flight raises ConnectionError."""
        self._closed = True
        self._failure = "this link is closed"
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait((self._refreshing,))
        for link in self._links.values():
            await link.aclose()

    def _link(self, address: Address) -> Link:
        if self._closed:
            raise RedisConnectionError(self._failure)
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = Link(self._urls.at(address), self._connect_timeout_s)
        return link

    async def _owner(self, slot: int) -> Address:
        """The node that serves ``slot``, as far as we know. Raises ConnectionError and ClusterDownError."""
        if asyncio.get_running_loop().time() >= self._map_until_s:
            self._refresh()
        if self._map is None and self._refreshing is not None:
            await asyncio.wait((self._refreshing,))
        if self._map is None:
            raise RedisConnectionError(f"no node of the Redis Cluster tells its slots: {self._failure}")
        owner = self._map.owners[slot]
        if owner is None:
            self._refresh()
            raise ClusterDownError(f"no node of the Redis Cluster serves slot {slot}")
        return owner

    def _learn(self, slot: int, owner: Address) -> None:
        """One slot moved, others may have."""
        if self._map is not None:
            self._map.owners[slot] = owner
        self._refresh()

    @staticmethod
    def _named(error: AskError, teller: Address) -> Address:
        return Address(error.host or teller.host, error.port)

    def _refresh(self) -> None:
        """Begin to ask for the map, unless that was done just now."""
        loop = asyncio.get_running_loop()
        if self._refreshing is None and not self._closed and loop.time() >= self._refresh_from_s:
            self._refreshing = loop.create_task(self._read_map(), name="read the slots of the Redis Cluster")

    async def _read_map(self) -> None:
        known = self._map.nodes if self._map is not None else frozenset()
        asked = [*known, *(seed for seed in self._urls.seeds if seed not in known)]
        random.shuffle(asked)
        try:
            for address in asked:
                if await self._read_map_of(address):
                    await self._drop_links()
                    return
        finally:
            self._refresh_from_s = asyncio.get_running_loop().time() + REFRESH_EVERY_S
            self._refreshing = None

    async def _read_map_of(self, address: Address) -> bool:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                reply = await self._link(address).send(("CLUSTER", "SLOTS"))
        except (RedisError, TimeoutError) as error:
            self._failure = f"{address}: {error or 'no answer'}"
            return False
        self._map = SlotMap.read(reply, address)
        self._map_until_s = asyncio.get_running_loop().time() + self._map_lasts_s
        return True

    async def _drop_links(self) -> None:
        """Close what leads to nodes that left the cluster."""
        kept = {*self._urls.seeds, *(self._map.nodes if self._map is not None else ())}
        for address in [address for address, link in self._links.items() if address not in kept and link.is_idle]:
            await self._links.pop(address).aclose()
