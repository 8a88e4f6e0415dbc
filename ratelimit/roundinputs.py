"""What a round of the controller derives limits from: what is decided, under the fleet as it is, as far as it is known.

Nothing waits for a knee: a replica whose knee is not known yet does not count, and a pool whose promise changes keeps
the old one until its replicas' knees under the new one are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ratelimit.decided import Adopted, Decided
from ratelimit.fleetspecs import FleetSpecs
from ratelimit.groupsupply import GroupSupply
from ratelimit.inputs import FleetNow, Inputs, counted
from ratelimit.policy import Policy, Promise, TierPolicy, promises_of
from ratelimit.supply import SupplyBook
from serving.fleet import ReplicaSpec, ReplicaStatus, is_same_engine


class RoundInputs:
    """The inputs of one round. ``before`` are those of the limits in force, if there are any."""

    def __init__(self, supplies: SupplyBook, specs: FleetSpecs, fleet: FleetNow, before: Inputs | None) -> None:
        self._supplies = supplies
        self._specs = specs
        self._fleet = fleet
        self._before = before
        self._found: list[tuple[Decided, Inputs]] = []

    def knows(self, adopted: Adopted) -> bool:
        """Whether the knees of all healthy replicas are known; those that are not are asked for."""
        book = self._supplies.having(adopted.profiles)
        promises = {pool.model: promises_of(adopted.policy.tiers, pool) for pool in adopted.policy.pools}
        healthy = [s.spec for s in self._fleet.statuses(self._specs.of(adopted)) if s.health.phase == "healthy"]
        return not book.unknown(healthy, promises)

    def of(self, decided: Decided) -> Inputs:
        """The inputs of what is decided, with the fleet as it is; each found once."""
        inputs = next((inputs for known, inputs in self._found if known == decided), None)
        if inputs is None:
            inputs = self._inputs(decided)
            self._found.append((decided, inputs))
        return inputs

    def _inputs(self, decided: Decided) -> Inputs:
        fleet = self._fleet
        configured = fleet.statuses(decided.adopted.specs)
        statuses = [*configured, *fleet.statuses(self._specs.discovered_of(decided.adopted))]
        book = self._supplies.having(decided.adopted.profiles)
        counted_before = self._counted_before(statuses)
        serving = [status.spec for status in statuses if status.spec.url in counted_before]
        policy = self._policy_now(decided.adopted.policy, serving, book)
        promises = {pool.model: promises_of(policy.tiers, pool) for pool in policy.pools}
        unknown = book.unknown((status.spec for status in statuses), promises)
        known = [status for status in statuses if (status.spec.profile, status.spec.model) not in unknown]
        counting = counted(known, counted_before, decided.adopted.raise_after_s, fleet.now_s)
        specs = [status.spec for status in known if status.spec.url in counting]

        def supply_of(model: str, made: Sequence[Promise]) -> tuple[GroupSupply, ...]:
            return tuple(book.supplies([spec for spec in specs if spec.model == model], made))

        return Inputs(
            policy=policy,
            supplies={model: supply_of(model, made) for model, made in promises.items()},
            counted=counting,
            specs=tuple(status.spec for status in statuses),
            configured=tuple(status.spec for status in configured),
            active_keys=decided.active_keys,
            overrides=decided.overrides,
            trims={model: trim for model, trim in fleet.trims.items() if model in promises},
        )

    def _policy_now(self, policy: Policy, serving: Sequence[ReplicaSpec], book: SupplyBook) -> Policy:
        """The policy, with each pool as it was until the knees of those that serve it are known as it is to be.

        The tiers stay as they were too until then, for they make promises of their own.
        """
        published = self._before
        before = {pool.model: pool for pool in published.policy.pools} if published else {}

        def unknown_models(tiers: Sequence[TierPolicy]) -> set[str]:
            promises = {pool.model: promises_of(tiers, pool) for pool in policy.pools}
            return {model for _, model in book.unknown(serving, promises)}

        tiers = policy.tiers
        if published and unknown_models(tiers):
            tiers = published.policy.tiers
        unknown = unknown_models(tiers)
        pools = tuple(before.get(pool.model, pool) if pool.model in unknown else pool for pool in policy.pools)
        return msgspec.structs.replace(policy, tiers=tiers, pools=pools)

    def _counted_before(self, statuses: Iterable[ReplicaStatus]) -> frozenset[str]:
        """Those that count in the limits in force and are the same replicas still."""
        before = self._before
        if before is None:
            return frozenset()
        watched = {status.spec.url: status.spec for status in statuses}
        counting = ((spec, watched.get(spec.url)) for spec in before.specs if spec.url in before.counted)
        return frozenset(spec.url for spec, now in counting if now is not None and is_same_engine(now, spec))
