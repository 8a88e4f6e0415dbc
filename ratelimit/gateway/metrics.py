"""The gateway's own metrics, in a registry of their own: one process, one event loop, one registry.

What is held and what becomes of it can be balanced, by model, tier and kind of token, as far as this process knows:

    held + overrun = settled + refunded + expired + what is open

Labels take only values that the operator controls (routes, models, tiers, statuses, buckets), so that no caller can
make the number of series grow; what a caller typed is never a label.
"""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ratelimit.gateway.demand import Outcome
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
        self.tokens = Counter("penstock_tokens", "Tokens used.", [*tenant, "kind"], registry=registry)
        self.held = Counter("penstock_held_tokens", "Tokens held at admission.", [*tenant, "kind"], registry=registry)
        self.settled = Counter(
            "penstock_settled_tokens", "Tokens charged in the end.", [*tenant, "kind"], registry=registry
        )
        self.refunded = Counter(
            "penstock_refunded_tokens", "Tokens held and not used.", [*tenant, "kind"], registry=registry
        )
        self.overrun = Counter(
            "penstock_overrun_tokens", "Tokens used beyond what was held.", [*tenant, "kind"], registry=registry
        )
        self.expired = Counter(
            "penstock_expired_tokens", "Tokens held by reservations left to end with their leases.",
            [*tenant, "kind"], registry=registry,
        )  # fmt: skip
        self.denials = Counter(
            "penstock_denials", "Requests refused, by the bucket that bound.", [*tenant, "bucket"], registry=registry
        )
        self.shadow_denials = Counter(
            "penstock_shadow_denials", "Requests served that were to be refused but for their shadow mode, by bucket.",
            [*tenant, "bucket"], registry=registry,
        )  # fmt: skip
        self.cached_denials = Counter(
            "penstock_cached_denials",
            "Requests refused from memory, without asking the store.",
            tenant,
            registry=registry,
        )
        self.demand = Counter(
            "penstock_offered_mix_requests",
            "Demand, served or not, in requests of the pool's mix; retries that say so count apart, where served.",
            [*tenant, "outcome"], registry=registry,
        )  # fmt: skip
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
        self.impossible_usage = Counter(
            "penstock_impossible_usage", "Reports of more tokens than a request can have, or of fewer than none.",
            ["model"], registry=registry,
        )  # fmt: skip
        self.broken_streams = Counter(
            "penstock_broken_streams", "Streams ended by an error event.", ["model", "reason"], registry=registry
        )
        self.store_errors = Counter(
            "penstock_store_errors", "Calls to the store that failed.", ["operation"], registry=registry
        )
        self.unsettled = Counter(
            "penstock_unsettled", "Reservations left to end with their leases.", ["reason"], registry=registry
        )
        self.renewal_faults = Counter(
            "penstock_renewal_faults", "Looks at an open request that failed.", registry=registry
        )
        self.store_away = Gauge(
            "penstock_store_away", "1 while a cell's store is away and this gateway decides alone.", ["cell"],
            registry=registry,
        )  # fmt: skip
        self.outages = Counter("penstock_outages", "Times a cell's store went away.", ["cell"], registry=registry)
        self.local_decisions = Counter(
            "penstock_local_decisions", "Requests decided while the store was away.", [*tenant, "answer"],
            registry=registry,
        )  # fmt: skip
        self.local_bound = Gauge(
            "penstock_local_bound", "The most that this gateway admits of a tier's limits while the store is away: "
            "a minute, and at once (all its keys together).", [*tenant, "name", "per"], registry=registry,
        )  # fmt: skip
        self.owed_buckets = Gauge(
            "penstock_owed_buckets", "Buckets with use that waits for the store to be charged.", ["cell"],
            registry=registry,
        )  # fmt: skip
        self.lost = Counter(
            "penstock_lost", "What could not be told to the store: debts of a bucket, usage records.", ["what"],
            registry=registry,
        )  # fmt: skip
        self.gateways = Gauge("penstock_gateways", "Live gateways, as last counted; 0: never.", registry=registry)
        self.directory_errors = Counter(
            "penstock_directory_errors", "Failed reads of the publication or the keys.", ["what"], registry=registry
        )
        self.open_requests = Gauge("penstock_open_requests", "Requests being served.", registry=registry)
        self.epoch = Gauge("penstock_epoch", "Epoch of the limits in force.", registry=registry)
        self.capacity = Gauge(
            "penstock_capacity_per_second", "What a pool can serve under its SLO.", ["model", "unit"], registry=registry
        )
        self.replicas = Gauge("penstock_replicas", "Replicas that take requests.", ["model"], registry=registry)
        self.assured = Gauge(
            "penstock_tier_assured", "1 where a tier is promised a share of a model, 0 where it takes what is left.",
            tenant, registry=registry,
        )  # fmt: skip
        self.limits = Gauge(
            "penstock_limit", "Limit of one key: a minute, or in flight.", [*tenant, "name"], registry=registry
        )
        self.keys = Gauge("penstock_keys", "API keys known.", registry=registry)
        # A counter that is first seen at 1 has not grown, as Prometheus sees it: those to alert on are shown from 0 on.
        for counter, values in (
            (self.unsettled, ("store away", "too many")),
            (self.lost, ("debt", "record")),
            (self.directory_errors, ("publication", "keys", "key", "redis", "announcements", "presence", "activity")),
        ):
            for value in values:
                counter.labels(value)
        # Looking a child up by its labels costs a lock and a tuple of strings each time.
        self._request_child = lru_cache(4096)(self.requests.labels)
        self._counted: set[tuple[str, str]] = set()  # models and tiers whose demand is shown
        self._demand_child = lru_cache(4096)(self.demand.labels)
        self._hold_child = lru_cache(1024)(self.hold_error.labels)
        self._tokens_child = lru_cache(4096)(self.tokens.labels)
        self._balance = {name: lru_cache(4096)(c.labels) for name, c in self._balanced()}
        self.upstream_latency_of = lru_cache(1024)(self.upstream_latency.labels)
        self.added_latency_of = lru_cache(1024)(self.added_latency.labels)

    def _balanced(self) -> tuple[tuple[str, Counter], ...]:
        return (
            ("held", self.held),
            ("settled", self.settled),
            ("refunded", self.refunded),
            ("overrun", self.overrun),
            ("expired", self.expired),
        )

    def finished(self, route: str, model: str, tier: str, status: int) -> None:
        """A request got its answer."""
        self._request_child(route, model, tier, str(status)).inc()

    def offered(self, model: str, tier: str, outcome: Outcome, mix_requests: float) -> None:
        """A request asked for this much of what the pool can serve."""
        self._demand_child(model, tier, outcome).inc(mix_requests)

    def denied(self, model: str, tier: str, bucket: str) -> None:
        """A request was refused for want of room or capacity."""
        self.denials.labels(model, tier, bucket).inc()

    def reserved(self, model: str, tier: str, held: Usage) -> None:
        """A request was admitted, and this is held for it."""
        self._count("held", model, tier, held.input_tokens, held.output_tokens)

    def used(self, model: str, tier: str, used: Usage, held: Usage) -> None:
        """A request's true usage is known."""
        self._tokens_child(model, tier, "input").inc(used.input_tokens)
        self._tokens_child(model, tier, "cached_input").inc(used.cached_tokens)
        self._tokens_child(model, tier, "output").inc(used.output_tokens)
        self._hold_child(model, "input").observe(held.prompt_tokens - used.prompt_tokens)
        self._hold_child(model, "output").observe(held.output_tokens - used.output_tokens)

    def charged(self, model: str, tier: str, used: Usage, held: Usage) -> None:
        """What was held is corrected to what was used."""
        self._count("settled", model, tier, used.input_tokens, used.output_tokens)
        inputs, outputs = used.input_tokens - held.input_tokens, used.output_tokens - held.output_tokens
        self._count("overrun", model, tier, max(0, inputs), max(0, outputs))
        self._count("refunded", model, tier, max(0, -inputs), max(0, -outputs))

    def left_to_lease(self, model: str, tier: str, held: Usage) -> None:
        """A reservation ends with its lease, and nothing more is known of it."""
        self._count("expired", model, tier, held.input_tokens, held.output_tokens)

    def _count(self, what: str, model: str, tier: str, input_tokens: int, output_tokens: int) -> None:
        child = self._balance[what]
        if input_tokens:
            child(model, tier, "input").inc(input_tokens)
        if output_tokens:
            child(model, tier, "output").inc(output_tokens)

    def published(self, publication: Publication) -> None:
        """Other limits are in force."""
        self.epoch.set(publication.epoch)
        for gauge in (self.capacity, self.replicas, self.limits, self.assured):
            gauge.clear()
        for pool in publication.pools:
            self.impossible_usage.labels(pool.model)
            self.replicas.labels(pool.model).set(len(pool.replicas))
            self.capacity.labels(pool.model, "requests").set(pool.usable_requests_per_s)
            self.capacity.labels(pool.model, "input_tokens").set(pool.usable_input_tokens_per_s)
            self.capacity.labels(pool.model, "output_tokens").set(pool.usable_output_tokens_per_s)
        for terms in publication.tiers:
            self.assured.labels(terms.model, terms.tier).set(terms.assured)
            if (terms.model, terms.tier) not in self._counted:
                self._counted.add((terms.model, terms.tier))
                for outcome in get_args(Outcome):
                    self.demand.labels(terms.model, terms.tier, outcome)
            for limit in terms.limits:
                self.limits.labels(terms.model, terms.tier, limit.name).set(limit.per_minute or limit.burst)
