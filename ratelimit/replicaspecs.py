"""The replicas that a config names, and how it says that others are found."""

from __future__ import annotations

from ratelimit.config import Config, PoolConfig
from ratelimit.discovered import PoolDiscovery
from serving.discovery import check_client
from serving.fleet import ReplicaSpec
from serving.health import stuck_time_s
from serving.profile import load_profile


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


def check_can_discover(config: Config) -> None:
    """Raises ``DiscoveryError`` where replicas are to be discovered and what that takes is not installed."""
    if any(pool.discover is not None for pool in config.pools):
        check_client()


def pool_discoveries(config: Config) -> list[PoolDiscovery]:
    """How the replicas are found of each pool that has some discovered. Raises ``ProfileError``."""
    return [
        PoolDiscovery(
            model=pool.model,
            namespace=pool.discover.namespace,
            selector=pool.discover.selector,
            port=pool.discover.port,
            profiles={load_profile(reference).name: reference for reference in pool.discover.profiles},
            slowdown=pool.discover.slowdown,
            stuck_after_s=pool.stuck_after_s,
        )
        for pool in config.pools
        if pool.discover is not None
    ]


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
