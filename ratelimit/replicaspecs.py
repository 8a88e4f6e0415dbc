"""The replicas that a config names."""

from __future__ import annotations

from ratelimit.config import Config, PoolConfig
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
