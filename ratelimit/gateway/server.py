"""One gateway process: its sockets, its servers, its wiring, its orderly end. The only place that wires the gateway."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from random import random
from typing import TypeAlias

import uvloop
from redis.asyncio import Redis

from ratelimit.gateway.admin import admin_app
from ratelimit.gateway.app import DataApp
from ratelimit.gateway.breaker import GuardedStores
from ratelimit.gateway.directory import Directory, RedisRefusesError
from ratelimit.gateway.drain import Drain
from ratelimit.gateway.forward import Forwarder
from ratelimit.gateway.ledger import Ledger
from ratelimit.gateway.local import LocalMode
from ratelimit.gateway.metrics import GatewayMetrics
from ratelimit.gateway.presence import HEARTBEAT_S, Presence
from ratelimit.gateway.proxy import Proxy
from ratelimit.gateway.readiness import Readiness, readiness
from ratelimit.gateway.serving import GatewayServer
from ratelimit.gateway.settings import SETTLE_DRAIN_S, GatewaySettings
from ratelimit.gateway.upstream import AiohttpUpstream
from ratelimit.keyuse import read_uses
from ratelimit.link import open_link
from ratelimit.redisclient import RedisUrlError, redis_client, shown
from ratelimit.store import Commands, Store
from serving.routing import Router

log = logging.getLogger(__name__)

#: The data port's app, the admin port's, what runs beside them until it is cancelled, and what settles in the end.
_Wired: TypeAlias = tuple[DataApp, object, asyncio.Task[None], Callable[[], Awaitable[None]]]

_ADMIN_DRAIN_S = 1
#: Of the time for settlements, what is kept for telling the stores what they are owed.
_FLUSH_S = 1.0
#: Longer than any call may take: the breaker judges first, and it looks at what the socket holds before it does.
_STORE_TIMEOUT_S = 60.0


class GatewayStartError(RuntimeError):
    """The gateway cannot start; the message says what is in the way."""


class GatewayBrokenError(RuntimeError):
    """The gateway's background work ended by a fault, so the gateway has ended too: start it again."""


def listening_socket(host: str, port: int, shared: bool) -> socket.socket:
    """A bound TCP socket; a ``shared`` port may be bound by several gateways. Raises ``GatewayStartError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise GatewayStartError(
            f"cannot listen on {host}:{port}: {error}. Free the port, or set another one under `gateway:`."
        ) from error
    return listener


def run_gateway(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT, then let open requests finish and settle.

    A Redis that does not answer yet is waited for, with the ports open and the gateway not ready. Raises
    ``GatewayStartError`` for a busy port and for a Redis that refuses us, and ``GatewayBrokenError`` after it has ended
    in the same order by itself, since its background work had.
    """
    uvloop.run(serve_gateway(settings))


async def serve_gateway(settings: GatewaySettings) -> None:
    """The same inside a running event loop, whose SIGTERM and SIGINT it takes over."""
    with (
        listening_socket(settings.host, settings.port, shared=True) as data_socket,
        listening_socket(settings.host, settings.admin_port, shared=False) as admin_socket,
    ):
        try:
            redis = redis_client(settings.redis_url)
        except RedisUrlError as error:
            raise GatewayStartError(str(error)) from error
        drain = Drain()
        try:
            async with (
                _limiter_link(settings) as link,
                _wired(settings, redis, link, drain) as (data, admin, background, settle),
            ):
                data_server = GatewayServer(data, drain, settings.drain_s, settings.drain_delay_s)
                with _watched(background, data_server):
                    admin_server = GatewayServer(admin, Drain(), _ADMIN_DRAIN_S)
                    await _serve(data_server, data_socket, admin_server, admin_socket, settle)
        finally:
            await redis.aclose()


@asynccontextmanager
async def _limiter_link(settings: GatewaySettings) -> AsyncIterator[Commands]:
    link = open_link(settings.redis_url, settings.connect_timeout_s)
    try:
        yield link
    finally:
        await link.aclose()


