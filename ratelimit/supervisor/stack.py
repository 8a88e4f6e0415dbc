"""``penstock up``: brings Redis, engines, controller and gateways up in that order, and takes them down in reverse.

Every process it starts runs under a guard that ends it when this process ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ratelimit.admintoken import AdminTokenError, admin_token, token_file
from ratelimit.config import Config, EngineConfig, PoolConfig
from ratelimit.controller import Controller
from ratelimit.controllermetrics import ControllerMetrics, serve_metrics
from ratelimit.embedded_redis import EmbeddedRedisError, connect
from ratelimit.housekeeping import housekeeping
from ratelimit.installation import installation_of
from ratelimit.keys import KeyFile
from ratelimit.leadership import Leadership
from ratelimit.publisher import Publisher
from ratelimit.replicaspecs import check_can_discover
from ratelimit.statefile import StateFileError
from ratelimit.supervisor.departures import Departures
from ratelimit.supervisor.engines import EngineKeeper
from ratelimit.supervisor.gateways import GatewayError, GatewayWorkers, gateway_settings
from ratelimit.supervisor.preflight import StackError, check_feasible, check_ports_free, only_one
from ratelimit.supervisor.redis import RedisKeeper
from ratelimit.supervisor.tasks import StoppedError, background, or_stop, until_stopped
from ratelimit.watch import ConfigWatch, follow
from serving.discovery import DiscoveryError
from serving.engine.guard import GuardError
from serving.engine.launch import EngineError, EngineSpec
from serving.fleet import Fleet, probe_session
from serving.profile import ProfileError, load_profile

DEMO_KEY_VALID_S = 24 * 3600.0
FIRST_LIMITS_TIMEOUT_S = 60.0

Progress = Callable[[str], None]

#: What can keep a stack from coming up; each message says what to do.
START_ERRORS = (
    StackError,
    EngineError,
    GatewayError,
    EmbeddedRedisError,
    GuardError,
    ProfileError,
    StateFileError,
    AdminTokenError,
    DiscoveryError,
    RedisError,
    OSError,
)


class Ready(msgspec.Struct, frozen=True):
    """What a caller, a script or a test needs to know of a running stack."""

    url: str
    admin_url: str
    admin_token_file: str
    key: str
    tier: str
    redis: str
    replicas: tuple[dict[str, str], ...]
    pids: tuple[int, ...]


def engine_specs(config: Config) -> list[EngineSpec]:
    """Every engine that the config wants started on this machine; those on GPUs share them out in this order."""
    specs: list[EngineSpec] = []
    for pool in config.pools:
        for engine in pool.engines:
            for port in engine.ports():
                taken = sum(len(spec.gpus) for spec in specs)
                specs.append(_engine_spec(pool, engine, port, gpu_index=taken))
    return specs


def _engine_spec(pool: PoolConfig, engine: EngineConfig, port: int, gpu_index: int) -> EngineSpec:
    return EngineSpec(
        device=engine.device,
        model=pool.model,
        port=port,
        profile=load_profile(engine.profile),
        slowdown=engine.slowdown,
        model_path=engine.model_path,
        extra_args=tuple(engine.extra_args),
        gpu_index=gpu_index,
    )


async def run_stack(
    watch: ConfigWatch, stop: asyncio.Event, progress: Progress, on_ready: Callable[[Ready], None]
) -> None:
    """Run the stack of a config file until ``stop`` is set.

    ``progress`` is told each stage, ``on_ready`` is called once when requests are served. When a part does not come up
    one of ``START_ERRORS`` is raised, and nothing is left running.
    """
    config = watch.config
    with only_one(config.state_dir):
        (config.state_dir / "logs").mkdir(mode=0o700, exist_ok=True)
        check_ports_free(config.gateway)
        check_can_discover(config)
        await check_feasible(config)
        with contextlib.suppress(StoppedError):
            async with contextlib.AsyncExitStack() as stack:
                await _Starting(watch, stop, progress, stack).run(on_ready)


class _Starting:
    """A stack from its first process to its end; ``stack`` undoes each part in reverse order."""

    def __init__(
        self, watch: ConfigWatch, stop: asyncio.Event, progress: Progress, stack: contextlib.AsyncExitStack
    ) -> None:
        self._watch = watch
        self._config = watch.config
        self._stop = stop
        self._progress = progress
        self._stack = stack
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, on_ready: Callable[[Ready], None]) -> None:
        """Bring the parts up one after the other, then keep them until the stop."""
        config = self._config
        redis, redis_url, redis_pids = await self._start_redis()
        secret, tier = _demo_key(config)
        engines = await self._start_engines()
        controller = await self._start_controller(redis, engines)
        gateways = await self._start_gateways(redis_url)
        if not self._stop.is_set():
            pids = [os.getpid(), *redis_pids(), *gateways.pids]
            pids += [pid for engine in engines.engines for pid in (engine.pid, engine.guard_pid)]
            on_ready(
                Ready(
                    url=gateways.url,
                    admin_url=gateways.admin_url,
                    admin_token_file=str(token_file(config.state_dir, config.gateway.admin_token_file)),
                    key=secret,
                    tier=tier,
                    redis=redis_url,
                    replicas=_published_replicas(controller),
                    pids=tuple(pids),
                )
            )
        await until_stopped(self._tasks, self._stop)

    async def _beside(self, *work: Coroutine[None, None, None]) -> None:
        self._tasks += await self._stack.enter_async_context(background(*work))

    async def _start_redis(self) -> tuple[Redis, str, Callable[[], list[int]]]:
        self._progress("starting Redis")
        url = self._config.redis
        pids: Callable[[], list[int]] = list
        if url == "embedded":
            folder = self._config.state_dir
            keeper = RedisKeeper(folder / "redis", folder / "logs" / "redis.log")
            self._stack.push_async_callback(keeper.stop)
            url, pids = await keeper.start(), lambda: keeper.pids
            await self._beside(keeper.run())
        redis = await connect(url)
        self._stack.push_async_callback(redis.aclose)
        return redis, url, pids

    async def _start_engines(self) -> EngineKeeper:
        specs = engine_specs(self._config)
        self._progress(f"starting {len(specs)} engine(s)")
        engines = EngineKeeper(self._config.state_dir / "engines")
        self._stack.push_async_callback(engines.stop)
        engines.want(specs)
        await or_stop(engines.start(), self._stop, self._tasks)
        await self._beside(engines.run())
        return engines

    async def _start_controller(self, redis: Redis, engines: EngineKeeper) -> Controller:
        self._progress("deriving the limits")
        session = await self._stack.enter_async_context(probe_session())
        metrics = ControllerMetrics()
        leadership = Leadership(redis, metrics, installation_of(self._config.state_dir))
        publisher = Publisher(redis, self._config.state_dir, leadership)
        controller = Controller(self._config, lambda changed: Fleet(session, changed), publisher, metrics)

        departures = Departures(session, controller.published_without, engines.let_go)

        def adopt(config: Config) -> None:
            specs = engine_specs(config)
            controller.adopt(config)
            departures.add(engines.want(specs))

        shown = self._config.controller
        # The state folder is locked: what this controller knows of it stays true, also over a lease that was lost.
        await self._beside(leadership.run(asyncio.Event().wait))
        await self._beside(
            controller.run(),
            departures.run(),
            follow(self._watch, adopt),
            serve_metrics(controller.metrics, shown.metrics_host, shown.metrics_port),
            *housekeeping(redis, self._watch),
        )
        await or_stop(_first_limits(controller, self._config), self._stop, self._tasks)
        return controller

    async def _start_gateways(self, redis_url: str) -> GatewayWorkers:
        self._progress("starting the gateway")
        config = self._config
        token = admin_token(config.state_dir, config.gateway.admin_token_file)
        gateways = GatewayWorkers(gateway_settings(config.gateway, redis_url, token), config.state_dir / "logs")
        self._stack.push_async_callback(gateways.stop)
        gateways.start()
        await or_stop(gateways.wait_ready(), self._stop, self._tasks)
        await self._beside(gateways.run())
        return gateways


async def _first_limits(controller: Controller, config: Config) -> None:
    """Wait for a publication in which every pool with engines of ours has a replica. Raises ``StackError``."""
    wanted = {pool.model for pool in config.pools if any(engine.count for engine in pool.engines)}
    served: set[str] = set()
    try:
        async with asyncio.timeout(FIRST_LIMITS_TIMEOUT_S):
            while controller.published is None or not wanted <= served:
                await asyncio.sleep(0.05)
                published = controller.published
                served = {pool.model for pool in published.pools if pool.replicas} if published else set()
    except TimeoutError as error:
        missing = ", ".join(sorted(wanted - served)) or "no pool"
        raise StackError(
            f"no limits could be derived for {missing} in {FIRST_LIMITS_TIMEOUT_S:.0f} s: "
            "its engines are not healthy, no load meets its SLO, or another controller leads on this Redis "
            "(the log says which)"
        ) from error


def _published_replicas(controller: Controller) -> tuple[dict[str, str], ...]:
    pools = controller.published.pools if controller.published else ()
    return tuple({"url": replica.url, "gpu": replica.gpu} for pool in pools for replica in pool.replicas)


def _demo_key(config: Config) -> tuple[str, str]:
    """A fresh key for trying the stack out, which replaces the one of the last start, and its tier."""
    org, tier = config.orgs[0].name, config.tiers[0].name
    return KeyFile(config.state_dir).replace_demo(org, tier, DEMO_KEY_VALID_S), tier
