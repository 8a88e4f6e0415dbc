"""The controller: watches the fleet, derives the limits and publishes them whenever they change.

Everything that the limits depend on (the config, the keys, the overrides, the replicas that count) is compared whole at
every round, so there is no path by which a change could be missed. A round runs when a replica changes phase, and
every ``ROUND_INTERVAL_S`` for what only time or a file changes. Limits fall in the round after a replica is
lost; they rise when a new one has been healthy for its pool's ``raise_after_s``, or at once where none served before.
One that flaps must stay healthy for longer each time. What live signals say of a supply trims it (see ``feedback``).
Replicas that Kubernetes tells of (see ``fleetspecs``) are fleet like those that the config names: they wait for nobody.
What people decide may have to wait for approval (see ``approval``): then a round goes on with what was decided before
it, and the fleet as it is.
No round waits for a knee: a replica whose knee is not known yet does not count, and a pool whose promise changes keeps
the old one until its replicas' knees under the new one are known.
If Redis is away, or a state file is damaged, a round fails, is logged once and is tried again; gateways keep the
limits they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from math import inf
from time import monotonic, time

from redis.exceptions import RedisError

from ratelimit.approval import Decision
from ratelimit.cancellation import is_cancelled
from ratelimit.config import Config, policy_of
from ratelimit.controllermetrics import ControllerMetrics
from ratelimit.decided import Adopted, Decided, changes, held_together, standing, without_overrides
from ratelimit.derive import derive
from ratelimit.fleetspecs import FleetSpecs, StartDiscovery, together
from ratelimit.governor import Governor, IssuedKeys
from ratelimit.inputs import FleetNow, Inputs, same_limits, what_changed
from ratelimit.keyactivity import KeyActivity, KeysNow
from ratelimit.keys import KeyRecord
from ratelimit.leadership import NotLeadingError
from ratelimit.livefeedback import LiveFeedback
from ratelimit.overrides import OverrideFile
from ratelimit.publication import Publication
from ratelimit.publisher import Publisher
from ratelimit.replicaspecs import pool_discoveries, replica_specs
from ratelimit.replicasupply import gpu_supplies, possible_specs
from ratelimit.roundinputs import RoundInputs
from ratelimit.statefile import StateFileError
from ratelimit.supply import Knees, SupplyBook
from ratelimit.threads import to_its_end
from serving.discovery import Discovery
from serving.fleet import Fleet, ReplicaSpec, ReplicaStatus
from serving.profile import load_profile

log = logging.getLogger(__name__)

ROUND_INTERVAL_S = 0.5

OnChange = Callable[[ReplicaStatus], None]


class Controller:
    """Rounds of watch, derive and publish, until cancelled."""

    def __init__(
        self,
        config: Config,
        fleet: Callable[[OnChange], Fleet],
        publisher: Publisher,
        metrics: ControllerMetrics | None = None,
        discovery: StartDiscovery = Discovery,
        knees: Knees | None = None,
    ) -> None:
        self.metrics = metrics or ControllerMetrics()
        self._wake = asyncio.Event()
        self._fleet = fleet(lambda _status: self._wake.set())
        self._specs = FleetSpecs(discovery(self._wake.set))
        self._publisher = publisher
        self._keys = KeysNow(config.state_dir)
        self._activity = KeyActivity(publisher.use_reader(), config.state_dir, config.controller.key_idle_s)
        self._overrides = OverrideFile(config.state_dir)
        self._supplies = SupplyBook(self._knee_found, knees)
        self._knees_found = 0
        self._fleet_seen: FleetNow | None = None
        self._fleet_stamp: tuple[object, ...] = ()
        self._next_raise_s = inf
        self._settled: tuple[object, ...] | None = None
        self._feedback = LiveFeedback(config.state_dir)
        self._governor = Governor(config.state_dir)
        self._issued = IssuedKeys()
        self._decided: Decided | None = None
        self._has_resumed = False
        self._seen: tuple[object, ...] | None = None
        self._published: Publication | None = None
        self._publishing = asyncio.Condition()
        self._published_keys: tuple[KeyRecord, ...] | None = None
        self._inputs_published: Inputs | None = None
        self._failure = ""
        self._watched: tuple[ReplicaSpec, ...] = ()
        self.adopt(config)
        with contextlib.suppress(StateFileError):  # the first round says it
            self._resume()
        self._watch()

    def _resume(self) -> None:
        """Take up what was decided before. Raises ``StateFileError`` where nobody can tell."""
        if not self._has_resumed:
            self._decided = self._governor.resumed()
            self._has_resumed = True

    def _knee_found(self) -> None:
        self._knees_found += 1
        self._wake.set()

    @property
    def published(self) -> Publication | None:
        """The limits in force, once the first round has published them."""
        return self._published

    def adopt(self, config: Config) -> None:
        """Take up a new config and its profiles as they are now, whole, from the next round on, or once it is approved.

        Raises ``ProfileError``, and then keeps the one it has.
        """
        specs, discoveries = tuple(replica_specs(config)), tuple(pool_discoveries(config))
        named = {spec.profile for spec in specs} | {name for each in discoveries for name in each.profiles.values()}
        self._next = Adopted(
            policy=policy_of(config),
            specs=specs,
            profiles={name: load_profile(name) for name in sorted(named)},
            raise_after_s={pool.model: pool.raise_after_s for pool in config.pools},
            falls_above=config.approval.falls_above,
            discover=discoveries,
        )
        self._wake.set()

    def _watch(self) -> None:
        """Watch the replicas of the newest config.

        While it may wait, those that it leaves out or replaces are watched on as they are: they count until then.
        """
        before = [self._decided.adopted] if self._decided and self._decided.adopted is not self._next else []
        self._specs.look([self._next, *before])
        watched = together(self._specs.of(each) for each in (self._next, *(before if self._is_governed else ())))
        if watched != self._watched:
            self._watched = watched
            self._fleet.watch(watched)

    @property
    def _is_governed(self) -> bool:
        """Whether a change may have to wait. The config in force says so: none may allow itself."""
        return self._decided is not None and self._decided.adopted.falls_above is not None

    async def published_without(self, urls: Collection[str], timeout_s: float) -> bool:
        """Wait until the limits in force count none of these replicas, so that their engines may be stopped.

        False if after ``timeout_s`` they still do, or nothing has been published. While the config that leaves them out
        waits for approval, they are in use, and this waits too.
        """

        def gone() -> bool:
            pools = self._published.pools if self._published else None
            return pools is not None and not any(r.url in urls for pool in pools for r in pool.replicas)

        while True:
            try:
                async with asyncio.timeout(timeout_s), self._publishing:
                    await self._publishing.wait_for(gone)
            except TimeoutError:
                if not (self._is_governed and self._decided and self._decided.adopted != self._next):
                    return False
            else:
                return True

    async def run(self) -> None:
        """Publish for ever; the last publication stays in force when this is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._supplies.run(), name="find knees")
            tasks.create_task(self._rounds(), name="controller rounds")

    async def _rounds(self) -> None:
        try:
            await self._specs.first_list()
            self._watch()
            await self._fleet.probed_once()
            while not is_cancelled():
                began_s = monotonic()
                await self._try_round()
                # What changes without an end may not keep the probes from their turn, nor changes from coming together.
                await asyncio.sleep(min(monotonic() - began_s, ROUND_INTERVAL_S))
                with contextlib.suppress(TimeoutError):
                    # Not wait_for: in Python 3.11 it swallows a cancellation that meets the wake-up.
                    async with asyncio.timeout(ROUND_INTERVAL_S):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            self._fleet.watch(())
            await self._specs.stop()

    async def _try_round(self) -> None:
        try:
            await self.round()
        except (RedisError, OSError, StateFileError, ValueError) as error:  # a profile's, a document's or a policy's
            if str(error) != self._failure:
                log.error("limits cannot be published, the last ones stay in force: %s", error)
            self._failure = str(error)
            self.metrics.round_ended(good=False)
        except NotLeadingError:  # the lease says why it is lost
            self.metrics.round_ended(good=False)
        else:
            if self._failure:
                log.warning("limits are published again")
            self._failure = ""
            self.metrics.round_ended(good=True)

    async def round(self) -> None:
        """Derive from everything as it is now; publish what differs from what is in force."""
        lost = await self._publisher.lost()
        await to_its_end(self._publisher.save)
        records = self._keys.records()
        if records != self._published_keys or lost.keys:
            await self._publisher.publish_keys(records)
            self._published_keys = records
        if not self._has_resumed:
            self._resume()
            self._watch()
            await self._fleet.probed_once()
        self._watch()
        if self._specs.is_unsure:
            self._specs.assume(self._published or await self._publisher.newest())
            self._watch()
            await self._fleet.probed_once()
        self.metrics.discovered(self._specs.state())
        self._look_at_signals()
        fleet = self._fleet_now()
        if self._is_settling(fleet):
            return
        if self._governor.is_unsure():
            self._governor.settle(await self._publisher.epoch_in_redis())
        if self._governor.has_unsaved:
            await to_its_end(self._governor.save)
        self._note_governed()
        wanted = await self._wanted(records, fleet)
        base = standing(self._decided, wanted, time()) if self._decided else wanted
        base = wanted if base == wanted else base
        approvals = self._governor.approvals()
        now = (fleet, base, wanted, approvals)
        if now == self._settled and not lost.publication:
            return
        inputs_of = self._inputs(fleet).of
        bounds = wanted.adopted.falls_above, base.adopted.falls_above
        seen = (inputs_of(wanted), inputs_of(base), bounds, approvals)
        self._settled = now if seen == self._seen else None
        if self._settled and not lost.publication:
            return
        epoch = await self._publisher.next_epoch(above=self._governor.newest_epoch)

        def derived(decided: Decided) -> Publication:
            found = self._derive(inputs_of(decided), epoch)
            return held_together(found, wanted.active_keys, decided.overrides)

        later = without_overrides if base.overrides or wanted.overrides else None
        decision = self._governor.decide(base, changes(base, wanted), derived, base.adopted.falls_above, later)
        in_force = await self._take_effect(decision, lost.publication)
        self._inputs_published = inputs_of(decision.inputs)
        self._note_governed()
        self.metrics.published(in_force, self._inputs_published.trims)
        self._decided, self._seen = decision.inputs, seen
        self._tell_supplies()

    async def _take_effect(self, decision: Decision[Decided], is_lost: bool) -> Publication:
        """Publish what was decided if it differs from what is in force, or that is lost; what is in force then.

        It is kept first, so that a controller which dies on the way has let nothing through unseen. One that does not
        lead any more keeps nothing: the files are the next one's.
        """
        candidate = self._published
        if candidate is None or is_lost or not same_limits(decision.publication, candidate):
            candidate = decision.publication
        self._publisher.check_leading()
        await to_its_end(self._governor.taking_up, decision.inputs, candidate, decision.approved)
        if candidate is not self._published:
            await self._publisher.publish(candidate)
            async with self._publishing:
                self._published = candidate
                self._publishing.notify_all()
            log.warning("epoch %d published: %s", candidate.epoch, candidate.reason)
            for warning in candidate.warnings:
                log.warning("%s", warning)
        await to_its_end(self._governor.in_force)
        return candidate

    def _note_governed(self) -> None:
        self.metrics.waiting.set(self._governor.waiting)
        self.metrics.unaudited.set(self._governor.unkept)

    def _tell_supplies(self) -> None:
        if self._inputs_published is not None and self._decided is not None:
            adopted = self._decided.adopted
            book = self._supplies.having(adopted.profiles)
            supplies = gpu_supplies(self._inputs_published, book.rate_of, possible_specs(adopted))
            self.metrics.supplied(supplies)

    async def _wanted(self, records: tuple[KeyRecord, ...], fleet: FleetNow) -> Decided:
        """What is to be in force; a config not before it is known what the fleet does under it, if it is to be weighed.

        Keys are those of the orgs and tiers that this config or the one in force knows.
        """
        before, now_s = self._decided, time()
        policies = [self._next.policy, *([before.adopted.policy] if before else [])]
        must_wait = self._is_governed and not self._inputs(fleet).knows(self._next)
        return Decided(
            adopted=before.adopted if before and must_wait else self._next,
            overrides=self._overrides.active(now_s),
            issued=self._issued.counts(records, policies, now_s),
            active_keys=await self._activity.counts(records, policies, now_s),
        )

    def _fleet_now(self) -> FleetNow:
        """The fleet as it is: the last one, until something of it changes or the time comes for a replica to count."""
        adopted = [self._next, *([self._decided.adopted] if self._decided else [])]
        trims, now_s = self._feedback.trims(), monotonic()
        versions = self._fleet.version, self._specs.version, self._knees_found
        stamp = (*versions, trims, [each.raise_after_s for each in adopted])
        if self._fleet_seen is None or stamp != self._fleet_stamp or now_s >= self._next_raise_s:
            self._fleet_seen, self._fleet_stamp = FleetNow(self._fleet.statuses(), now_s, trims), stamp
            self.metrics.watched(self._fleet_seen.by_url.values())
            self._tell_supplies()
            self._next_raise_s = min(self._fleet_seen.next_raise_s(each.raise_after_s) for each in adopted)
        return self._fleet_seen

    def _look_at_signals(self) -> None:
        published = self._inputs_published
        if published is not None:
            self._feedback.look(published.policy.pools, published.supplies, self._fleet.counters(), monotonic())

    def _is_settling(self, fleet: FleetNow) -> bool:
        """Whether this has just started, and the knee of a healthy replica is still being found.

        What is in force then is the promise of the controller before; a round without that replica would break it.
        """
        if self._published is not None:
            return False
        adopted = [self._next, *([self._decided.adopted] if self._decided else [])]
        unknown = [each for each in adopted if not self._inputs(fleet).knows(each)]
        return bool(unknown)

    def _inputs(self, fleet: FleetNow) -> RoundInputs:
        return RoundInputs(self._supplies, self._specs, fleet, self._inputs_published)

    def _derive(self, inputs: Inputs, epoch: int) -> Publication:
        return derive(
            epoch=epoch,
            published_at=datetime.now(UTC).isoformat(timespec="seconds"),
            reason=what_changed(self._inputs_published, inputs),
            policy=inputs.policy,
            supplies=inputs.supplies,
            active_keys=inputs.active_keys,
            overrides=inputs.overrides,
            trims=inputs.trims,
        )
