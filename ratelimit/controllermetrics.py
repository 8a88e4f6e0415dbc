"""The controller's own metrics and health, and the small server that shows them to Prometheus and to probes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from ratelimit.controllerhealth import ControllerHealth
from ratelimit.fleetspecs import DiscoveryState
from ratelimit.groupsupply import Trim
from ratelimit.publication import Publication
from ratelimit.replicasupply import GpuSupply
from serving.fleet import ReplicaStatus

log = logging.getLogger(__name__)

RETRY_S = 5.0


class ControllerMetrics:
    """What the controller does, with a registry of its own: a process may hold several.

    What is told of the fleet and the limits is told while leading only, so that it may be summed over controllers.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.health = ControllerHealth()
        self.leader = Gauge("penstock_leader", "1 while this controller leads, 0 on standby.", registry=registry)
        self.leader_changes = Counter(
            "penstock_leader_changes", "Times that this controller took or lost the lead.", registry=registry
        )
        self.trim = Gauge(
            "penstock_supply_trim", "The share of a pool's measured supply that live signals leave it.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.active_keys = Gauge(
            "penstock_active_keys", "Keys that share what a tier is assured on a model.", ["tier", "model"],
            registry=registry,
        )  # fmt: skip
        self.replicas = Gauge("penstock_replicas", "Replicas that count.", ["model"], registry=registry)
        self.usable = Gauge(
            "penstock_usable_requests_per_second",
            "Requests/s of its mix that a pool can serve, spare failure domains and trim taken off.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.fleet_replicas = Gauge(
            "penstock_fleet_replicas", "Replicas that count, by GPU type.", ["model", "gpu"], registry=registry
        )
        self.replica_adds = Gauge(
            "penstock_replica_adds_requests_per_second",
            "What one more replica of a GPU type adds to what its pool can serve.", ["model", "gpu"],
            registry=registry,
        )  # fmt: skip
        self.watched_replicas = Gauge(
            "penstock_watched_replicas", "Replicas that are watched, by health: starting, healthy, stuck or down.",
            ["model", "gpu", "phase"], registry=registry,
        )  # fmt: skip
        self.discovered_replicas = Gauge(
            "penstock_discovered_replicas", "Replicas that Kubernetes tells of, healthy or not.",
            ["model", "gpu", "profile"], registry=registry,
        )  # fmt: skip
        self.discovery_refused = Gauge(
            "penstock_discovery_refused", "EndpointSlices and endpoints that are left out, as the log says.",
            registry=registry,
        )  # fmt: skip
        self.discovery_age = Gauge(
            "penstock_discovery_age_seconds",
            "Time since the Kubernetes API was last heard of; it says something every minute.", registry=registry,
        )  # fmt: skip
        self.discovery_failures = Counter(
            "penstock_discovery_failures", "Lists and watches that failed or broke, and were begun anew.",
            registry=registry,
        )  # fmt: skip
        self.epoch = Gauge("penstock_epoch", "Epoch of the limits in force.", registry=registry)
        self.waiting = Gauge("penstock_changes_waiting", "Changes that wait for approval.", registry=registry)
        self.unaudited = Gauge(
            "penstock_epochs_unaudited", "Epochs published and not yet, or never, in the audit log.", registry=registry
        )
        self.failed_rounds = Counter(
            "penstock_failed_rounds", "Rounds that could not publish the limits.", registry=registry
        )

    def leads(self) -> None:
        """It leads from now on."""
        self.leader.set(1)
        self.leader_changes.inc()
        self.health.leads()

    def stands_by(self) -> None:
        """It leads no longer; what it told of is the next one's to tell."""
        self.leader.set(0)
        self.leader_changes.inc()
        self.health.stands_by()
        self._forget_pools()
        for of_fleet in (self.fleet_replicas, self.replica_adds, self.watched_replicas, self.discovered_replicas):
            of_fleet.clear()
        for gauge in (self.epoch, self.waiting, self.unaudited, self.discovery_refused, self.discovery_age):
            gauge.set(0)

    def round_ended(self, good: bool) -> None:
        """A round has ended, and could publish what it had to or not."""
        self.failed_rounds.inc(0 if good else 1)
        self.health.round_ended(good)

    def _forget_pools(self) -> None:
        for gauge in (self.trim, self.active_keys, self.replicas, self.usable):
            gauge.clear()

    def published(self, publication: Publication, trims: Mapping[str, Trim]) -> None:
        """These limits are in force, from supplies so trimmed."""
        self._forget_pools()
        self.epoch.set(publication.epoch)
        for pool in publication.pools:
            self.replicas.labels(pool.model).set(len(pool.replicas))
            self.usable.labels(pool.model).set(pool.usable_requests_per_s)
            self.trim.labels(pool.model).set(trims[pool.model].factor if pool.model in trims else 1.0)
        for tier in publication.tiers:
            self.active_keys.labels(tier.tier, tier.model).set(tier.active_keys)

    def supplied(self, supplies: Iterable[GpuSupply]) -> None:
        """These replicas make up the limits in force."""
        self.fleet_replicas.clear()
        self.replica_adds.clear()
        for each in supplies:
            self.fleet_replicas.labels(each.model, each.gpu).set(each.replicas)
            self.replica_adds.labels(each.model, each.gpu).set(each.adds_requests_per_s)

    def discovered(self, state: DiscoveryState) -> None:
        """Kubernetes tells of these replicas."""
        self.discovered_replicas.clear()
        for labels, count in state.replicas.items():
            self.discovered_replicas.labels(*labels).set(count)
        self.discovery_refused.set(state.refused)
        self.discovery_age.set(state.age_s)
        self.discovery_failures.inc(state.failed_since)

    def watched(self, statuses: Iterable[ReplicaStatus]) -> None:
        """The replicas that are watched have this health."""
        self.watched_replicas.clear()
        tally = Tally((status.spec.model, status.spec.gpu, status.health.phase) for status in statuses)
        for labels, count in tally.items():
            self.watched_replicas.labels(*labels).set(count)


async def serve_metrics(metrics: ControllerMetrics, host: str, port: int | None) -> None:
    """Show ``/metrics``, ``/health`` and ``/live`` until cancelled; nothing without a port.

    A port that is taken is said once, and tried again.
    """

    async def show(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def ready(_request: web.Request) -> web.Response:
        return _probed("ready", metrics.health.unready())

    async def live(_request: web.Request) -> web.Response:
        return _probed("live", metrics.health.stuck())

    app = web.Application()
    app.router.add_get("/metrics", show)
    app.router.add_get("/health", ready)
    app.router.add_get("/live", live)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        if port is not None:
            await _listen(runner, host, port)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _probed(what: str, fault: str) -> web.Response:
    told = {what: not fault, **({"why": fault} if fault else {})}
    return web.json_response(told, status=503 if fault else 200)


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
