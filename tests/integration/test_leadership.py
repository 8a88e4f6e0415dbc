"""Candidates for the lead on a real Redis: who holds the lease, and whose writes happen."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.controllermetrics import ControllerMetrics
from ratelimit.embedded_redis import redis_server_executable
from ratelimit.installation import Installation, installation_of
from ratelimit.keys import KeyRecord
from ratelimit.leadership import (
    INSTALLATION_KEY,
    LEADER_KEY,
    LEASE_S,
    TERM_KEY,
    Draft,
    Leadership,
    NotLeadingError,
    Word,
)
from ratelimit.publication import Publication
from ratelimit.publisher import DRAFT_KEPT_MS, KEYS_KEY, PUBLICATION_KEY, Publisher, published_file, read_published
from tests.integration.test_publisher import VALID, limits
from tests.support.servers import Server
from tests.support.waiting import eventually_async

WAIT_S = 20.0


class Clock:
    """A steady clock that the test may put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return monotonic() + self.ahead_s


class Candidate:
    """A candidate that runs; ``terms`` are those it has led."""

    def __init__(self, redis: Redis, installation: str = "ours") -> None:
        self.redis = redis
        self.metrics = ControllerMetrics()
        self.clock = Clock()
        self.leadership = Leadership(redis, self.metrics, Installation(installation, Path(installation)), self.clock)
        self.terms: list[int] = []
        self.working = 0

    async def work(self) -> None:
        self.terms.append(self.leadership.term)
        self.working += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.working -= 1

    async def leads(self, term_above: int = 0) -> bool:
        return self.leadership.term > term_above

    async def until_it_leads(self, term_above: int = 0) -> int:
        await eventually_async(lambda: self.leads(term_above), WAIT_S, "its lead")
        return self.leadership.term

    async def until_it_stands_by(self) -> None:
        async def idle() -> bool:
            return not self.leadership.term and not self.working

        await eventually_async(idle, WAIT_S, "its standing by")


@asynccontextmanager
async def running(redis: Redis, installation: str = "ours") -> AsyncIterator[Candidate]:
    candidate = Candidate(redis, installation)
    task = asyncio.create_task(candidate.leadership.run(candidate.work))
    try:
        yield candidate
        assert not task.done(), "the candidate ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_one_of_two_leads_and_the_other_follows_it_at_once(redis_client: Redis) -> None:
    """Whoever is stopped in order gives the lease back: nobody waits for its end, which is put off here."""
    async with running(redis_client) as second:
        async with running(redis_client) as first:
            await eventually_async(lambda: _one_leads(first, second), WAIT_S, "a leader")
            leader, other = (first, second) if first.leadership.term else (second, first)
            assert await other.leadership._ask()
            assert other.leadership.term == 0
        if leader is first:
            await second.until_it_leads(term_above=1)
            assert second.terms == [2]
    assert await redis_client.get(LEADER_KEY) is None
    assert first.working == second.working == 0


async def _one_leads(*candidates: Candidate) -> bool:
    return sum(bool(each.leadership.term) for each in candidates) == 1


async def test_a_leader_that_died_is_followed_when_its_lease_has_ended(redis_client: Redis) -> None:
    """Not before, and in a higher term; the metrics say who leads."""
    await redis_client.set(TERM_KEY, 41)
    await redis_client.set(LEADER_KEY, "41 dead:1:00", px=700)
    async with running(redis_client) as candidate:
        async with asyncio.timeout(WAIT_S):
            while await redis_client.get(LEADER_KEY) == b"41 dead:1:00":
                assert not candidate.leadership.term
                await asyncio.sleep(0.01)
        assert await candidate.until_it_leads() == 42
        assert candidate.metrics.registry.get_sample_value("penstock_leader") == 1
        assert candidate.metrics.registry.get_sample_value("penstock_leader_changes_total") == 1


@pytest.mark.parametrize("left", ["not a lease", "41 dead:1:00"])
async def test_a_lease_without_an_end_keeps_nobody_out(redis_client: Redis, left: str) -> None:
    """As a key is that was restored by hand, or is damaged."""
    await redis_client.set(LEADER_KEY, left)
    async with running(redis_client) as candidate:
        assert await candidate.until_it_leads() >= 1


