"""The limits that a config would give, derived without a fleet: every replica that it names is counted healthy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from ratelimit.config import Config, policy_of
from ratelimit.derive import derive
from ratelimit.discovered import discovered
from ratelimit.keys import KeyFile, active_keys, valid_records
from ratelimit.overrides import OverrideFile
from ratelimit.policy import Policy, promises_of
from ratelimit.publication import Publication
from ratelimit.publisher import read_published
from ratelimit.replicaspecs import pool_discoveries, replica_specs
from ratelimit.supervisor.tasks import background, or_stop
from ratelimit.supply import SupplyBook
from serving.fleet import ReplicaSpec
from serving.profile import load_profile

#: A knee takes seconds; all of them together that are not found by then never will be.
_TIMEOUT_S = 900.0


def planned(
    config: Config, state_dir: Path | None, keys: Mapping[str, int], now_s: float, on_progress: Callable[[str], None]
) -> Publication:
    """What the controller would publish, as epoch 0, with all of the config's replicas healthy.

    Of replicas that are discovered, those count that the limits published last in ``state_dir`` name.

    Overrides and active keys are those of ``state_dir`` at ``now_s``; ``keys`` counts the keys of tiers otherwise. A
    tier that nothing is known of has one key. ``on_progress`` is told how far the knees are, which take seconds each.
    Raises ``ProfileError``, ``StateFileError`` and ``TimeoutError``.
    """
    return asyncio.run(_planned(config, state_dir, keys, now_s, on_progress))


async def _planned(
    config: Config, state_dir: Path | None, keys: Mapping[str, int], now_s: float, on_progress: Callable[[str], None]
) -> Publication:
    policy, specs = policy_of(config), replica_specs(config)
    specs += _discovered_before(config, state_dir, {spec.url for spec in specs})
    promises = {pool.model: promises_of(policy.tiers, pool) for pool in policy.pools}
    found = asyncio.Event()
    book = SupplyBook(found.set)
    book.read({spec.profile for spec in specs})

    async def know() -> None:
        while unknown := [spec for spec in specs if not book.knows(spec, promises[spec.model])]:
            on_progress(f"finding what {len(unknown)} of {len(specs)} replicas serve (seconds for each kind)")
            await found.wait()
            found.clear()

    try:
        async with asyncio.timeout(_TIMEOUT_S), background(book.run()) as finding:
            await or_stop(know(), asyncio.Event(), finding)
    except TimeoutError as error:
        raise TimeoutError(f"what the replicas serve was not found within {_TIMEOUT_S:g} s; try again") from error
    by_model = {model: [spec for spec in specs if spec.model == model] for model in promises}
    return derive(
        epoch=0,
        published_at=datetime.fromtimestamp(now_s, UTC).isoformat(timespec="seconds"),
        reason="derived offline, all replicas counted healthy",
        policy=policy,
        supplies={model: book.supplies(by_model[model], made) for model, made in promises.items()},
        active_keys=_active_keys(policy, state_dir, keys, now_s),
        overrides=OverrideFile(state_dir).active(now_s) if state_dir else (),
    )


def _discovered_before(config: Config, state_dir: Path | None, configured: set[str]) -> list[ReplicaSpec]:
    discoveries = pool_discoveries(config)
    if state_dir is None or not discoveries:
        return []
    profiles = {name: load_profile(name) for each in discoveries for name in each.profiles.values()}
    before = dict.fromkeys((each.listing for each in discoveries), read_published(state_dir))
    return list(discovered(discoveries, profiles, {}, before, configured).specs)


def _active_keys(
    policy: Policy, state_dir: Path | None, keys: Mapping[str, int], now_s: float
) -> dict[tuple[str, str], int]:
    """By tier and model: as given, else as published last, else as many as there are keys that may be used."""
    counts: dict[tuple[str, str], int] = {}
    if state_dir is not None:
        orgs, tiers = {org.name for org in policy.orgs}, {tier.name for tier in policy.tiers}
        issued = active_keys(valid_records(KeyFile(state_dir).records(), orgs, tiers), now_s)
        published = read_published(state_dir)
        known = {(each.tier, each.model): each.active_keys for each in published.tiers} if published else {}
        counts = {(tier, pool.model): count for tier, count in issued.items() for pool in policy.pools} | known
    return counts | {(tier, pool.model): count for tier, count in keys.items() for pool in policy.pools}
