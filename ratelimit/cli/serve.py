"""``penstock gateway`` and ``penstock controller``: one part of the stack each, for hosts that run them apart."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Annotated

import typer
from redis.exceptions import RedisError

from ratelimit.admintoken import AdminTokenError, admin_token
from ratelimit.cli.common import DEFAULT_CONFIG, ConfigOption, failing_clearly, log_to_stderr, read_config
from ratelimit.config import Config
from ratelimit.controller import Controller
from ratelimit.controllermetrics import ControllerMetrics, serve_metrics
from ratelimit.gateway.server import GatewayStartError, run_gateway
from ratelimit.housekeeping import housekeeping
from ratelimit.installation import installation_of
from ratelimit.kneesahead import find_ahead
from ratelimit.leadership import Leadership, RefusedError
from ratelimit.publisher import Publisher
from ratelimit.redisclient import RedisUrlError, redis_client
from ratelimit.replicaspecs import check_can_discover
from ratelimit.statefile import StateFileError
from ratelimit.supervisor.gateways import gateway_settings
from ratelimit.supervisor.tasks import background, until_stopped
from ratelimit.supply import Knees
from ratelimit.watch import ConfigWatch, follow
from serving.discovery import DiscoveryError
from serving.fleet import Fleet, open_all_files, probe_session
from serving.profile import ProfileError

#: A password belongs into the variable: command lines can be read by every user of a machine.
RedisOption = Annotated[
    str | None, typer.Option(envvar="PENSTOCK_REDIS_URL", help="The Redis to use instead of the config's.")
]


def gateway(
    config: ConfigOption = DEFAULT_CONFIG,
    redis: RedisOption = None,
    worker: Annotated[int, typer.Option(min=0, help="Which of the workers this is; it chooses the admin port.")] = 0,
) -> None:
    """Run one gateway worker until SIGTERM; open streams are let finish."""
    log_to_stderr()
    settings = read_config(config)
    with failing_clearly(AdminTokenError, StateFileError):
        token = admin_token(settings.state_dir, settings.gateway.admin_token_file)
    workers = gateway_settings(settings.gateway, _redis_url(settings, redis), token)
    if worker >= len(workers):
        raise typer.BadParameter(f"the config has {len(workers)} worker(s), numbered from 0")
    with failing_clearly(GatewayStartError):
        run_gateway(workers[worker])


def controller(config: ConfigOption = DEFAULT_CONFIG, redis: RedisOption = None) -> None:
    """Watch the config's replicas, derive the limits and publish them, until SIGTERM.

    Several may run on one Redis and one state folder: one leads, the others stand by. While Redis is away they wait.
    """
    log_to_stderr()
    settings = read_config(config)
    with failing_clearly(RedisUrlError, RefusedError, RedisError, ProfileError, StateFileError, DiscoveryError):
        check_can_discover(settings)
        open_all_files()
        asyncio.run(_control(ConfigWatch(config), _redis_url(settings, redis)))


async def _control(watch: ConfigWatch, redis_url: str) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    redis = redis_client(redis_url)
    metrics, shown = ControllerMetrics(), watch.config.controller
    leadership = Leadership(redis, metrics, installation_of(watch.config.state_dir))
    leading: list[Controller] = []
    knees = Knees()

    def adopt(config: Config) -> None:
        for running in leading:
            running.adopt(config)

    async with contextlib.aclosing(redis), probe_session() as session:

        async def lead() -> None:
            """One term: all state is read anew, for another may have led since; knees found are the same for ever."""
            publisher = Publisher(redis, watch.config.state_dir, leadership)
            running = Controller(watch.config, lambda changed: Fleet(session, changed), publisher, metrics, knees=knees)
            leading[:] = [running]
            try:
                async with background(running.run(), *housekeeping(redis, watch)) as tasks:
                    await until_stopped(tasks, asyncio.Event())
            finally:
                leading.clear()

        showing = serve_metrics(metrics, shown.metrics_host, shown.metrics_port)
        ahead = find_ahead(lambda: watch.config, knees, lambda: bool(leading))
        async with background(leadership.run(lead), follow(watch, adopt), showing, ahead) as tasks:
            await until_stopped(tasks, stop)


def _redis_url(config: Config, override: str | None) -> str:
    url = override or config.redis
    if url == "embedded":
        raise typer.BadParameter("the embedded Redis belongs to `penstock up`; give redis a URL in the config")
    return url
