"""What people decide waits for approval where it lowers limits too far; what the fleet does never waits."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import time

import msgspec
import pytest
from redis.asyncio import Redis

from ratelimit import audit, statefile
from ratelimit import controller as controller_module
from ratelimit.approval import Approval, Waiting
from ratelimit.audit import AuditLog
from ratelimit.config import Config
from ratelimit.difference import difference, snapshot
from ratelimit.epochlog import Intent
from ratelimit.governor import ApprovalFile, Governor, waiting_file
from ratelimit.keys import KeyFile, new_key
from ratelimit.overrides import OverrideFile, freezing, setting
from ratelimit.publication import Publication
from ratelimit.publisher import PUBLICATION_KEY, Publisher, published_file
from ratelimit.statefile import StateFile
from tests.integration.test_controller import A, B, Knees, Running, knees, running, urls
from tests.support.waiting import eventually_async

__all__ = ["knees"]  # a fixture that these tests ask for

WAIT_S = 20.0


def config_of(
    state_dir: Path, share: float = 0.4, falls_above: float | None = 0.5, count: int = 2, ttft_ms: float = 1000
) -> Config:
    engines = [{"device": "virtual", "profile": "h100-llama-3.1-8b", "port": 8100, "count": count}]
    return Config.model_validate(
        {
            "state_dir": str(state_dir),
            "pools": [{"model": "m", "slo": {"ttft_ms": ttft_ms}, "raise_after_s": 0, "engines": engines}],
            "tiers": [{"name": "pro", "share": share, "ceiling": 0.9}, {"name": "free", "share": 0.1, "ceiling": 0.1}],
            "orgs": [{"name": "acme"}],
            "approval": {"falls_above": falls_above},
        },
        context={"folder": state_dir},
    )


def assured(published: Publication, tier: str = "pro") -> int:
    """Output tokens a minute that one key is assured."""
    return next(x.per_minute for x in published.limits(tier, "m") if x.name == "output_tokens" and x.per == "key")


async def one_waits(state_dir: Path, what: Callable[[Waiting], object] = bool) -> Waiting:
    found: list[Waiting] = []

    async def there() -> bool:
        found[:] = waiting_file(state_dir).read()
        return len(found) == 1 and bool(what(found[0]))

    await eventually_async(there, WAIT_S, "a change that waits")
    return found[0]


async def none_waits(state_dir: Path) -> None:
    async def gone() -> bool:
        return waiting_file(state_dir).read() == []

    await eventually_async(gone, WAIT_S, "that nothing waits")


async def kept_epochs(state_dir: Path, epochs: list[int]) -> None:
    async def there() -> bool:
        return [entry.epoch for entry in AuditLog(state_dir).entries()] == epochs[::-1]

    await eventually_async(there, WAIT_S, "the epochs in the audit log")


def approve(state_dir: Path, digest: str) -> None:
    ApprovalFile(state_dir).approve(digest, "ada", time(), 60)


async def first(stack: Running) -> Publication:
    return await stack.until(lambda p: urls(p) == {A, B})


async def test_a_large_fall_waits_until_it_is_approved(
    redis_client: Redis, tmp_path: Path, knees: Knees, caplog: pytest.LogCaptureFixture
) -> None:
    """The limits in force stay, the log says once what waits and how to let it through, and the approval does that."""
    caplog.set_level(logging.WARNING)
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.1))
        waiting = await one_waits(tmp_path)
        assert await stack.publication() == before

        async def counted() -> bool:
            return stack.controller.metrics.registry.get_sample_value("penstock_changes_waiting") == 1

        await eventually_async(counted, WAIT_S, "a count of what waits")
        approve(tmp_path, waiting.digest)
        after = await stack.until(lambda p: assured(p) < assured(before) / 2)
        await none_waits(tmp_path)

        async def kept() -> bool:
            entry = AuditLog(tmp_path).newest()
            return entry is not None and (entry.epoch, [a.by for a in entry.approved]) == (after.epoch, ["ada"])

        async def used_up() -> bool:
            return ApprovalFile(tmp_path).valid(time()) == ()

        await eventually_async(kept, WAIT_S, "the epoch in the audit log, with who approved it")
        await eventually_async(used_up, WAIT_S, "the end of the approval")

    said = [r.getMessage() for r in caplog.records if "WAITING FOR APPROVAL" in r.getMessage()]
    assert len(said) == 1
    assert f"penstock limits approve {waiting.digest}" in said[0]


async def test_a_lost_replica_is_no_decision(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """With approval for the least fall, the limits fall at once when capacity is lost."""
    async with running(config_of(tmp_path, falls_above=0.0), redis_client) as stack:
        await first(stack)
        stack.fleet.turn(A, "down")
        await stack.until(lambda p: urls(p) == {B})

    assert waiting_file(tmp_path).read() == []


async def test_a_loss_takes_effect_while_a_change_waits(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """Of both at once the loss is published under what was decided before, also where the change is seen first."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.1))
        stack.fleet.turn(A, "down")
        after = await stack.until(lambda p: urls(p) == {B})
        waiting = await one_waits(tmp_path)
        assert assured(after) == pytest.approx(assured(before) / 2, rel=0.1)

        stack.fleet.turn(A, "healthy")
        await stack.until(lambda p: urls(p) == {A, B} and assured(p) == assured(before))
        assert (await one_waits(tmp_path)).digest == waiting.digest


