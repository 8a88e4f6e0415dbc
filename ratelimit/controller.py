"""The controller: watches the fleet, derives the limits and publishes them whenever they change.

Everything that the limits depend on (the config, the keys, the overrides, the replicas that count) is compared whole at
every round, so there is no path by which a change could be missed. A round runs when a replica changes phase, and
every ``ROUND_INTERVAL_S`` for what only time or a file changes. Limits fall in the round after a replica is
lost; they rise when a new one has been healthy for its pool's ``raise_after_s``, or at once where none served before.
If Redis is away, or a state file is damaged, a round fails, is logged once and is tried again; gateways keep the
limits they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from time import monotonic, time

import msgspec
from redis.exceptions import RedisError

from ratelimit.config import Config, PoolConfig, policy_of
from ratelimit.derive import ReplicaSupply, derive
from ratelimit.keys import KeyFile, KeyRecord, active_keys
from ratelimit.overrides import Override, OverrideFile
from ratelimit.policy import Policy
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
        specs += [_spec(pool, replica.url, replica.profile, replica.slowdown) for replica in pool.replicas]
    return specs


def _spec(pool: PoolConfig, url: str, profile: str, slowdown: float) -> ReplicaSpec:
    found = load_profile(profile)
    return ReplicaSpec(
        url=url.rstrip("/"),
        model=pool.model,
        gpu=found.gpu,
        profile=profile,
        slowdown=slowdown,
        stuck_after_s=stuck_time_s(pool.stuck_after_s, found.step_time.slowed(slowdown), found.limits),
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
    counted: frozenset[str]
    specs: tuple[ReplicaSpec, ...]
    active_keys: Mapping[str, int]
    overrides: tuple[Override, ...]


class Controller:
    """Rounds of watch, derive and publish, until cancelled."""

    def __init__(self, config: Config, fleet: Callable[[OnChange], Fleet], publisher: Publisher) -> None:
        self._wake = asyncio.Event()
        self._fleet = fleet(lambda _status: self._wake.set())
        self._publisher = publisher
        self._keys = KeyFile(config.state_dir)
        self._overrides = OverrideFile(config.state_dir)
        self._supplies = SupplyBook()
        self._published: Publication | None = None
        self._published_keys: tuple[KeyRecord, ...] | None = None
        self._inputs_published: _Inputs | None = None
        self._failure = ""
        self.adopt(config)

    @property
    def published(self) -> Publication | None:
        """The limits in force, once the first round has published them."""
        return self._published

    def adopt(self, config: Config) -> None:
        """Take up a new config, whole, from the next round on."""
        self._config = config
        self._policy = policy_of(config)
        self._fleet.watch(replica_specs(config))
        self._wake.set()

    async def run(self) -> None:
        """Publish for ever; the last publication stays in force when this is cancelled."""
        try:
            await self._fleet.probed_once()
            while True:
                await self._try_round()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), ROUND_INTERVAL_S)
                self._wake.clear()
        finally:
            self._fleet.watch(())

    async def _try_round(self) -> None:
        try:
            await self.round()
        except (RedisError, OSError, StateFileError) as error:
            if str(error) != self._failure:
                log.error("limits cannot be published, the last ones stay in force: %s", error)
            self._failure = str(error)
        else:
            if self._failure:
                log.warning("limits are published again")
            self._failure = ""

    async def round(self) -> None:
        """Derive from everything as it is now; publish what differs from what is in force."""
        lost_by_redis = self._published is not None and await self._publisher.is_missing()
        records = tuple(self._keys.records())
        if records != self._published_keys or lost_by_redis:
            await self._publisher.publish_keys(records)
            self._published_keys = records
        inputs = self._inputs(records)
        if inputs == self._inputs_published and not lost_by_redis:
            return
        epoch = await self._publisher.newest_epoch() if self._published is None else self._published.epoch
        candidate = await self._derive(inputs, epoch + 1)
        if lost_by_redis or not _same_limits(candidate, self._published):
            await self._publisher.publish(candidate)
            self._published = candidate
            log.warning("epoch %d published: %s", candidate.epoch, candidate.reason)
        self._inputs_published = inputs

    def _inputs(self, records: Iterable[KeyRecord]) -> _Inputs:
        statuses = self._fleet.statuses()
        raise_after_s = {pool.model: pool.raise_after_s for pool in self._config.pools}
        before = self._inputs_published.counted if self._inputs_published else frozenset()
        return _Inputs(
            policy=self._policy,
            counted=counted(statuses.values(), before, raise_after_s, monotonic()),
            specs=tuple(status.spec for status in statuses.values()),
            active_keys=active_keys(records, time()),
            overrides=self._overrides.active(time()),
        )

    async def _derive(self, inputs: _Inputs, epoch: int) -> Publication:
        supplies: dict[str, list[ReplicaSupply]] = {}
        for pool in inputs.policy.pools:
            specs = [spec for spec in inputs.specs if spec.model == pool.model and spec.url in inputs.counted]
            supplies[pool.model] = await self._supplies.supplies(specs, pool)
        return derive(
            epoch=epoch,
            published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            reason=what_changed(self._inputs_published, inputs),
            policy=inputs.policy,
            supplies=supplies,
            active_keys=inputs.active_keys,
            overrides=inputs.overrides,
        )


def what_changed(before: _Inputs | None, now: _Inputs) -> str:
    """Why limits are derived anew, in words for the log and for `explain`."""
    if before is None:
        return "the controller started"
    changes = [f"{url} joined" for url in sorted(now.counted - before.counted)]
    changes += [f"{url} left" for url in sorted(before.counted - now.counted)]
    changes += ["the config changed"] if (now.policy, now.specs) != (before.policy, before.specs) else []
    changes += ["active keys changed"] if now.active_keys != before.active_keys else []
    changes += ["overrides changed"] if now.overrides != before.overrides else []
    return ", ".join(changes) or "Redis had lost the limits"


def _same_limits(one: Publication, other: Publication | None) -> bool:
    if other is None:
        return False
    return msgspec.structs.replace(one, epoch=0, published_at="", reason="") == msgspec.structs.replace(
        other, epoch=0, published_at="", reason=""
    )
