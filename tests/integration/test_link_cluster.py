"""A link to a real Redis Cluster: commands follow their slots while these move, and when a primary dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError, TryAgainError

from ratelimit.embedded_redis import redis_server_executable
from ratelimit.link import ClusterLink, open_link
from ratelimit.link.endpoint import NodeUrls
from tests.support.servers import Cluster, Server, cluster, free_port
from tests.support.waiting import eventually_async

#: A cluster of its own, moved about.
pytestmark = pytest.mark.slow

CONNECT_S = 10.0
LONG_S = 30.0
CELL = "pn2:{moving}:"
SLOT = key_slot(CELL.encode())


@pytest.fixture
async def link(redis_cluster: Cluster) -> AsyncIterator[ClusterLink]:
    """A link to the session's cluster, whose nodes are empty."""
    for node in redis_cluster.nodes:
        node.call("FLUSHALL")
    opened = open_link(redis_cluster.url, CONNECT_S)
    assert isinstance(opened, ClusterLink)
    async with aclosing(opened):
        yield opened


def ends_of_the_move(formed: Cluster) -> tuple[Server, Server]:
    """The owner of the slot now, and a node that it can be moved to."""
    source = formed.owner(SLOT)
    return source, next(node for node in formed.nodes if node is not source)


async def test_each_key_reaches_the_node_of_its_hash_tag(link: ClusterLink, redis_cluster: Cluster) -> None:
    """Scripts over the keys of many cells are all served, and every node has its share of them."""
    script = "return redis.call('INCRBY', KEYS[1], ARGV[1]) + redis.call('INCR', KEYS[2])"
    cells = [f"pn2:{{cell-{number}}}:" for number in range(60)]
    replies = await asyncio.gather(
        *(link.command(cell, "EVAL", script, 2, cell + "a", cell + "b", 10) for cell in cells)
    )
    assert replies == [11] * len(cells)
    assert all(node.call("DBSIZE") > 0 for node in redis_cluster.nodes)


async def test_a_moved_slot_is_followed_and_remembered(link: ClusterLink, redis_cluster: Cluster) -> None:
    """The first command after a move is redirected and served; the next goes straight to the new owner."""
    await link.command(CELL, "SET", CELL + "a", "kept")
    source, target = ends_of_the_move(redis_cluster)
    redis_cluster.begin_move(SLOT, source, target)
    redis_cluster.finish_move(SLOT, source, target)
    source.call("CONFIG", "RESETSTAT")
    for _ in range(5):
        assert await link.command(CELL, "GET", CELL + "a") == b"kept"
    assert source.call("INFO", "errorstats")["errorstat_MOVED"]["count"] == 1


async def test_keys_of_a_slot_on_the_move_are_found_on_both_nodes(link: ClusterLink, redis_cluster: Cluster) -> None:
    """ASK is followed for what has moved already, and a script whose keys are torn apart is told to try again."""
    await link.command(CELL, "SET", CELL + "stays", 1)
    source, target = ends_of_the_move(redis_cluster)
    redis_cluster.begin_move(SLOT, source, target)
    torn = ("EVAL", "return #redis.call('MGET', KEYS[1], KEYS[2])", 2, CELL + "stays", CELL + "new")
    try:
        assert await link.command(CELL, "SET", CELL + "new", 2) == b"OK"
        assert target.call("CLUSTER", "COUNTKEYSINSLOT", SLOT) == 1
        assert await link.command(CELL, "GET", CELL + "stays") == b"1"
        assert await link.command(CELL, "GET", CELL + "new") == b"2"
        with pytest.raises(TryAgainError):
            await link.command(CELL, *torn)
    finally:
        redis_cluster.finish_move(SLOT, source, target)
    assert await link.command(CELL, *torn) == 2