@asynccontextmanager
async def _wired(settings: GatewaySettings, redis: Redis, link: Commands, drain: Drain) -> AsyncIterator[_Wired]:
    metrics = GatewayMetrics()
    presence = Presence(redis, settings.gateway_id, metrics)
    directory = Directory(redis, metrics, settings.poll_interval_s, presence)
    local = LocalMode(metrics, settings.gateway_id, presence.gateways, settings.request_timeout_s)
    ledger = Ledger(metrics, settings.lease_s, local)
    stores = GuardedStores(lambda model: Store(link, model, _STORE_TIMEOUT_S), settings.store_timeout_s, metrics)
    async with _upstream(settings) as upstream:
        router = Router(random(), presence.gateways)  # noqa: S311 - where a sequence starts is no secret
        forwarder = Forwarder(upstream, metrics, settings.first_byte_timeout_s, router)
        proxy = Proxy(settings, directory, stores, forwarder, ledger, metrics, drain)
        health = partial(_readiness, directory, drain)
        await _read_first(directory, settings)
        background = asyncio.create_task(_background(directory, ledger, local, stores))
        try:
            admin = admin_app(directory, metrics, settings.admin_token, partial(read_uses, redis), health)
            yield DataApp(proxy, directory, stores, health), admin, background, partial(_settle, ledger, local, stores)
        finally:
            if local.owes:
                log.error("Redis is away at the end: %d buckets and usage records were not told to it", local.owes)
            is_broken = not background.cancel()
            await asyncio.wait({background})
            await stores.aclose()
        if is_broken:
            raise GatewayBrokenError("the background work ended by itself")


async def _settle(ledger: Ledger, local: LocalMode, stores: GuardedStores) -> None:
    """Let settlements end, and tell each store what it is owed, within ``SETTLE_DRAIN_S``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_DRAIN_S):
            await ledger.drain(SETTLE_DRAIN_S - _FLUSH_S)
            await local.flush(stores)


def _readiness(directory: Directory, drain: Drain) -> Readiness:
    return readiness(
        draining=drain.has_begun,
        could_serve=directory.could_serve,
        has_limits=directory.ready,
        redis_is_away=directory.redis_is_away,
        is_unreadable=directory.is_unreadable,
    )


async def _read_first(directory: Directory, settings: GatewaySettings) -> None:
    """Read what is published, if Redis is there; a Redis that would refuse us later too ends the start."""
    where = shown(settings.redis_url)
    try:
        await directory.read_first()
    except RedisRefusesError as error:
        raise GatewayStartError(
            f"Redis at {where} refuses this gateway: {error}. Check the user and the password in the URL, and that the "
            "user may do what docs/redis.md lists."
        ) from error
    if directory.redis_is_away:
        log.warning("no Redis at %s yet; this gateway becomes ready when it answers", where)


@contextmanager
def _watched(background: asyncio.Task[None], data: GatewayServer) -> Iterator[None]:
    """End the server, as a signal does, when the background work ends: it would serve on with limits that grow old."""

    def stop(_: asyncio.Task[None]) -> None:
        fault = None if background.cancelled() else background.exception()
        log.critical("the background work has ended, and so does this gateway", exc_info=fault)
        data.leave()

    background.add_done_callback(stop)
    try:
        yield
    finally:
        background.remove_done_callback(stop)


async def _background(directory: Directory, ledger: Ledger, local: LocalMode, stores: GuardedStores) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(directory.run())
        tasks.create_task(ledger.run())
        tasks.create_task(local.run(stores))
        tasks.create_task(_show_bound(directory, local))


async def _show_bound(directory: Directory, local: LocalMode) -> None:
    """Keep the metric of what would be admitted without Redis true."""
    shown = None
    while True:
        published = directory.publication
        current = published.epoch if published else 0, directory.presence.gateways()
        if current != shown:
            local.publish_bound(directory.every_tier())
            shown = current
        await asyncio.sleep(HEARTBEAT_S)


def _upstream(settings: GatewaySettings) -> AiohttpUpstream:
    return AiohttpUpstream(settings.connect_timeout_s, settings.chunk_timeout_s, settings.max_answer_bytes)


async def _serve(
    data: GatewayServer,
    data_socket: socket.socket,
    admin: GatewayServer,
    admin_socket: socket.socket,
    settle: Callable[[], Awaitable[None]],
) -> None:
    """Run both servers; a signal ends the data server first, and the admin port answers until it has drained.

    The admin port's own end takes no time from the settlements, nor they from it.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, data.leave)
    admin_task = asyncio.create_task(admin.serve([admin_socket]))
    try:
        await data.serve([data_socket])
    finally:
        admin.leave()
        await asyncio.gather(admin_task, settle())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
