"""The controller's rounds against a real Redis, with a fleet of our making and knees that take as long as we want."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from ratelimit import controller as controller_module
from ratelimit import livefeedback, supply
from ratelimit.config import Config
from ratelimit.controller import Controller, OnChange
from ratelimit.keys import KeyFile
from ratelimit.publication import Publication
from ratelimit.publisher import KEYS_KEY, PUBLICATION_KEY, Publisher
from serving import operating
from serving.capacity import EngineLimits, Slo, StepTimeModel, WorkloadMix
from serving.fleet import Fleet, ReplicaSpec, ReplicaStatus
from serving.health import ReplicaHealth, ReplicaPhase
from serving.profile import Profile, ProfileError, dump_profile, load_profile
from serving.signals import Counters, Histogram
from serving.stepsim import Knee
from tests.support.leading import SoleLeader
from tests.support.waiting import eventually_async

A, B = "http://127.0.0.1:8100", "http://127.0.0.1:8101"
WAIT_S = 20.0


class FakeFleet(Fleet):
    """Replicas that are as the test says; those it says nothing of have been healthy for ever."""

    def __init__(self, on_change: OnChange) -> None:
        self.wake = on_change
        self.specs: tuple[ReplicaSpec, ...] = ()
        self.phases: dict[str, ReplicaPhase] = {}
        self.version = 0
        self.reading: Callable[[], Counters | None] = lambda: None

    def watch(self, specs: Iterable[ReplicaSpec]) -> None:
        self.specs = tuple(specs)
        self.version += 1

    async def probed_once(self) -> None:
        return

    def statuses(self) -> Mapping[str, ReplicaStatus]:
        return {s.url: ReplicaStatus(s, ReplicaHealth(self.phases.get(s.url, "healthy"))) for s in self.specs}

    def counters(self) -> Mapping[str, Counters]:
        reading = self.reading()
        return {spec.url: reading for spec in self.specs} if reading else {}

    def turn(self, url: str, phase: ReplicaPhase) -> None:
        self.phases[url] = phase
        self.version += 1
        self.wake(self.statuses()[url])


class Knees:
    """Knees that are found when the gate is open: twice as many requests/s for twice the TTFT."""

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), threading.Event()
        self.gate.set()
        self.found = 0

    def __call__(self, step_time: StepTimeModel, _limits: EngineLimits, _mix: WorkloadMix, slo: Slo) -> Knee:
        self.asked.set()
        if not self.gate.wait(WAIT_S):
            raise AssertionError("the test never opened the gate")
        self.found += 1
        return Knee(slo.ttft_s * 0.03 / step_time.base_s, 0.5, slo.ttft_s / 2, slo.tpot_s, "tpot")


@pytest.fixture
def knees(monkeypatch: pytest.MonkeyPatch) -> Iterator[Knees]:
    """Knees without simulation; the gate is open in the end, so that no thread is left behind."""
    made = Knees()
    monkeypatch.setattr(operating, "knee", made)
    monkeypatch.setattr(controller_module, "ROUND_INTERVAL_S", 0.02)
    yield made
    made.gate.set()


class Running:
    """A controller at work, its fleet, and what Redis holds."""

    def __init__(self, config: Config, redis: Redis, found: supply.Knees | None = None) -> None:
        fleets: list[FakeFleet] = []

        def fleet(on_change: OnChange) -> Fleet:
            fleets.append(FakeFleet(on_change))
            return fleets[0]

        self.redis = redis
        publisher = Publisher(redis, config.state_dir, SoleLeader(redis))
        self.controller = Controller(config, fleet, publisher, knees=found)
        self.fleet = fleets[0]

    async def publication(self) -> Publication | None:
        document = await self.redis.get(PUBLICATION_KEY)
        return None if document is None else msgspec.json.decode(document, type=Publication)

    async def until(self, what: Callable[[Publication], object]) -> Publication:
        async with asyncio.timeout(WAIT_S):
            while True:
                published = await self.publication()
                if published is not None and what(published):
                    return published
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(config: Config, redis: Redis, found: supply.Knees | None = None) -> AsyncIterator[Running]:
    made = Running(config, redis, found)
    task = asyncio.create_task(made.controller.run())
    try:
        yield made
        assert not task.done(), "the controller ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def config_of(
    state_dir: Path,
    *,
    count: int = 2,
    ttft_ms: float = 1000,
    profile: str = "h100-llama-3.1-8b",
    stuck_after_s: float = 5.0,
) -> Config:
    engines = [{"device": "virtual", "profile": profile, "port": 8100, "count": count}]
    pool = {"model": "m", "slo": {"ttft_ms": ttft_ms}, "engines": engines, "stuck_after_s": stuck_after_s}
    tiers, orgs = [{"name": "pro", "share": 0.5}], [{"name": "acme"}]
    document = {"state_dir": str(state_dir), "pools": [pool], "tiers": tiers, "orgs": orgs}
    return Config.model_validate(document, context={"folder": state_dir})


def urls(published: Publication) -> set[str]:
    return {replica.url for pool in published.pools for replica in pool.replicas}


def rates(published: Publication) -> list[float]:
    return [replica.requests_per_s for pool in published.pools for replica in pool.replicas]


async def test_a_loss_is_published_while_a_knee_is_being_found(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """Limits fall at once although the promise has changed and the knees under the new one are not known yet."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {A, B})
        knees.gate.clear()
        knees.asked.clear()
        stack.controller.adopt(config_of(tmp_path, ttft_ms=2000))
        await asyncio.to_thread(knees.asked.wait, WAIT_S)

        stack.fleet.turn(B, "down")
        fallen = await stack.until(lambda seen: urls(seen) == {A})
        assert rates(fallen) == rates(before)[:1], "the old promise holds until the new one is known"

        knees.gate.set()
        await stack.until(lambda seen: rates(seen) == [rates(before)[0] * 2])