async def test_what_an_old_leader_writes_does_not_happen(redis_client: Redis, tmp_path: Path) -> None:
    """Limits and keys stay those of the new leader, byte for byte, though the old one still takes itself for it."""
    old, new = Candidate(redis_client), Candidate(redis_client)
    assert await old.leadership._ask()
    outlived = Publisher(redis_client, tmp_path / "old", old.leadership)
    await outlived.publish(limits(await outlived.next_epoch()))
    await redis_client.delete(LEADER_KEY)  # as it ends by Redis's clock
    assert await new.leadership._ask()
    publisher = Publisher(redis_client, tmp_path / "new", new.leadership)
    await publisher.publish(limits(await publisher.next_epoch(), "newer"))
    await publisher.publish_keys([VALID])
    before = await _in_force(redis_client)
    assert old.leadership.term == 1

    for write in (outlived.publish(limits(7)), outlived.publish_keys([])):
        with pytest.raises(NotLeadingError, match="no longer '1 "):
            await write

    assert await _in_force(redis_client) == before


async def _in_force(redis: Redis) -> list[object]:
    return [await redis.get(PUBLICATION_KEY), await redis.hgetall(KEYS_KEY), await redis.get(LEADER_KEY)]


async def test_a_refused_write_ends_the_term(redis_client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """The work is laid down at once, not at the next renewal; it is said once, and then the candidate stands by."""
    async with running(redis_client) as candidate:
        await candidate.until_it_leads()
        await redis_client.set(LEADER_KEY, "9 other:1:00", px=60_000)

        with pytest.raises(NotLeadingError):
            await candidate.leadership.write(("SET", "x", "1"))
        await candidate.until_it_stands_by()

    assert await redis_client.get("x") is None
    assert await redis_client.get(LEADER_KEY) == b"9 other:1:00"
    assert caplog.text.count("leads no longer") == 1


async def test_by_its_own_clock_a_leader_stops_before_redis_says_so(redis_client: Redis) -> None:
    """One that has slept through its lease writes nothing, though nobody has taken it over in Redis."""
    candidate = Candidate(redis_client)
    await candidate.leadership._ask()
    candidate.clock.ahead_s = LEASE_S

    with pytest.raises(NotLeadingError, match="not renewed in time"):
        await candidate.leadership.write(("SET", "x", "1"))

    assert await redis_client.get("x") is None
    assert await redis_client.get(LEADER_KEY) is not None


async def test_wall_clocks_have_no_part_in_it(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader whose machine's date jumps by a year, either way, leads on in its term."""
    now = time.time
    async with running(redis_client) as candidate:
        term = await candidate.until_it_leads()
        for jump_s in (365 * 86_400.0, -365 * 86_400.0):
            monkeypatch.setattr(time, "time", lambda jump_s=jump_s: now() + jump_s)
            assert await candidate.leadership._ask()
            await candidate.leadership.write(("SET", "x", "1"))
            assert candidate.leadership.term == term


async def test_a_lease_that_was_taken_unknown_to_its_holder_is_taken_anew(redis_client: Redis) -> None:
    """An asking that timed out may have taken effect; the candidate does not wait for its own lease to end."""
    candidate = Candidate(redis_client)
    await redis_client.set(TERM_KEY, 3)
    await redis_client.set(LEADER_KEY, f"3 {candidate.leadership.holder}", px=60_000)

    await candidate.leadership._ask()

    assert candidate.leadership.term == 4


@pytest.mark.slow
async def test_a_redis_that_restarts_empty_has_a_leader_again_in_a_higher_term() -> None:
    """The term that Redis has forgotten is not given out again: who led remembers it."""
    with Server(redis_server_executable()) as server:
        async with Redis.from_url(server.url) as redis, running(redis) as candidate:
            first = await candidate.until_it_leads()
            server.kill()
            await candidate.until_it_stands_by()
            with pytest.raises((NotLeadingError, RedisError)):
                await candidate.leadership.write(("SET", "x", "1"))
            server.start()
            assert await candidate.until_it_leads(term_above=first) == first + 1
            assert candidate.terms == [first, first + 1]


async def test_what_a_failover_brings_back_is_no_leader(redis_client: Redis) -> None:
    """A replica that lags has the lease of the leader before: it ends there, and the term goes on from the newest."""
    async with running(redis_client) as candidate:
        await redis_client.set(TERM_KEY, 5)
        term = await candidate.until_it_leads()
        await redis_client.set(LEADER_KEY, "4 before:1:00", px=300)
        await redis_client.set(TERM_KEY, 4)

        assert await candidate.until_it_leads(term_above=term) == term + 1


async def test_the_disk_keeps_the_newest_of_two_leaders(redis_client: Redis, tmp_path: Path) -> None:
    """A leader that slept between Redis and the disk does not put its epoch over a newer one."""
    candidate = Candidate(redis_client)
    await candidate.leadership._ask()
    publisher = Publisher(redis_client, tmp_path, candidate.leadership)
    publisher._unsaved = limits(3)
    with published_file(tmp_path).changing() as newest:
        newest[:] = [limits(4)]

    publisher.save()

    on_disk = read_published(tmp_path)
    assert isinstance(on_disk, Publication)
    assert on_disk.epoch == 4


RECORDS = [KeyRecord(f"k_{n}", f"digest-{n}", "acme", "pro", "", created_at=1.0) for n in range(2_500)]


async def test_many_keys_change_at_once(redis_client: Redis, tmp_path: Path) -> None:
    """Whatever the hash held is gone, it does not expire, and nothing else is left; so it is with none."""
    candidate = Candidate(redis_client)
    await candidate.leadership._ask()
    publisher = Publisher(redis_client, tmp_path, candidate.leadership)
    await publisher.publish_keys([VALID])

    await publisher.publish_keys(RECORDS)
    held = await redis_client.hgetall(KEYS_KEY)
    assert set(held) == {record.digest.encode() for record in RECORDS}
    assert await redis_client.pttl(KEYS_KEY) == -1
    assert await drafts(redis_client) == []
    assert not (await publisher.lost()).keys

    await publisher.publish_keys([])
    assert await redis_client.exists(KEYS_KEY) == 0
    assert not (await publisher.lost()).keys


async def drafts(redis: Redis) -> list[bytes]:
    return [key async for key in redis.scan_iter(f"{KEYS_KEY}:next:*")]


class Dying:
    """A leader that leads no more after so many checks."""

    def __init__(self, leadership: Leadership, checks: int) -> None:
        self._leadership = leadership
        self.checks = checks

    def check(self) -> None:
        self.checks -= 1
        if not self.checks:
            raise NotLeadingError("it died")

    async def write(self, *commands: tuple[Word, ...]) -> None:
        await self._leadership.write(*commands)

    async def replace(self, hash_key: str, draft: Draft, *commands: tuple[Word, ...]) -> None:
        await self._leadership.replace(hash_key, draft, *commands)


async def test_a_publisher_that_dies_in_the_middle_of_the_keys_changes_none(
    redis_client: Redis, tmp_path: Path
) -> None:
    """Those in force stay; what it wrote expires, or goes with its next attempt, which is whole."""
    candidate = Candidate(redis_client)
    await candidate.leadership._ask()
    leader = Dying(candidate.leadership, checks=3)
    publisher = Publisher(redis_client, tmp_path, leader)
    await publisher.publish_keys([VALID])

    with pytest.raises(NotLeadingError, match="it died"):
        await publisher.publish_keys(RECORDS)
    assert await redis_client.hkeys(KEYS_KEY) == [VALID.digest.encode()]
    (draft,) = await drafts(redis_client)
    assert 0 < await redis_client.hlen(draft) < len(RECORDS)
    assert 0 < await redis_client.pttl(draft) <= DRAFT_KEPT_MS

    await publisher.publish_keys(RECORDS)
    assert await redis_client.hlen(KEYS_KEY) == len(RECORDS)
    assert await drafts(redis_client) == []


async def test_keys_that_are_not_whole_are_not_taken(redis_client: Redis) -> None:
    """As when the draft expired, or a part of it was lost; nothing else of that write happens."""
    leadership = Candidate(redis_client).leadership
    await leadership._ask()
    await redis_client.hset(KEYS_KEY, "old", "1")
    await redis_client.hset("draft", "new", "1")

    for fields in (0, 2):
        with pytest.raises(RedisError, match="not whole"):
            await leadership.replace(KEYS_KEY, Draft("draft", fields), ("SET", "x", "1"))

    assert await redis_client.hkeys(KEYS_KEY) == [b"old"]
    assert await redis_client.get("x") is None


async def test_work_that_fails_ends_the_candidate_and_gives_the_lease_back(redis_client: Redis) -> None:
    """Its process ends then, and the other need not wait."""

    async def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        await Leadership(redis_client, ControllerMetrics(), Installation("ours", Path("ours"))).run(fail)

    assert await redis_client.get(LEADER_KEY) is None


async def test_another_state_folder_does_not_lead(redis_client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Neither beside the leader nor after it: it says once what to do, and is unready, until the key is deleted."""
    async with running(redis_client, "ours") as ours:
        await ours.until_it_leads()
        assert await redis_client.get(INSTALLATION_KEY) == b"ours"
        async with running(redis_client, "other") as other:

            async def is_kept_out() -> bool:
                return "another state folder" in other.metrics.health.unready()

            await eventually_async(is_kept_out, WAIT_S, "its being kept out")
            await redis_client.delete(INSTALLATION_KEY)  # while the leader lives, this changes nothing
            await ours.leadership._ask()
            assert await redis_client.get(INSTALLATION_KEY) == b"ours"
            await ours.leadership.write(("DEL", LEADER_KEY))  # as if it had ended; it takes a term anew by and by
            assert await other.leadership._ask()
            assert other.leadership.term == 0
    assert caplog.text.count("may not lead") == 1
    assert "delete the key penstock:installation" in caplog.text

    adopting = Candidate(redis_client, "other")
    await adopting.leadership._ask()
    assert adopting.leadership.term == 0
    await redis_client.delete(INSTALLATION_KEY)
    await adopting.leadership._ask()
    assert adopting.leadership.term
    assert adopting.metrics.health.unready() == ""
    assert await redis_client.get(INSTALLATION_KEY) == b"other"


async def test_a_redis_that_was_emptied_is_left_to_its_own_installation(redis_client: Redis) -> None:
    """Whoever was kept out before does not take it, though it asks first; the one it belonged to takes it again."""
    ours, other = Candidate(redis_client, "ours"), Candidate(redis_client, "other")
    await ours.leadership._ask()
    await other.leadership._ask()
    await redis_client.flushall()

    await other.leadership._ask()
    assert other.leadership.term == 0
    assert await redis_client.get(INSTALLATION_KEY) is None
    await ours.leadership._ask()  # loses its term
    await ours.leadership._ask()

    assert ours.leadership.term
    assert await redis_client.get(INSTALLATION_KEY) == b"ours"


async def test_a_redis_from_before_installations_takes_the_id_of_who_leads(redis_client: Redis) -> None:
    """An upgrade: there is a lease, a term and keys, and no id."""
    await redis_client.set(TERM_KEY, 41)
    await redis_client.hset(KEYS_KEY, "digest", "{}")
    candidate = Candidate(redis_client)

    await candidate.leadership._ask()

    assert candidate.leadership.term == 42
    assert await redis_client.get(INSTALLATION_KEY) == b"ours"


def test_a_state_folder_keeps_its_id(tmp_path: Path) -> None:
    """Whoever asks, and wherever a backup of it is restored to; another folder has another."""
    first = installation_of(tmp_path / "state")

    assert installation_of(tmp_path / "state") == first
    shutil.copytree(tmp_path / "state", tmp_path / "restored")
    assert installation_of(tmp_path / "restored").id == first.id
    assert installation_of(tmp_path / "other").id != first.id