async def test_a_slot_moves_to_and_fro_while_in_use(link: ClusterLink, redis_cluster: Cluster) -> None:
    """No command fails and none is run twice while callers count and the slot moves twice."""
    counted = 0
    stop = asyncio.Event()

    async def count() -> None:
        nonlocal counted
        while not stop.is_set():
            await link.command(CELL, "INCR", CELL + "count")
            counted += 1

    callers = [asyncio.create_task(count()) for _ in range(20)]
    for _ in range(2):
        source, target = ends_of_the_move(redis_cluster)
        before = counted
        await asyncio.to_thread(redis_cluster.begin_move, SLOT, source, target)
        await asyncio.to_thread(redis_cluster.finish_move, SLOT, source, target)

        async def counts_on(beyond: int = before + 100) -> bool:
            return counted > beyond

        await eventually_async(counts_on, LONG_S, "counting on the new owner")
    stop.set()
    await asyncio.gather(*callers)
    assert int(await link.command(CELL, "GET", CELL + "count")) == counted


async def test_a_primary_that_dies_is_replaced_by_a_replica_that_joined_later() -> None:
    """While nobody serves the slot commands fail with ConnectionError; once the replica took over they are served."""
    with cluster(primaries=1, spare=1) as formed:
        primary, replica = formed.nodes
        link = ClusterLink(NodeUrls.parse(formed.url, 6379), CONNECT_S, map_lasts_s=0.1)
        async with aclosing(link):
            await link.command(CELL, "SET", CELL + "a", 1)
            replica.call("CLUSTER", "REPLICATE", formed.node_id(primary))

            async def knows_both() -> bool:
                await link.command(CELL, "SET", CELL + "a", 1)
                return link._map is not None and len(link._map.nodes) == len(formed.nodes)

            await eventually_async(knows_both, LONG_S, "the replica's being told of")
            link._map_until_s = float("inf")  # from now on only failures make it ask
            await asyncio.to_thread(primary.kill)
            with pytest.raises(RedisConnectionError):
                await link.command(CELL, "GET", CELL + "a")
            replica.call("CLUSTER", "FAILOVER", "TAKEOVER")

            async def served() -> bool:
                try:
                    return bool(await link.command(CELL, "INCR", CELL + "a"))
                except (RedisConnectionError, ResponseError):
                    return False

            await eventually_async(served, LONG_S, "an answer of the replica that took over")


async def test_a_slot_that_nobody_serves_is_an_error_and_comes_back(link: ClusterLink, redis_cluster: Cluster) -> None:
    """CLUSTERDOWN is raised after a bounded number of attempts, and the slot is served again once it has an owner."""
    owner = redis_cluster.owner(SLOT)
    await link.command(CELL, "PING")
    owner.call("CLUSTER", "DELSLOTS", SLOT)
    try:
        with pytest.raises(RedisError, match=r"(?i)slot .*served|cluster is down|serves slot"):
            await link.command(CELL, "INCR", CELL + "a")
    finally:
        owner.call("CLUSTER", "ADDSLOTS", SLOT)

    async def served() -> bool:
        try:
            return bool(await link.command(CELL, "INCR", CELL + "a"))
        except ResponseError:
            return False

    await eventually_async(served, LONG_S, "an answer for the slot")


async def test_callers_at_the_start_share_one_question_for_the_map(redis_cluster: Cluster, link: ClusterLink) -> None:
    """Many first commands at once ask the cluster for its slots once."""
    for node in redis_cluster.nodes:
        node.call("CONFIG", "RESETSTAT")
    await asyncio.gather(*(link.command(f"{{{number}}}", "INCR", f"{{{number}}}") for number in range(50)))
    stats = [node.call("INFO", "commandstats") for node in redis_cluster.nodes]
    assert sum(found["cmdstat_cluster"]["calls"] for found in stats if "cmdstat_cluster" in found) == 1


async def test_one_server_that_is_no_cluster_is_said() -> None:
    """The error names the node and the server's reason, and a closed link says that it is closed."""
    with Server(redis_server_executable(), port=free_port()) as server:
        async with aclosing(open_link(f"redis+cluster://127.0.0.1:{server.port}", CONNECT_S)) as link:
            with pytest.raises(RedisConnectionError, match=rf"127\.0\.0\.1:{server.port}.*cluster support disabled"):
                await link.command(CELL, "PING")
    with pytest.raises(RedisConnectionError, match="this link is closed"):
        await link.command(CELL, "PING")