async def test_a_small_fall_does_not_wait(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """Only what falls further than allowed waits."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.3))
        after = await stack.until(lambda p: assured(p) < assured(before))
        assert assured(before) * 0.7 < assured(after)
        assert waiting_file(tmp_path).read() == []


async def test_nothing_waits_where_nothing_says_so(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """Without approval.falls_above every change takes effect at once."""
    async with running(config_of(tmp_path, falls_above=None), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.01, falls_above=None))
        await stack.until(lambda p: assured(p) < assured(before) / 10)
        assert waiting_file(tmp_path).read() == []


async def test_a_change_cannot_allow_itself(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """A config that takes the bound away waits under the bound that is in force."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.1, falls_above=None))
        await one_waits(tmp_path)
        assert await stack.publication() == before


async def test_a_bound_cannot_be_taken_away_before_the_cut(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """Two edits, first the bound and then the share, wait as one edit does."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, falls_above=None))
        loosened = await one_waits(tmp_path)
        assert loosened.does.largest_fall == 1
        stack.controller.adopt(config_of(tmp_path, share=0.1, falls_above=None))
        await one_waits(tmp_path, lambda found: found.digest != loosened.digest)
        assert await stack.publication() == before


async def test_an_approval_is_for_one_change_alone(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """A change that was made to the config after the approval waits anew."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.1))
        waiting = await one_waits(tmp_path)
        stack.controller.adopt(config_of(tmp_path, share=0.01))
        other = await one_waits(tmp_path, lambda found: found.digest != waiting.digest)
        with pytest.raises(ValueError, match="has changed since"):
            approve(tmp_path, waiting.digest)
        assert await stack.publication() == before

        approve(tmp_path, other.digest)
        await stack.until(lambda p: assured(p) < assured(before) / 10)


async def test_an_approved_change_that_has_grown_waits_again(
    redis_client: Redis, tmp_path: Path, knees: Knees, caplog: pytest.LogCaptureFixture
) -> None:
    """What was approved at a small fall does not take effect at a large one; it is said why, and can be approved so."""
    async with running(config_of(tmp_path, count=3), redis_client) as stack:
        before = await stack.until(lambda p: len(urls(p)) == 3)
        stack.controller.adopt(config_of(tmp_path, count=1))
        waiting = await one_waits(tmp_path)
        with ApprovalFile(tmp_path)._file.changing() as approvals:
            approvals[:] = [Approval(waiting.digest, "ada", time(), time() + 60, fall=0.2)]
        again = await one_waits(tmp_path, lambda found: found.approved_fall == 0.2)
        assert again.digest == waiting.digest
        assert urls(await stack.until(bool)) == urls(before)

        approve(tmp_path, again.digest)
        await stack.until(lambda p: urls(p) == {A})
    said = [r.getMessage() for r in caplog.records if "approved for a fall of 20 %" in r.getMessage()]
    assert len(said) == 1


async def test_a_change_that_is_taken_back_no_longer_waits(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """The way back needs nobody's approval."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.1))
        await one_waits(tmp_path)
        stack.controller.adopt(config_of(tmp_path))
        await none_waits(tmp_path)
        assert await stack.publication() == before


async def test_replicas_that_a_config_leaves_out_serve_until_it_is_approved(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """They are watched and count, and whoever would stop them is not told that they are out of use."""
    async with running(config_of(tmp_path, falls_above=0.3), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, falls_above=0.3, count=1))
        waiting = await one_waits(tmp_path)
        leaving = asyncio.create_task(stack.controller.published_without([B], 0.05))
        stack.fleet.turn(A, "down")
        await stack.until(lambda p: urls(p) == {B})
        stack.fleet.turn(A, "healthy")
        await stack.until(lambda p: urls(p) == {A, B})
        assert not leaving.done()

        approve(tmp_path, waiting.digest)
        await stack.until(lambda p: urls(p) == {A} and p.epoch > before.epoch)
        assert await asyncio.wait_for(leaving, WAIT_S)

        async def only_the_other() -> bool:
            return [spec.url for spec in stack.fleet.specs] == [A]

        await eventually_async(only_the_other, WAIT_S, "that the one left out is no longer watched")


async def test_an_override_does_not_wait_for_a_config(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """While a config waits an operator can still act; and an override that lowers too far waits by itself."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, share=0.1))
        waiting = await one_waits(tmp_path)
        OverrideFile(tmp_path).add(setting("free", "output_tokens", 10**9, time() + 600, "trial"), time())
        await stack.until(lambda p: assured(p, "free") == 10**9 and assured(p) == assured(before))
        OverrideFile(tmp_path).add(setting("free", "output_tokens", 1, time() + 600, "abuse"), time())

        async def both() -> bool:
            return len(waiting_file(tmp_path).read()) == 2

        await eventually_async(both, WAIT_S, "two changes that wait")
        override = next(each for each in waiting_file(tmp_path).read() if each.digest != waiting.digest)
        assert "abuse" in override.cause
        approve(tmp_path, override.digest)
        await stack.until(lambda p: assured(p, "free") == 1 and assured(p) == assured(before))


async def test_an_override_ends_at_its_time(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """Its end was decided with it, so that the fall at its end waits for nobody."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        OverrideFile(tmp_path).add(setting("free", "output_tokens", 10**9, time() + 1, "trial"), time())
        await stack.until(lambda p: assured(p, "free") == 10**9)
        after = await stack.until(lambda p: assured(p, "free") == assured(before, "free"))
        assert after.limits("free", "m") == before.limits("free", "m")
        assert waiting_file(tmp_path).read() == []


@pytest.mark.parametrize("how", ["freeze", "set"])
async def test_an_override_hides_no_fall_until_its_end(
    redis_client: Redis, tmp_path: Path, knees: Knees, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that cuts limits which are overridden for now waits; the end of the override lets nothing through."""
    later_s = 0.0
    monkeypatch.setattr(controller_module, "time", lambda: time() + later_s)
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        limits, until = before.limits("pro", "m"), time() + 600
        most = {x.name: x.ceiling_per_minute or x.per_minute or x.burst for x in limits if x.per == "key"}
        for override in {
            "freeze": [freezing(before, "pro", until, "trial")],
            "set": [setting("pro", name, value, until, "trial") for name, value in most.items()],
        }[how]:
            OverrideFile(tmp_path).add(override, time())
        await stack.until(lambda p: all("trial" in x.explanation for x in p.limits("pro", "m")))
        stack.controller.adopt(config_of(tmp_path, share=0.04))
        waiting = await one_waits(tmp_path)
        assert waiting.does.largest_fall == pytest.approx(0.9, abs=0.05)

        later_s = 3600.0
        await stack.until(lambda p: not any("trial" in x.explanation for x in p.limits("pro", "m")))
        assert (await one_waits(tmp_path)).digest == waiting.digest
        published = await stack.publication()
        assert published is not None
        assert published.limits("pro", "m") == limits


async def test_while_a_count_of_keys_waits_its_tier_is_assured_no_more_than_before(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """Each key keeps its limit, and all together have what the tier had, so that nobody else pays for it."""
    KeyFile(tmp_path).create(org="acme", tier="free", name="the first")
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        for i in range(4):
            KeyFile(tmp_path).create(org="acme", tier="free", name=f"k{i}")
        held = await stack.until(lambda p: len(p.limits("free", "m")) > len(before.limits("free", "m")))
        waiting = await one_waits(tmp_path)
        assert waiting.cause == "keys issued to free from 1 to 5"
        assert assured(held, "free") == assured(before, "free")
        (together,) = (x for x in held.limits("free", "m") if (x.name, x.per) == ("output_tokens", "tier"))
        assert together.per_minute == assured(before, "free")
        assert assured(held) == assured(before)

        approve(tmp_path, waiting.digest)
        await stack.until(lambda p: assured(p, "free") < assured(before, "free") / 4)


async def test_the_first_keys_of_a_tier_take_nothing_from_anybody(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """A tier that had no key has nobody whose limit could fall."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        with KeyFile(tmp_path)._file.changing() as records:
            records += [new_key("acme", "free", f"k{i}", time(), None)[1] for i in range(5)]
        after = await stack.until(lambda p: assured(p, "free") < assured(before, "free") / 4)
        assert assured(after) == assured(before)
        assert waiting_file(tmp_path).read() == []


async def test_a_restart_is_no_approval(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """A config that was changed while no controller ran waits as it would have, and keeps waiting over restarts."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
    digests = set()
    for _ in range(2):
        async with running(config_of(tmp_path, share=0.1), redis_client) as stack:
            after = await stack.until(lambda p: p.epoch > before.epoch)
            waiting = await one_waits(tmp_path)
            digests.add(waiting.digest)
            assert assured(after) == assured(before)
    assert digests == {waiting.digest}
    approve(tmp_path, waiting.digest)
    async with running(config_of(tmp_path, share=0.1), redis_client) as stack:
        await stack.until(lambda p: assured(p) < assured(before) / 2)


async def test_a_count_of_keys_rewrites_no_config_and_no_write_stops_the_loop(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config is kept once, whatever keys come; locks and disks are waited for outside the event loop."""
    blocking: list[Path] = []
    take = statefile.take_lock

    def noting(descriptor: int, path: Path, timeout_s: float) -> None:
        if asyncio._get_running_loop() is not None:
            blocking.append(path)
        take(descriptor, path, timeout_s)

    async with running(config_of(tmp_path), redis_client) as stack:
        await first(stack)
        monkeypatch.setattr(statefile, "take_lock", noting)
        monkeypatch.setattr(audit, "take_lock", noting)
        config, keys = (tmp_path / "decided.json").stat(), (tmp_path / "decided_keys.json").stat()
        await asyncio.to_thread(KeyFile(tmp_path).create, org="acme", tier="free", name="a")

        async def rewritten() -> bool:
            return (tmp_path / "decided_keys.json").stat().st_ino != keys.st_ino

        await eventually_async(rewritten, WAIT_S, "the new count of keys on disk")
        stack.fleet.turn(A, "down")
        await stack.until(lambda p: urls(p) == {B})
        assert (tmp_path / "decided.json").stat().st_ino == config.st_ino
    assert {path.name for path in blocking} <= {"feedback.lock"}  # what feedback learns is another's


async def test_what_was_decided_and_cannot_be_read_approves_nothing(
    redis_client: Redis, tmp_path: Path, knees: Knees, caplog: pytest.LogCaptureFixture
) -> None:
    """The limits in force stay, the log says what to do, and once the file is mended the change waits after all."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
    decided = tmp_path / "decided.json"
    text = decided.read_bytes()
    decided.write_bytes(text[:-40])
    async with running(config_of(tmp_path, share=0.1), redis_client) as stack:

        async def failed() -> bool:
            failures = stack.controller.metrics.registry.get_sample_value("penstock_failed_rounds_total")
            return failures is not None and failures >= 3

        await eventually_async(failed, WAIT_S, "rounds that fail")
        assert await stack.publication() == before
        assert decided.read_bytes() == text[:-40]
        decided.write_bytes(text)
        await one_waits(tmp_path)
        after = await stack.until(lambda p: p.epoch > before.epoch)
        assert assured(after) == assured(before)
    said = [r.getMessage() for r in caplog.records if "decided.json is damaged" in r.getMessage()]
    assert len(said) == 1


async def test_a_change_is_not_weighed_before_its_knees_are_known(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """A promise that gives less waits, though for seconds nobody can say how much less."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        knees.gate.clear()
        stack.controller.adopt(config_of(tmp_path, ttft_ms=100))
        stack.fleet.turn(A, "down")
        await stack.until(lambda p: urls(p) == {B})
        assert waiting_file(tmp_path).read() == []
        knees.gate.set()
        await one_waits(tmp_path)
        stack.fleet.turn(A, "healthy")
        await stack.until(lambda p: urls(p) == {A, B} and assured(p) == assured(before))


async def test_every_epoch_is_in_the_audit_log(redis_client: Redis, tmp_path: Path, knees: Knees) -> None:
    """Each with its cause and what it did, from the epoch before to itself; also those of a controller before."""
    published = []
    async with running(config_of(tmp_path, falls_above=None), redis_client) as stack:
        published.append(await first(stack))
        stack.fleet.turn(A, "down")
        published.append(await stack.until(lambda p: urls(p) == {B}))
        stack.controller.adopt(config_of(tmp_path, share=0.2, falls_above=None))
        published.append(await stack.until(lambda p: p.epoch > published[-1].epoch))
    async with running(config_of(tmp_path, share=0.2, falls_above=None), redis_client) as stack:
        published.append(await stack.until(lambda p: p.epoch > published[-1].epoch))
        await kept_epochs(tmp_path, [each.epoch for each in published])

    entries = list(reversed(list(AuditLog(tmp_path).entries())))
    assert [entry.published for entry in entries] == [snapshot(each) for each in published]
    assert [entry.cause for entry in entries][:3] == ["the controller started", f"{A} left", "the config changed"]
    for before, entry in pairwise(entries):
        assert entry.before == before.epoch
        assert entry.does == difference(before.published, entry.published)


async def test_an_epoch_whose_controller_died_before_it_was_kept_is_kept_by_the_next(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """The publication on disk says that it was in force."""
    async with running(config_of(tmp_path), redis_client) as stack:
        one = await first(stack)
        stack.fleet.turn(A, "down")
        two = await stack.until(lambda p: urls(p) == {B})
        await kept_epochs(tmp_path, [one.epoch, two.epoch])
    for path in (tmp_path / "audit").glob("*.jsonl"):
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    async with running(config_of(tmp_path), redis_client) as stack:
        three = await stack.until(lambda p: p.epoch > two.epoch)
        await kept_epochs(tmp_path, [one.epoch, two.epoch, three.epoch])
    kept = list(AuditLog(tmp_path).entries())
    assert [entry.published for entry in kept] == [snapshot(each) for each in (three, two, one)]


def copying(method: str, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the state folder as it is when the governor's method is called with an approval in use, as if all died."""
    original = getattr(Governor, method)

    def called(self: Governor, *args: object) -> object:
        intents = StateFile(self._state_dir / "intents.json", Intent).read()
        if any(intent.entry.approved for intent in intents) and not to.exists():
            shutil.copytree(self._state_dir, to)
        return original(self, *args)

    monkeypatch.setattr(Governor, method, called)


async def approved_cut(redis: Redis, state_dir: Path) -> tuple[Publication, Publication]:
    """A controller that cuts a share, approved by ada, and ends; the epochs before and after."""
    async with running(config_of(state_dir), redis) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(state_dir, share=0.1))
        approve(state_dir, (await one_waits(state_dir)).digest)
        after = await stack.until(lambda p: assured(p) < assured(before) / 2)
        await kept_epochs(state_dir, [before.epoch, after.epoch])
        return before, after


@pytest.mark.parametrize("redis_too", [False, True])
async def test_who_approved_is_kept_though_the_controller_died_at_once(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch, redis_too: bool
) -> None:
    """The next controller knows who let through what it goes on with; where Redis died too, it says that it is unsure.

    The approval is used, and no second change like it gets through.
    """
    state, dead = tmp_path / "state", tmp_path / "dead"
    copying("in_force", dead, monkeypatch)
    before, cut = await approved_cut(redis_client, state)
    if redis_too:
        await redis_client.flushall()
        with published_file(dead).changing() as newest:
            newest[:] = [before]
    async with running(config_of(dead, share=0.1), redis_client) as stack:
        await stack.until(lambda p: p.reason == "the controller started" and assured(p) == assured(cut))

        async def kept() -> bool:
            unfinished = StateFile(dead / "intents.json", Intent).read()
            return len(list(AuditLog(dead).entries())) == 3 and not unfinished

        await eventually_async(kept, WAIT_S, "the epochs in the audit log")
    entry = next(entry for entry in AuditLog(dead).entries() if entry.approved)
    assert (entry.epoch, entry.unsure, [a.by for a in entry.approved]) == (cut.epoch, redis_too, ["ada"])
    assert ApprovalFile(dead).valid(time()) == ()


async def test_an_epoch_that_redis_took_before_an_error_is_kept(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in force until the next one, and the log has both."""
    publish = Publisher.publish
    cut_off: list[Publication] = []

    async def cut(self: Publisher, publication: Publication) -> None:
        if publication.epoch == 2 and not cut_off:
            cut_off.append(publication)
            self._note_epoch(publication.epoch)
            await redis_client.set(PUBLICATION_KEY, msgspec.json.encode(publication))
            raise ConnectionError("cut off")
        await publish(self, publication)

    monkeypatch.setattr(Publisher, "publish", cut)
    async with running(config_of(tmp_path), redis_client) as stack:
        await first(stack)
        stack.fleet.turn(A, "down")
        await stack.until(lambda p: p.epoch == 3)
        await kept_epochs(tmp_path, [1, 2, 3])
    assert [entry.unsure for entry in AuditLog(tmp_path).entries()] == [False] * 3


async def test_epochs_that_the_log_could_not_take_outlive_their_controller(
    redis_client: Redis, tmp_path: Path, knees: Knees, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are in the log when it can be written again, by whatever controller runs then."""

    def failing(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(audit, "_write_at", failing)
        async with running(config_of(tmp_path), redis_client) as stack:
            await first(stack)
            stack.fleet.turn(A, "down")
            two = await stack.until(lambda p: urls(p) == {B})
    async with running(config_of(tmp_path), redis_client) as stack:
        await stack.until(lambda p: p.epoch == 3)
        await kept_epochs(tmp_path, [1, 2, 3])
    _, lost, _ = AuditLog(tmp_path).entries()
    assert (lost.cause, lost.published, lost.unsure) == (f"{A} left", snapshot(two), False)


async def test_a_bound_that_is_loosened_is_in_the_log_though_no_limit_changes(
    redis_client: Redis, tmp_path: Path, knees: Knees
) -> None:
    """Who let it through is kept beside the epoch that stays in force, and the approval is used up."""
    async with running(config_of(tmp_path), redis_client) as stack:
        before = await first(stack)
        stack.controller.adopt(config_of(tmp_path, falls_above=0.9))
        approve(tmp_path, (await one_waits(tmp_path)).digest)
        await kept_epochs(tmp_path, [before.epoch, before.epoch])
        entry = AuditLog(tmp_path).newest()
        assert entry is not None
        assert [(s.what, s.before, s.after) for s in entry.does.settings] == [("approval.falls_above", "50 %", "90 %")]
        assert [a.by for a in entry.approved] == ["ada"]
        await none_waits(tmp_path)
        stack.controller.adopt(config_of(tmp_path, share=0.1, falls_above=0.9))
        await stack.until(lambda p: assured(p) < assured(before) / 2)
    assert ApprovalFile(tmp_path).valid(time()) == ()


async def test_an_audit_log_that_cannot_be_written_stops_no_limits(
    redis_client: Redis, tmp_path: Path, knees: Knees, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and the epochs are kept when the disk is well again."""
    broken = True
    write = audit._write_at

    def failing(*args: object) -> None:
        if broken:
            raise OSError(28, "No space left on device")
        write(*args)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(audit, "_write_at", failing)
    async with running(config_of(tmp_path), redis_client) as stack:
        one = await first(stack)
        stack.fleet.turn(A, "down")
        two = await stack.until(lambda p: urls(p) == {B})
        assert list(AuditLog(tmp_path).entries()) == []

        async def counted() -> bool:
            return stack.controller.metrics.registry.get_sample_value("penstock_epochs_unaudited") == 2

        await eventually_async(counted, WAIT_S, "a count of the epochs that are not kept")
        broken = False

        await kept_epochs(tmp_path, [one.epoch, two.epoch])

        async def counted_no_more() -> bool:
            return stack.controller.metrics.registry.get_sample_value("penstock_epochs_unaudited") == 0

        await eventually_async(counted_no_more, WAIT_S, "the end of that count")

    said = [r.getMessage() for r in caplog.records if "not in the audit log" in r.getMessage()]
    assert len(said) == 2  # that it is so, and that it no longer is
