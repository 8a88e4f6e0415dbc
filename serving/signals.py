"""What a vLLM server's metrics say of its speed: counters as they stand, and what happened between two readings. Pure.

vLLM's histograms have fixed buckets. A request in the bucket that a bound falls into may be on either side of it, so
only those above the next edge count as late: with a bound between two edges, lateness is seen later, never wrongly.
"""

from __future__ import annotations

import re
from collections import defaultdict
from math import inf, isfinite

import msgspec

TTFT_METRIC = "vllm:time_to_first_token_seconds"
TPOT_METRIC = "vllm:request_time_per_output_token_seconds"

_HISTOGRAMS = {TTFT_METRIC: "ttft", TPOT_METRIC: "tpot"}
#: What is summed over engines and other labels, by the name of a field of ``Counters``.
_SUMS = {
    "vllm:request_success_total": "finished",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:prefix_cache_hits_total": "cached_tokens",
    "vllm:request_generation_tokens_sum": "output_tokens",
    "vllm:request_generation_tokens_count": "outputs",
    "vllm:admission_rejections_total": "refused",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
}
_PREFIXES = tuple(f"{name}{end}" for name in _SUMS for end in ("{", " ")) + tuple(f"{n}_bucket{{" for n in _HISTOGRAMS)
_EDGE = re.compile(r'le="([^"]+)"')


class Histogram(msgspec.Struct, frozen=True):
    """Per upper edge of its buckets, in seconds and rising to infinity, how many were no longer."""

    edges: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        """How many there were."""
        return self.counts[-1] if self.counts else 0.0

    def beyond(self, bound_s: float) -> float:
        """How many took longer than the bound for certain."""
        within = next((count for edge, count in zip(self.edges, self.counts, strict=True) if edge >= bound_s), 0.0)
        return self.total - within

    def since(self, before: Histogram) -> Histogram:
        """What came after an earlier reading; all of it, where the buckets are others."""
        if before.edges != self.edges:
            return self
        return Histogram(self.edges, tuple(now - then for now, then in zip(self.counts, before.counts, strict=True)))


class Counters(msgspec.Struct, frozen=True):
    """One reading at ``at_s``: counts since the engine's start, and the requests ``running`` and ``waiting`` now.

    ``outputs`` requests that ended had ``output_tokens``. ``refused``: turned away at the engine's queue bound.
    """

    at_s: float
    finished: float = 0.0
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    output_tokens: float = 0.0
    outputs: float = 0.0
    refused: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    ttft: Histogram = Histogram()
    tpot: Histogram = Histogram()


class Activity(msgspec.Struct, frozen=True):
    """What a replica did in ``duration_s``, and the requests ``waiting`` at the end.

    ``started`` requests got their first token. The means are 0 where nothing is known of them.
    """

    duration_s: float
    arrivals: float
    started: float
    refused: float
    waiting: float
    mean_prompt_tokens: float
    mean_cached_tokens: float
    mean_output_tokens: float
    ttft: Histogram
    tpot: Histogram


def read_counters(exposition: str, at_s: float) -> Counters | None:
    """The reading in a Prometheus text exposition; None where nothing is known by it.

    That is where it has no histogram of TTFT, or a value is not finite. Raises ``ValueError`` where one is no number.
    """
    sums: dict[str, float] = defaultdict(float)
    buckets: dict[str, dict[float, float]] = {field: defaultdict(float) for field in _HISTOGRAMS.values()}
    for line in exposition.splitlines():
        if not line.startswith(_PREFIXES):
            continue
        series, _, value = line.rpartition(" ")
        name, _, labels = series.partition("{")
        if name in _SUMS:
            sums[_SUMS[name]] += float(value)
        elif edge := _EDGE.search(labels):
            buckets[_HISTOGRAMS[name.removesuffix("_bucket")]][float(edge[1])] += float(value)
    values = [*sums.values(), *(count for counts in buckets.values() for count in counts.values())]
    if inf not in buckets["ttft"] or not all(map(isfinite, values)):
        return None
    return Counters(at_s, **sums, **{field: _histogram(counts) for field, counts in buckets.items()})  # type: ignore[arg-type]  # the names above are the struct's


def between(before: Counters, now: Counters) -> Activity | None:
    """What happened between two readings of one engine; None where it was another one, or no time passed."""
    ttft, tpot = now.ttft.since(before.ttft), now.tpot.since(before.tpot)
    finished, prompt_tokens = now.finished - before.finished, now.prompt_tokens - before.prompt_tokens
    if now.at_s <= before.at_s or min(finished, prompt_tokens, now.refused - before.refused, *ttft.counts) < 0:
        return None
    held = now.running + now.waiting - before.running - before.waiting
    started, outputs = ttft.total, now.outputs - before.outputs
    return Activity(
        duration_s=now.at_s - before.at_s,
        arrivals=max(0.0, finished + held),
        started=started,
        refused=now.refused - before.refused,
        waiting=now.waiting,
        mean_prompt_tokens=prompt_tokens / started if started else 0.0,
        mean_cached_tokens=max(0.0, now.cached_tokens - before.cached_tokens) / started if started else 0.0,
        mean_output_tokens=(now.output_tokens - before.output_tokens) / outputs if outputs > 0 else 0.0,
        ttft=ttft,
        tpot=tpot,
    )


def _histogram(counts: dict[float, float]) -> Histogram:
    edges = tuple(sorted(counts))
    return Histogram(edges, tuple(counts[edge] for edge in edges))
