"""The controller's own metrics, and the small server that shows them to Prometheus."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from ratelimit.groupsupply import Trim
from ratelimit.publication import Publication

log = logging.getLogger(__name__)

RETRY_S = 5.0


class ControllerMetrics:
    """What the controller does, with a registry of its own: a process may hold several."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.trim = Gauge(
            "penstock_supply_trim", "The share of a pool's measured supply that live signals leave it.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.active_keys = Gauge(
            "penstock_active_keys", "Keys that share what a tier is assured on a model.", ["tier", "model"],
            registry=registry,
        )  # fmt: skip
        self.replicas = Gauge("penstock_replicas", "Replicas that count.", ["model"], registry=registry)
        self.epoch = Gauge("penstock_epoch", "Epoch of the limits in force.", registry=registry)
        self.waiting = Gauge("penstock_changes_waiting", "Changes that wait for approval.", registry=registry)
        self.unaudited = Gauge(
            "penstock_epochs_unaudited", "Epochs published and not yet, or never, in the audit log.", registry=registry
        )
        self.failed_rounds = Counter(
            "penstock_failed_rounds", "Rounds that could not publish the limits.", registry=registry
        )

    def published(self, publication: Publication, trims: Mapping[str, Trim]) -> None:
        """These limits are in force, from supplies so trimmed."""
        for gauge in (self.trim, self.active_keys, self.replicas):
            gauge.clear()
        self.epoch.set(publication.epoch)
        for pool in publication.pools:
            self.replicas.labels(pool.model).set(len(pool.replicas))
            self.trim.labels(pool.model).set(trims[pool.model].factor if pool.model in trims else 1.0)
        for tier in publication.tiers:
            self.active_keys.labels(tier.tier, tier.model).set(tier.active_keys)


async def serve_metrics(metrics: ControllerMetrics, host: str, port: int | None) -> None:
    """Show ``/metrics`` until cancelled; nothing without a port. A port that is taken is said once, and tried again."""

    async def show(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", show)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        if port is not None:
            await _listen(runner, host, port)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    said = False
    while True:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            if not said:
                log.error("controller.metrics_port: cannot listen on %s:%d: %s", host, port, error)
            said = True
            await asyncio.sleep(RETRY_S)
        else:
            return
