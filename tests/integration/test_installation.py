"""Two controllers and three gateways as processes on one Redis: what the death of any one changes for callers."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from ratelimit.embedded_redis import redis_server_executable
from ratelimit.leadership import LEADER_KEY
from ratelimit.publication import Publication
from ratelimit.publisher import PUBLICATION_KEY
from tests.support.callers import Load, ask
from tests.support.installation import MODEL, Gateway, Installation
from tests.support.servers import Server
from tests.support.slow_replica import SlowReplica
from tests.support.waiting import eventually_async

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOKEN_S = 0.05
#: A lease of a reservation, a round of the reaper, and patience.
RESERVATION_TIMEOUT_S = 40.0


def chat(tokens: int, stream: bool = True) -> dict[str, Any]:
    return {"model": MODEL, "stream": stream, "max_tokens": tokens, "messages": [{"role": "user", "content": "x"}]}


SHORT_TOKENS = 3
SHORT = chat(SHORT_TOKENS)
#: Longer than any takeover of what the test kills.
LONG = chat(400)


class Epochs:
    """Every epoch that Redis, and each gateway, was seen to have, in their order."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self.seen: dict[str, list[int]] = {}

    async def watch(self) -> None:
        while True:
            self._note("redis", await self.in_redis())
            for gateway in self._installation.gateways:
                self._note(gateway.url, await _epoch_of(gateway))
            await asyncio.sleep(0.1)

    async def in_redis(self) -> int:
        document = await self._installation.redis.get(PUBLICATION_KEY)
        return msgspec.json.decode(document or b"", type=Publication).epoch

    def _note(self, where: str, epoch: int | None) -> None:
        epochs = self.seen.setdefault(where, [])
        if epoch is not None and (not epochs or epochs[-1] != epoch):
            epochs.append(epoch)


async def _epoch_of(gateway: Gateway) -> int | None:
    try:
        return int((await gateway.publication())["epoch"])
    except (httpx.HTTPError, KeyError):  # it has ended, or knows of no limits yet
        return None


@asynccontextmanager
async def installed(folder: Path, replicas: int = 1) -> AsyncIterator[tuple[Installation, list[SlowReplica]]]:
    """An installation on a Redis of its own, led and ready; epochs never go back while it runs."""
    async with AsyncExitStack() as running:
        server = running.enter_context(Server(redis_server_executable()))
        made = [await running.enter_async_context(SlowReplica(TOKEN_S)) for _ in range(replicas)]
        installation = await running.enter_async_context(Installation(folder, server.url, [made[0].url]))
        await installation.until_led()
        epochs = Epochs(installation)
        watching = asyncio.create_task(epochs.watch())
        try:
            yield installation, made
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        assert epochs.seen
        assert all(seen == sorted(set(seen)) for seen in epochs.seen.values()), epochs.seen


async def limits_in_force(installation: Installation) -> list[Any]:
    """What every gateway enforces, without what names the publication."""
    told = [await gateway.publication() for gateway in installation.gateways]
    return [{name: each[name] for name in ("enforce", "pools", "tiers", "orgs")} for each in told]


@asynccontextmanager
async def steady_calls(installation: Installation, *gateways: Gateway) -> AsyncIterator[list[Load]]:
    """Calls through these gateways, and a long stream through each, none of which may have anything to complain of.

    In the end the day files have each once, whoever led meanwhile.
    """
    secret = installation.secret
    async with AsyncExitStack() as running:
        loads = [await running.enter_async_context(Load(each.url, secret, 2, SHORT)) for each in gateways]
        streams = [asyncio.create_task(ask(each.url, secret, LONG)) for each in gateways]
        yield loads
        answers = await asyncio.gather(*streams)
    served = len(answers) + sum(load.statuses.total() for load in loads)
    assert [answer.complaint for answer in answers] == [""] * len(answers)
    assert [load.complaints for load in loads] == [[] for _ in loads]
    assert [set(load.statuses) for load in loads] == [{200} for _ in loads]

    async def kept() -> bool:
        return Counter(line.outcome for line in installation.ledger())["ended"] >= served

    await eventually_async(kept, 30, "a usage record of every answer")
    ids = Counter(line.id for line in installation.ledger())
    assert set(ids.values()) == {1}


async def go_on(loads: list[Load]) -> None:
    """Wait until every caller was answered several times more."""
    before = [load.statuses.total() for load in loads]

    async def answered() -> bool:
        return all(load.statuses.total() >= told + 5 for load, told in zip(loads, before, strict=True))

    await eventually_async(answered, 30, "more answers")


async def test_the_death_of_the_leader_changes_nothing_for_callers(tmp_path: Path) -> None:
    """The other leads within the lease, with the same limits; the first one stands by when it is started again."""
    async with installed(tmp_path) as (installation, _), steady_calls(installation, *installation.gateways) as loads:
        leader = await installation.until_led()
        other, before = installation.standby(leader), await limits_in_force(installation)
        await leader.end()
        await installation.until_led(by=other)
        await go_on(loads)
        assert await limits_in_force(installation) == before
        assert await other.metric("penstock_leader") == 1

        leader.start()
        await leader.until_ready()
        assert await leader.metric("penstock_leader") == 0
        assert await installation.leader() is other
        assert await leader.probe("/live") == await other.probe("/live") == 200