async def test_rounds_leave_as_much_time_as_they_take(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storm of changes must not keep the probes of a large fleet from their turn."""
    monkeypatch.setattr(controller_module, "ROUND_INTERVAL_S", 0.5)
    times: list[tuple[float, float]] = []
    enough = asyncio.Event()

    async def slow(self: Controller) -> None:
        began_s = monotonic()
        await asyncio.sleep(0.03)
        self._wake.set()  # as every change would
        times.append((began_s, monotonic()))
        if len(times) == 4:
            enough.set()

    monkeypatch.setattr(Controller, "round", slow)
    async with running(config_of(tmp_path), redis_client):
        await asyncio.wait_for(enough.wait(), WAIT_S)
    assert all(
        next_s - ended_s >= 0.9 * (ended_s - began_s) for (began_s, ended_s), (next_s, _) in itertools.pairwise(times)
    )


async def test_a_term_begins_with_the_knees_of_those_before_it(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """A leader that leads again, or stood by, lets limits fall at once: it waits for no knee that was ever found."""
    found = supply.Knees()
    async with running(config_of(tmp_path), redis_client, found) as first:
        await first.until(lambda seen: urls(seen) == {A, B})
    knees.gate.clear()
    async with running(config_of(tmp_path), redis_client, found) as second:
        second.fleet.turn(B, "down")
        await second.until(lambda seen: urls(seen) == {A})


async def test_a_restarted_controller_keeps_the_promise_of_the_one_before(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits do not collapse for the seconds that a new controller needs to find the knees of a healthy fleet."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {A, B})
    knees.gate.clear()
    knees.found = 0
    async with running(config_of(tmp_path), redis_client) as stack:
        rounds, enough = itertools.count(), asyncio.Event()
        a_round = stack.controller.round

        async def counting() -> None:
            if next(rounds) >= 10:
                enough.set()
            await a_round()

        monkeypatch.setattr(stack.controller, "round", counting)
        async with asyncio.timeout(WAIT_S):
            await enough.wait()
        assert await stack.publication() == before

        knees.gate.set()

        assert urls(await stack.until(lambda seen: seen.epoch > before.epoch)) == {A, B}
        assert knees.found == 1, "replicas of one profile share a knee"


async def test_a_removal_is_known_to_be_published(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """Who stops the engines of a changed config can wait until the limits in force do not count them."""
    async with running(config_of(tmp_path), redis_client) as stack:
        await stack.until(lambda seen: urls(seen) == {A, B})
        assert not await stack.controller.published_without([B], timeout_s=0.05)

        stack.controller.adopt(config_of(tmp_path, count=1))

        assert await stack.controller.published_without([B], WAIT_S)
        published = await stack.publication()
        assert published is not None
        assert urls(published) == {A}
    assert knees.found == 1


async def test_a_failover_to_an_older_redis_is_mended_under_a_new_epoch(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """Older limits are replaced, and a revoked key does not come back."""
    keys = KeyFile(tmp_path)
    _, key = keys.create(org="acme", tier="pro", name="one")
    keys.create(org="acme", tier="pro", name="two")
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {A, B})
        old_keys = await redis_client.hgetall(KEYS_KEY)
        keys.revoke(key.id)
        newest = await stack.until(lambda seen: "keys" in seen.reason)

        async with redis_client.pipeline(transaction=True) as pipe:
            pipe.flushall()
            pipe.set(PUBLICATION_KEY, msgspec.json.encode(before))
            pipe.hset(KEYS_KEY, mapping=dict(old_keys.items()))
            await pipe.execute()

        await stack.until(lambda seen: seen.epoch > newest.epoch)
        assert (await redis_client.hgetall(KEYS_KEY)) != old_keys
    assert knees.found == 1


async def test_a_profile_overwritten_counts_from_the_next_config_on(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """A config is taken up with its profiles as they are then; one that cannot be read leaves everything as it was."""
    path = tmp_path / "ours.json"
    profile = load_profile("h100-llama-3.1-8b")
    path.write_bytes(dump_profile(profile))
    async with running(config_of(tmp_path, profile=str(path)), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {A, B})
        path.write_bytes(dump_profile(twice_as_slow(profile)))
        stack.controller.adopt(config_of(tmp_path, profile=str(path)))
        after = await stack.until(lambda seen: rates(seen) == [rate / 2 for rate in rates(before)])

        path.unlink()
        with pytest.raises(ProfileError):
            stack.controller.adopt(config_of(tmp_path, profile=str(path), count=1))
        stack.fleet.turn(B, "down")
        fallen = await stack.until(lambda seen: urls(seen) == {A})
        assert rates(fallen) == rates(after)[:1]
    assert knees.found == 2


async def test_a_value_that_cannot_be_used_does_not_end_the_controller(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A round that fails is logged once, the last limits stay, and rounds go on."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {A, B})
        with monkeypatch.context() as broken:
            tries = threading.Semaphore(0)

            def fails(*_args: object, **_named: object) -> Publication:
                tries.release()
                raise ProfileError("no such profile")

            broken.setattr(controller_module, "derive", fails)
            stack.fleet.turn(B, "down")
            for _ in range(3):
                assert await asyncio.to_thread(tries.acquire, timeout=WAIT_S)
            assert await stack.publication() == before

        await stack.until(lambda seen: urls(seen) == {A})
    assert caplog.text.count("no such profile") == 1
    assert knees.found == 1


async def test_knees_are_no_longer_sought_when_the_controller_has_ended(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """A controller that is cancelled while a knee is found leaves no task behind."""
    knees.gate.clear()
    async with running(config_of(tmp_path), redis_client):
        await asyncio.to_thread(knees.asked.wait, WAIT_S)
    knees.gate.set()

    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not names & {"find knees", "controller rounds"}


class Queueing:
    """Readings of a replica whose queue grows though little is asked of it: each is 15 s after the one before."""

    def __init__(self) -> None:
        self.windows = 0

    def __call__(self) -> Counters:
        self.windows += 1
        n = float(self.windows)
        started = Histogram((1.0, float("inf")), (20 * n, 20 * n))
        return Counters(15 * n, finished=20 * n, prompt_tokens=1.0, waiting=20 * n, ttft=started)


async def test_what_a_fleet_is_seen_to_do_less_trims_its_limits_and_says_so(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that grows under little load cuts the published supply; lost signals, and a restart, leave it so."""
    monkeypatch.setattr(livefeedback, "WINDOW_S", 0.0)
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await stack.until(lambda seen: urls(seen) == {A, B})
        stack.fleet.reading = Queueing()
        cut = await stack.until(lambda seen: seen.pools[0].budget_per_minute < before.pools[0].budget_per_minute)
        assert "the supply of m is trimmed to" in cut.reason
        assert "what waits needs" in cut.pools[0].explanation
        await stack.until(lambda seen: "0.5 trim" in seen.pools[0].explanation)
        stack.fleet.reading = lambda: None

    async with running(config_of(tmp_path), redis_client) as stack:
        again = await stack.until(lambda seen: seen.reason == "the controller started" and seen.epoch > cut.epoch)
        assert "0.5 trim" in again.pools[0].explanation


async def test_the_epoch_that_metrics_show_is_the_one_in_force(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that changes no limit publishes nothing: the epoch that was drawn for it is in force nowhere."""
    async with running(config_of(tmp_path), redis_client) as stack:
        in_force = await stack.until(lambda seen: urls(seen) == {A, B})
        metrics, shown = stack.controller.metrics, asyncio.Event()
        show = metrics.published

        async def is_shown() -> bool:
            return metrics.registry.get_sample_value("penstock_epoch") == in_force.epoch

        await eventually_async(is_shown, WAIT_S, "the first epoch in the metrics")

        def spied(*args: Any) -> None:
            show(*args)
            shown.set()

        monkeypatch.setattr(metrics, "published", spied)
        stack.controller.adopt(config_of(tmp_path, stuck_after_s=77.0))
        async with asyncio.timeout(WAIT_S):
            await shown.wait()

        assert await stack.publication() == in_force
        assert await is_shown()


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        '{"schema_version": 1, "records": [{"model": "m", "feedback": {"factor": 0.3, "reason": "slow"}}]}',
        '{"schema_version": 1, "records": [{"model": "m", "feedback": {"factor": 0.9, "seen": [{}]}}]}',
    ],
)
async def test_trims_that_cannot_be_read_do_not_stop_the_limits(
    redis_client: Redis, tmp_path: Path, knees: Knees, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    """A damaged file, or one with figures that cannot be, is said, and supplies begin untrimmed."""
    (tmp_path / "feedback.json").write_text(damaged)

    async with running(config_of(tmp_path), redis_client) as stack:
        await stack.until(lambda seen: urls(seen) == {A, B})

    assert f"supplies begin untrimmed: {tmp_path}/feedback.json is damaged" in caplog.text
    assert "limits cannot be published" not in caplog.text


def twice_as_slow(profile: Profile) -> Profile:
    return msgspec.structs.replace(profile, step_time=profile.step_time.slowed(2))
