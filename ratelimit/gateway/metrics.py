"""The gateway's own metrics, in a registry of their own: one process, one event loop, one registry.

Labels take only values that the operator controls (routes, models, tiers, statuses, buckets), so that no caller can
make the number of series grow; what a caller typed is never a label.
"""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ratelimit.gateway.hold import Usage
from ratelimit.publication import Publication

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ADDED_BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_HOLD_ERROR_BUCKETS = (-4096, -1024, -256, -64, -16, 0, 16, 64, 256, 1024, 4096, 16384)


class GatewayMetrics:
    """Counters, histograms and gauges, with what to do when something happens as methods."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        tenant = ["model", "tier"]
        self.requests = Counter(
            "penstock_requests", "Requests by their final status; 499: the client left.",
            ["route", *tenant, "status"], registry=registry,
        )  # fmt: skip
        self.tokens = Counter("penstock_tokens", "Tokens settled.", [*tenant, "kind"], registry=registry)
        self.denials = Counter(
            "penstock_denials", "Requests refused, by the bucket that bound.", [*tenant, "bucket"], registry=registry
        )
        self.hold_error = Histogram(
            "penstock_hold_error_tokens", "Tokens held at admission minus tokens used.", ["model", "kind"],
            buckets=_HOLD_ERROR_BUCKETS, registry=registry,
        )  # fmt: skip
        self.upstream_latency = Histogram(
            "penstock_upstream_first_byte_seconds", "From sending a request to a replica until its first byte.",
            ["model"], buckets=_LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.added_latency = Histogram(
            "penstock_added_latency_seconds", "From a request's last byte until it is sent to a replica.",
            ["model"], buckets=_ADDED_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.upstream_failures = Counter(
            "penstock_upstream_failures", "Attempts on a replica that failed.", ["model", "reason"], registry=registry
        )
        self.broken_streams = Counter(
            "penstock_broken_streams", "Streams ended by an error event.", ["model", "reason"], registry=registry
        )
        self.store_errors = Counter(
            "penstock_store_errors", "Calls to the store that failed.", ["operation"], registry=registry
        )
        self.unsettled = Counter(
            "penstock_unsettled", "Reservations left to end with their leases.", ["reason"], registry=registry
        )
        self.directory_errors = Counter(
            "penstock_directory_errors", "Failed reads of the publication or the keys.", ["what"], registry=registry
        )
        self.open_requests = Gauge("penstock_open_requests", "Requests being served.", registry=registry)
        self.epoch = Gauge("penstock_epoch", "Epoch of the limits in force.", registry=registry)
        self.capacity = Gauge(
            "penstock_capacity_per_second", "What a pool can serve under its SLO.", ["model", "unit"], registry=registry
        )
        self.replicas = Gauge("penstock_replicas", "Replicas that take requests.", ["model"], registry=registry)
        self.limits = Gauge(
            "penstock_limit", "Limit of one key: a minute, or in flight.", [*tenant, "name"], registry=registry
        )
        self.keys = Gauge("penstock_keys", "API keys known.", registry=registry)
        # Looking a child up by its labels costs a lock and a tuple of strings each time.
        self._request_child = lru_cache(4096)(self.requests.labels)
        self._tokens_child = lru_cache(4096)(self.tokens.labels)
        self._hold_child = lru_cache(1024)(self.hold_error.labels)
        self.upstream_latency_of = lru_cache(1024)(self.upstream_latency.labels)
        self.added_latency_of = lru_cache(1024)(self.added_latency.labels)

    def finished(self, route: str, model: str, tier: str, status: int) -> None:
        """A request got its answer."""
        self._request_child(route, model, tier, str(status)).inc()

    def denied(self, model: str, tier: str, bucket: str) -> None:
        """A request was refused for want of room or capacity."""
        self.denials.labels(model, tier, bucket).inc()

    def used(self, model: str, tier: str, used: Usage, held: Usage) -> None:
        """A request's true usage is known."""
        self._tokens_child(model, tier, "input").inc(used.input_tokens)
        self._tokens_child(model, tier, "cached_input").inc(used.cached_tokens)
        self._tokens_child(model, tier, "output").inc(used.output_tokens)
        self._hold_child(model, "input").observe(held.prompt_tokens - used.prompt_tokens)
        self._hold_child(model, "output").observe(held.output_tokens - used.output_tokens)

    def published(self, publication: Publication) -> None:
        """Other limits are in force."""
        self.epoch.set(publication.epoch)
        for gauge in (self.capacity, self.replicas, self.limits):
            gauge.clear()
        for pool in publication.pools:
            self.replicas.labels(pool.model).set(len(pool.replicas))
            self.capacity.labels(pool.model, "requests").set(pool.usable_requests_per_s)
            self.capacity.labels(pool.model, "input_tokens").set(pool.usable_input_tokens_per_s)
            self.capacity.labels(pool.model, "output_tokens").set(pool.usable_output_tokens_per_s)
        for terms in publication.tiers:
            for limit in terms.limits:
                self.limits.labels(terms.model, terms.tier, limit.name).set(limit.per_minute or limit.burst)