async def test_the_death_of_the_standby_changes_nothing_at_all(tmp_path: Path) -> None:
    """Not even the epoch; and started again it can lead as soon as the leader is stopped in order."""
    async with installed(tmp_path) as (installation, _), steady_calls(installation, *installation.gateways) as loads:
        leader = await installation.until_led()
        other, before = installation.standby(leader), await installation.redis.get(PUBLICATION_KEY)
        lease = await installation.redis.get(LEADER_KEY)
        await other.end()
        await go_on(loads)
        assert await installation.redis.get(PUBLICATION_KEY) == before

        other.start()
        await other.until_ready()
        assert await installation.redis.get(LEADER_KEY) == lease

        assert await leader.end(signal.SIGTERM) == 0
        left_ms = await installation.redis.pttl(LEADER_KEY)
        assert left_ms < 0 or await installation.leader() is other  # given back, and not left to end
        await installation.until_led(by=other)
        await go_on(loads)


async def test_what_changes_while_nobody_leads_is_published_by_the_next(tmp_path: Path) -> None:
    """A replica that was added to the config counts in the new leader's limits, for every gateway."""
    async with (
        installed(tmp_path, replicas=2) as (installation, replicas),
        steady_calls(installation, *installation.gateways) as loads,
    ):
        leader = await installation.until_led()
        await leader.end()
        installation.serve_by([replica.url for replica in replicas])

        async def counted() -> bool:
            pools = [(await gateway.publication())["pools"] for gateway in installation.gateways]
            return all(len(of_gateway[0]["replicas"]) == 2 for of_gateway in pools)

        await eventually_async(counted, 60, "the new replica in the limits of every gateway")
        await go_on(loads)


async def test_a_leader_that_was_paused_publishes_nothing(tmp_path: Path) -> None:
    """It wakes to another's term: what is in force stays, byte for byte, and it stands by."""
    async with (
        installed(tmp_path, replicas=2) as (installation, replicas),
        steady_calls(installation, *installation.gateways) as loads,
    ):
        leader = await installation.until_led()
        other = installation.standby(leader)
        leader.send(signal.SIGSTOP)
        await installation.until_led(by=other)
        # Something for the one that wakes to publish, and that the other has published before.
        installation.serve_by([replica.url for replica in replicas])

        async def counted() -> bool:
            return len((await installation.gateways[0].publication())["pools"][0]["replicas"]) == 2

        await eventually_async(counted, 30, "the new replica")
        lease = await installation.redis.get(LEADER_KEY)
        before = await installation.redis.get(PUBLICATION_KEY)

        leader.send(signal.SIGCONT)
        await leader.until_ready()

        async def stands_by() -> bool:
            return await leader.metric("penstock_leader") == 0

        await eventually_async(stands_by, 20, "its standing by")
        await go_on(loads)
        assert await installation.redis.get(PUBLICATION_KEY) == before
        assert await installation.redis.get(LEADER_KEY) == lease
        assert leader.log().count("leads no longer") == 1


async def test_a_killed_gateway_breaks_its_own_streams_only(tmp_path: Path) -> None:
    """They end, and what they held is given back when their leases end; nobody else notices; it serves again."""
    async with installed(tmp_path) as (installation, (replica,)):
        victim, *others = installation.gateways
        async with steady_calls(installation, *others) as loads:
            stream = asyncio.create_task(ask(victim.url, installation.secret, LONG))
            await eventually_async(lambda: _are_open(replica, 3), 20, "three open streams")
            await victim.end()
            broken = await stream
            await go_on(loads)
            assert broken.status == 200
            assert not broken.whole
            assert broken.complaint

            victim.start()
            await victim.until_ready()
            assert (await ask(victim.url, installation.secret, SHORT)).complaint == ""
        await nothing_is_held(installation)


async def test_a_stopped_gateway_ends_long_streams_with_an_error_event(tmp_path: Path) -> None:
    """What finishes within the drain time does; what does not is told so, and is settled before the process ends."""
    async with installed(tmp_path) as (installation, (replica,)):
        victim, *others = installation.gateways
        async with steady_calls(installation, *others) as loads:
            short = asyncio.create_task(ask(victim.url, installation.secret, chat(30)))
            stream = asyncio.create_task(ask(victim.url, installation.secret, LONG))
            await eventually_async(lambda: _are_open(replica, 4), 20, "four open streams")
            assert await victim.end(signal.SIGTERM) == 0
            told = await stream
            await go_on(loads)
            assert (await short).complaint == ""
            assert told.status == 200
            assert b'data: {"error":' in told.body
            assert b"[DONE]" not in told.body
        await nothing_is_held(installation)
        assert [line.outcome for line in installation.ledger() if line.outcome != "ended"] == ["cut"]


async def _are_open(replica: SlowReplica, streams: int) -> bool:
    """Streams that are not the steady calls' short ones."""
    return sum(emitted > SHORT_TOKENS for emitted in replica.emitted.values()) >= streams


async def nothing_is_held(installation: Installation) -> None:
    """Wait until no request of the key is in flight any more, as Redis sees it."""
    gateway = installation.gateways[-1]

    async def given_back() -> bool:
        concurrency = (await gateway.limits(installation.secret))["concurrency"]
        return bool(concurrency["remaining"] == concurrency["burst"])

    await eventually_async(given_back, RESERVATION_TIMEOUT_S, "the giving back of what was held")
