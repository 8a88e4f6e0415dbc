"""The controller: watches the fleet, derives the limits and publishes them whenever they change.

Everything that the limits depend on (the config, the keys, the overrides, the replicas that count) is compared whole at
every round, so there is no path by which a change could be missed. A round runs when a replica changes phase, and
every ``ROUND_INTERVAL_S`` for what only time or a file changes. Limits fall in the round after a replica is
lost; they rise when a new one has been healthy for its pool's ``raise_after_s``, or at once where none served before.
No round waits for a knee: a replica whose knee is not known yet does not count, and a pool whose promise changes keeps
the old one until its replicas' knees under the new one are known.
If Redis is away, or a state file is damaged, a round fails, is logged once and is tried again; gateways keep the
limits they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from time import monotonic, time

import msgspec
from redis.exceptions import RedisError

from ratelimit.config import Config, PoolConfig, policy_of
from ratelimit.derive import GroupSupply, derive
from ratelimit.keys import KeyFile, KeyRecord, active_keys, valid_records
from ratelimit.overrides import Override, OverrideFile
from ratelimit.policy import Policy, PoolPolicy, Promise, TierPolicy, promises_of
from ratelimit.publication import Publication
from ratelimit.publisher import Publisher
from ratelimit.statefile import StateFileError
from ratelimit.supply import SupplyBook
from serving.fleet import Fleet, ReplicaSpec, ReplicaStatus
from serving.health import stuck_time_s
from serving.profile import load_profile

log = logging.getLogger(__name__)

ROUND_INTERVAL_S = 0.5

OnChange = Callable[[ReplicaStatus], None]


def replica_specs(config: Config) -> list[ReplicaSpec]:
    """Every replica that the config names: those to be started here, and those that run elsewhere."""
    specs = []
    for pool in config.pools:
        for engine in pool.engines:
            urls = [f"http://127.0.0.1:{port}" for port in engine.ports()]
            specs += [_spec(pool, url, engine.profile, engine.slowdown) for url in urls]
        specs += [
            _spec(pool, replica.url, replica.profile, replica.slowdown, replica.domain) for replica in pool.replicas
        ]
    return specs


def _spec(pool: PoolConfig, url: str, profile: str, slowdown: float, domain: str | None = None) -> ReplicaSpec:
    found = load_profile(profile)
    return ReplicaSpec(
        url=url.rstrip("/"),
        model=pool.model,
        gpu=found.gpu,
        profile=profile,
        slowdown=slowdown,
        stuck_after_s=stuck_time_s(pool.stuck_after_s, found.step_time.slowed(slowdown), found.limits),
        domain=domain,
    )


def counted(
    statuses: Iterable[ReplicaStatus], before: frozenset[str], raise_after_s: Mapping[str, float], now_s: float
) -> frozenset[str]:
    """The URLs of the replicas that count towards capacity.

    A healthy one that counted before still does; a new one does after ``raise_after_s`` of its model, or at once
    where no other of its model counts, for then it takes nothing back that was promised.
    """
    healthy = [status for status in statuses if status.health.phase == "healthy"]
    kept = {status.spec.url: status.spec.model for status in healthy if status.spec.url in before}
    served = set(kept.values())
    return frozenset(
        status.spec.url
        for status in healthy
        if status.spec.url in kept
        or status.spec.model not in served
        or status.health.healthy_for_s(now_s) >= raise_after_s[status.spec.model]
    )


class _Inputs(msgspec.Struct, frozen=True):
    policy: Policy
    supplies: Mapping[str, tuple[GroupSupply, ...]]
    counted: frozenset[str]
    specs: tuple[ReplicaSpec, ...]
    active_keys: Mapping[tuple[str, str], int]
    overrides: tuple[Override, ...]


class Controller:
    """Rounds of watch, derive and publish, until cancelled."""

    def __init__(self, config: Config, fleet: Callable[[OnChange], Fleet], publisher: Publisher) -> None:
        self._wake = asyncio.Event()
        self._fleet = fleet(lambda _status: self._wake.set())
        self._publisher = publisher
        self._keys = KeyFile(config.state_dir)
        self._overrides = OverrideFile(config.state_dir)
        self._supplies = SupplyBook(self._wake.set)
        self._published: Publication | None = None
        self._publishing = asyncio.Condition()
        self._published_keys: tuple[KeyRecord, ...] | None = None
        self._inputs_published: _Inputs | None = None
        self._failure = ""
        self.adopt(config)

    @property
    def published(self) -> Publication | None:
        """The limits in force, once the first round has published them."""
        return self._published

    def adopt(self, config: Config) -> None:
        """Take up a new config and its profiles as they are now, whole, from the next round on.

        Raises ``ProfileError``, and then keeps the one it has.
        """
        policy, specs = policy_of(config), replica_specs(config)
        self._supplies.read({spec.profile for spec in specs})
        self._config, self._policy = config, policy
        self._fleet.watch(specs)
        self._wake.set()

    async def published_without(self, urls: Collection[str], timeout_s: float) -> bool:
        """Wait until the limits in force count none of these replicas, so that their engines may be stopped.

        False if after ``timeout_s`` they still do, or nothing has been published.
        """

        def gone() -> bool:
            pools = self._published.pools if self._published else None
            return pools is not None and not any(r.url in urls for pool in pools for r in pool.replicas)

        try:
            async with asyncio.timeout(timeout_s), self._publishing:
                await self._publishing.wait_for(gone)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Publish for ever; the last publication stays in force when this is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._supplies.run(), name="find knees")
            tasks.create_task(self._rounds(), name="controller rounds")

    async def _rounds(self) -> None:
        try:
            await self._fleet.probed_once()
            # A cancellation that meets Redis traffic may be swallowed there; it is kept in the task's count.
            while not _is_cancelled():
                await self._try_round()
                with contextlib.suppress(TimeoutError):
                    # Not wait_for: in Python 3.11 it swallows a cancellation that meets the wake-up.
                    async with asyncio.timeout(ROUND_INTERVAL_S):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            self._fleet.watch(())

    async def _try_round(self) -> None:
        try:
            await self.round()
        except (RedisError, OSError, StateFileError, ValueError) as error:  # a profile's, a document's or a policy's
            if str(error) != self._failure:
                log.error("limits cannot be published, the last ones stay in force: %s", error)
            self._failure = str(error)
        else:
            if self._failure:
                log.warning("limits are published again")
            self._failure = ""

    async def round(self) -> None:
        """Derive from everything as it is now; publish what differs from what is in force."""
        lost = await self._publisher.lost()
        self._publisher.save()
        records = tuple(self._keys.records())
        if records != self._published_keys or lost.keys:
            await self._publisher.publish_keys(records)
            self._published_keys = records
        if self._is_settling():
            return
        inputs = self._inputs(records)
        if inputs == self._inputs_published and not lost.publication:
            return
        candidate = self._derive(inputs, await self._publisher.next_epoch())
        if lost.publication or not _same_limits(candidate, self._published):
            await self._publisher.publish(candidate)
            async with self._publishing:
                self._published = candidate
                self._publishing.notify_all()
            log.warning("epoch %d published: %s", candidate.epoch, candidate.reason)
        self._inputs_published = inputs

    def _is_settling(self) -> bool:
        """Whether this has just started, and the knee of a healthy replica is still being found.

        What is in force then is the promise of the controller before; a round without that replica would break it.
        """
        if self._published is not None:
            return False
        promises = {pool.model: promises_of(self._policy.tiers, pool) for pool in self._policy.pools}
        healthy = [s.spec for s in self._fleet.statuses().values() if s.health.phase == "healthy"]
        unknown = [spec for spec in healthy if not self._supplies.knows(spec, promises[spec.model])]
        return bool(unknown)

    def _inputs(self, records: Iterable[KeyRecord]) -> _Inputs:
        statuses = list(self._fleet.statuses().values())
        policy = self._policy_now(statuses)
        promises = {pool.model: promises_of(policy.tiers, pool) for pool in policy.pools}
        known = [status for status in statuses if self._supplies.knows(status.spec, promises[status.spec.model])]
        raise_after_s = {pool.model: pool.raise_after_s for pool in self._config.pools}
        counting = counted(known, self._counted_before(statuses), raise_after_s, monotonic())
        return _Inputs(
            policy=policy,
            supplies={model: self._supply_of(model, made, known, counting) for model, made in promises.items()},
            counted=counting,
            specs=tuple(status.spec for status in statuses),
            active_keys=self._active_keys(records),
            overrides=self._overrides.active(time()),
        )

    def _policy_now(self, statuses: Iterable[ReplicaStatus]) -> Policy:
        """The policy, with each pool as it was until the knees of those that serve it are known as it is to be.

        The tiers stay as they were too until then, for they make promises of their own.
        """
        published = self._inputs_published
        before = {pool.model: pool for pool in published.policy.pools} if published else {}
        counted_before = self._counted_before(statuses)
        serving = [status.spec for status in statuses if status.spec.url in counted_before]

        def is_known(pool: PoolPolicy, tiers: Sequence[TierPolicy]) -> bool:
            made = promises_of(tiers, pool)
            return all(self._supplies.knows(spec, made) for spec in serving if spec.model == pool.model)

        tiers = self._policy.tiers
        if published and not all(is_known(pool, tiers) for pool in self._policy.pools):
            tiers = published.policy.tiers
        pools = tuple(pool if is_known(pool, tiers) else before.get(pool.model, pool) for pool in self._policy.pools)
        return msgspec.structs.replace(self._policy, tiers=tiers, pools=pools)

    def _counted_before(self, statuses: Iterable[ReplicaStatus]) -> frozenset[str]:
        """Those that count in the limits in force and are the same replicas still."""
        if self._inputs_published is None:
            return frozenset()
        watched = {status.spec for status in statuses}
        before = self._inputs_published
        return frozenset(spec.url for spec in before.specs if spec.url in before.counted and spec in watched)

    def _supply_of(
        self,
        model: str,
        promises: Sequence[Promise],
        statuses: Iterable[ReplicaStatus],
        counting: Collection[str],
    ) -> tuple[GroupSupply, ...]:
        specs = [status.spec for status in statuses if status.spec.url in counting]
        return tuple(self._supplies.supplies([spec for spec in specs if spec.model == model], promises))

    def _active_keys(self, records: Iterable[KeyRecord]) -> dict[tuple[str, str], int]:
        counts = active_keys(self._known(records), time())
        return {(tier, pool.model): count for tier, count in counts.items() for pool in self._policy.pools}

    def _known(self, records: Iterable[KeyRecord]) -> list[KeyRecord]:
        """The keys whose org and tier the policy knows; the others reach nothing."""
        orgs, tiers = {org.name for org in self._policy.orgs}, {tier.name for tier in self._policy.tiers}
        return valid_records(records, orgs, tiers)

    def _derive(self, inputs: _Inputs, epoch: int) -> Publication:
        return derive(
            epoch=epoch,
            published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            reason=what_changed(self._inputs_published, inputs),
            policy=inputs.policy,
            supplies=inputs.supplies,
            active_keys=inputs.active_keys,
            overrides=inputs.overrides,
        )


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def what_changed(before: _Inputs | None, now: _Inputs) -> str:
    """Why limits are derived anew, in words for the log and for `explain`."""
    if before is None:
        return "the controller started"
    changes = [f"{url} joined" for url in sorted(now.counted - before.counted)]
    changes += [f"{url} left" for url in sorted(before.counted - now.counted)]
    changes += ["the config changed"] if (now.policy, now.specs) != (before.policy, before.specs) else []
    changes += ["supplies changed"] if not changes and now.supplies != before.supplies else []
    changes += ["active keys changed"] if now.active_keys != before.active_keys else []
    changes += ["overrides changed"] if now.overrides != before.overrides else []
    return ", ".join(changes) or "Redis had lost the limits"


def _same_limits(one: Publication, other: Publication | None) -> bool:
    if other is None:
        return False
    return msgspec.structs.replace(one, epoch=0, published_at="", reason="") == msgspec.structs.replace(
        other, epoch=0, published_at="", reason=""
    )
