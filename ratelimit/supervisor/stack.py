"""``penstock up``: brings Redis, engines, controller and gateways up in that order, and takes them down in reverse.

Every process it starts runs under a guard that ends it when this process ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from time import time

import msgspec
from redis.asyncio import Redis

from ratelimit.config import Config, EngineConfig, PoolConfig
from ratelimit.controller import Controller
from ratelimit.embedded_redis import connect, start_embedded_redis
from ratelimit.keys import KeyFile, status
from ratelimit.publisher import Publisher
from ratelimit.reaper import Reaper
from ratelimit.statefile import private_folder
from ratelimit.supervisor.engines import EngineKeeper
from ratelimit.supervisor.gateways import GatewayWorkers
from ratelimit.supervisor.tasks import StoppedError, background, or_stop, until_stopped
from ratelimit.watch import ConfigWatch, follow
from serving.engine.launch import EngineSpec
from serving.fleet import Fleet, probe_session
from serving.profile import load_profile

log = logging.getLogger(__name__)

DEMO_KEY_NAME = "demo"
DEMO_KEY_VALID_S = 24 * 3600.0
DRAIN_S = 5.0
FIRST_LIMITS_TIMEOUT_S = 60.0

Progress = Callable[[str], None]


class StackError(RuntimeError):
    """Why the stack cannot come up, and what to do about it."""


class Ready(msgspec.Struct, frozen=True):
    """What a caller, a script or a test needs to know of a running stack."""

    url: str
    admin_url: str
    key: str
    tier: str
    redis: str
    replicas: tuple[dict[str, str], ...]
    pids: tuple[int, ...]


def engine_specs(config: Config) -> list[EngineSpec]:
    """Every engine that the config wants started on this machine."""
    return [
        _engine_spec(pool, engine, port) for pool in config.pools for engine in pool.engines for port in engine.ports()
    ]


def _engine_spec(pool: PoolConfig, engine: EngineConfig, port: int) -> EngineSpec:
    return EngineSpec(
        device=engine.device,
        model=pool.model,
        port=port,
        profile=load_profile(engine.profile),
        slowdown=engine.slowdown,
        model_path=engine.model_path,
        extra_args=tuple(engine.extra_args),
    )


async def run_stack(
    watch: ConfigWatch, path: Path, stop: asyncio.Event, progress: Progress, on_ready: Callable[[Ready], None]
) -> None:
    """Run the stack of a config file until ``stop`` is set.

    ``progress`` is told each stage, ``on_ready`` is called once when requests are served. Raises ``StackError``,
    ``EngineError``, ``GatewayError`` or ``EmbeddedRedisError`` when a part does not come up; nothing is left running.
    """
    config = watch.config
    state_dir = config.state_dir
    logs = state_dir / "logs"
    with _only_one(state_dir):
        logs.mkdir(mode=0o700, exist_ok=True)
        _check_ports_free(config)
        async with contextlib.AsyncExitStack() as stack:
            progress("starting Redis")
            redis_url, redis_pids = await _redis_url(config, stack)
            redis = await connect(redis_url)
            stack.push_async_callback(redis.aclose)
            parts = _Parts(config, path, redis_url, redis, redis_pids, logs)
            with contextlib.suppress(StoppedError):
                await _serve(parts, watch, stop, progress, on_ready)


class _Parts(msgspec.Struct, frozen=True):
    config: Config
    path: Path
    redis_url: str
    redis: Redis
    redis_pids: tuple[int, ...]
    logs: Path


async def _serve(
    parts: _Parts, watch: ConfigWatch, stop: asyncio.Event, progress: Progress, on_ready: Callable[[Ready], None]
) -> None:
    config = parts.config
    secret, tier = _demo_key(config)
    engines = EngineKeeper(config.state_dir / "engines")
    gateways = GatewayWorkers(config.gateway, parts.path, parts.redis_url, parts.logs)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(probe_session())
        stack.push_async_callback(engines.stop)
        engines.want(engine_specs(config))
        progress(f"starting {len(engine_specs(config))} engine(s)")
        await or_stop(engines.start(), stop)
        publisher = Publisher(parts.redis, config.state_dir)
        controller = Controller(config, lambda changed: Fleet(session, changed), publisher)
        reaper = Reaper(parts.redis, lambda: [pool.model for pool in watch.config.pools])
        tasks = await stack.enter_async_context(background(controller.run(), engines.run(), reaper.run()))
        progress("deriving the limits")
        await or_stop(asyncio.wait_for(_first_limits(controller, config), FIRST_LIMITS_TIMEOUT_S), stop)
        stack.push_async_callback(gateways.stop, DRAIN_S)
        progress("starting the gateway")
        gateways.start()
        await or_stop(gateways.wait_ready(), stop)

        def adopt(config: Config) -> None:
            # The controller first: a replica that goes stops taking requests before its engine is stopped.
            controller.adopt(config)
            engines.want(engine_specs(config))

        tasks += await stack.enter_async_context(background(gateways.run(), follow(watch, adopt)))
        if not stop.is_set():
            on_ready(_ready(parts, controller, engines, gateways, secret, tier))
        await until_stopped(tasks, stop)


async def _first_limits(controller: Controller, config: Config) -> None:
    """Wait for a publication in which every pool that should have replicas has one."""
    wanted = {pool.model for pool in config.pools if pool.engines}
    while True:
        published = controller.published
        if published is not None and wanted <= {pool.model for pool in published.pools if pool.replicas}:
            return
        await asyncio.sleep(0.05)


async def _redis_url(config: Config, stack: contextlib.AsyncExitStack) -> tuple[str, tuple[int, ...]]:
    """The URL of the Redis to use, and the processes that were started for it."""
    if config.redis != "embedded":
        return config.redis, ()
    server = await start_embedded_redis(config.state_dir / "redis", config.state_dir / "logs" / "redis.log")
    stack.push_async_callback(server.stop)
    return server.url, (server.pid, server.guard_pid)


def _demo_key(config: Config) -> tuple[str, str]:
    """A fresh key for trying the stack out, which replaces the one of the last start, and its tier."""
    if not config.orgs or not config.tiers:
        return "", ""
    keys = KeyFile(config.state_dir)
    org, tier = config.orgs[0].name, config.tiers[0].name
    for record in keys.records():
        if record.name == DEMO_KEY_NAME and status(record, time()) == "active":
            keys.revoke(record.id)
    secret, _ = keys.create(org=org, tier=tier, name=DEMO_KEY_NAME, valid_s=DEMO_KEY_VALID_S)
    return secret, tier


def _ready(
    parts: _Parts, controller: Controller, engines: EngineKeeper, gateways: GatewayWorkers, key: str, tier: str
) -> Ready:
    pools = controller.published.pools if controller.published else ()
    pids = [os.getpid(), *parts.redis_pids, *gateways.pids]
    pids += [pid for engine in engines.engines for pid in (engine.pid, engine.guard_pid)]
    return Ready(
        url=gateways.url,
        admin_url=gateways.admin_url,
        key=key,
        tier=tier,
        redis=parts.redis_url,
        replicas=tuple({"url": replica.url, "gpu": replica.gpu} for pool in pools for replica in pool.replicas),
        pids=tuple(pids),
    )


@contextlib.contextmanager
def _only_one(state_dir: Path) -> Iterator[None]:
    """Hold the state directory's lock, so that two stacks never share one."""
    private_folder(state_dir)
    with (state_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"another `penstock up` uses {state_dir}; stop it, or set another state_dir") from error
        yield


def _check_ports_free(config: Config) -> None:
    gateway = config.gateway
    ports = {gateway.port: "gateway.port"}
    ports |= {gateway.admin_port + worker: "gateway.admin_port" for worker in range(gateway.workers)}
    for port, setting in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((gateway.host, port))
            except OSError as error:
                raise StackError(
                    f"port {port} ({setting}) on {gateway.host} cannot be used: {error.strerror}; "
                    f"stop what listens there or set another {setting}"
                ) from error
