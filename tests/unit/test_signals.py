from __future__ import annotations

import math

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving import signals
from serving.signals import Counters, between, read_counters

TTFT_EDGES = (0.25, 0.5, 1.0, 2.5)


class FakeVllm:
    """The metrics that are read, as the library that vLLM uses writes them, of several engines."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["model_name", "engine"]
        self.ttft = Histogram(signals.TTFT_METRIC, "", labels, buckets=TTFT_EDGES, registry=self.registry)
        self.tpot = Histogram(signals.TPOT_METRIC, "", labels, buckets=(0.025, 0.05, 0.1), registry=self.registry)
        self.outputs = Histogram(
            "vllm:request_generation_tokens", "", labels, buckets=(10, 100), registry=self.registry
        )
        self.prompt = Counter("vllm:prompt_tokens", "", labels, registry=self.registry)
        self.hits = Counter("vllm:prefix_cache_hits", "", labels, registry=self.registry)
        self.finished = Counter("vllm:request_success", "", [*labels, "finished_reason"], registry=self.registry)
        self.rejected = Counter("vllm:admission_rejections", "", ["reason"], registry=self.registry)
        self.running = Gauge("vllm:num_requests_running", "", labels, registry=self.registry)
        self.waiting = Gauge("vllm:num_requests_waiting", "", labels, registry=self.registry)
        for engine in "01":  # vLLM makes the children at its start
            for metric in (self.ttft, self.tpot, self.outputs, self.prompt, self.hits, self.running, self.waiting):
                metric.labels("m", engine)

    def serve(self, ttft_s: float, prompt: int, cached: int, output: int, tpot_s: float, engine: str = "0") -> None:
        self.ttft.labels("m", engine).observe(ttft_s)
        self.tpot.labels("m", engine).observe(tpot_s)
        self.outputs.labels("m", engine).observe(output)
        self.prompt.labels("m", engine).inc(prompt)
        self.hits.labels("m", engine).inc(cached)
        self.finished.labels("m", engine, "stop").inc()

    def read(self, at_s: float) -> Counters:
        counters = read_counters(generate_latest(self.registry).decode(), at_s)
        assert counters is not None
        return counters


def test_what_happened_between_two_readings_is_summed_over_engines() -> None:
    """A replica of two data-parallel engines is one replica: counts, lengths and queues of both."""
    vllm = FakeVllm()
    vllm.serve(0.1, 1000, 0, 500, 0.01)
    before = vllm.read(10.0)
    vllm.serve(0.4, 100, 20, 10, 0.03)
    vllm.serve(3.0, 300, 40, 30, 0.2, engine="1")
    vllm.running.labels("m", "0").set(4)
    vllm.waiting.labels("m", "1").set(6)
    vllm.rejected.labels("max_num_queued_reqs").inc(2)

    done = between(before, vllm.read(25.0))

    assert done is not None
    assert (done.duration_s, done.started, done.arrivals, done.waiting, done.refused) == (15, 2, 2 + 4 + 6, 6, 2)
    assert (done.mean_prompt_tokens, done.mean_cached_tokens, done.mean_output_tokens) == (200, 30, 20)
    assert (done.ttft.beyond(0.5), done.ttft.beyond(2.5), done.tpot.beyond(0.05)) == (1, 1, 1)


def test_a_request_counts_as_late_only_for_certain() -> None:
    """Of a bound between two edges the requests in that bucket may have met it, so they are left out."""
    vllm = FakeVllm()
    before = vllm.read(0.0)
    for ttft_s in (0.6, 0.9, 2.0, 100.0):
        vllm.serve(ttft_s, 10, 0, 10, 0.01)
    done = between(before, vllm.read(1.0))
    assert done is not None

    assert [done.ttft.beyond(bound) for bound in (0.5, 0.55, 1.0, 1.2, 2.5, 50.0)] == [4, 2, 2, 1, 1, 0]


def test_an_engine_that_started_anew_is_not_compared_with_the_one_before() -> None:
    """Counters that fell are another engine's; nothing is known of the window."""
    old, new = FakeVllm(), FakeVllm()
    old.serve(0.1, 10, 0, 10, 0.01)

    assert between(old.read(0.0), new.read(1.0)) is None


def test_a_reading_that_did_not_change_its_time_says_nothing() -> None:
    """A replica whose metrics were not read again in the window has no window."""
    vllm = FakeVllm()

    assert between(vllm.read(1.0), vllm.read(1.0)) is None


@pytest.mark.parametrize("exposition", ["", "vllm:num_requests_running 3\n", "<html>not metrics</html>"])
def test_metrics_without_a_histogram_of_ttft_say_nothing(exposition: str) -> None:
    """A server that is not vLLM's, or one without statistics, is no evidence."""
    assert read_counters(exposition, 0.0) is None


def test_values_that_are_not_finite_say_nothing() -> None:
    """A NaN would spread into every sum; it is left out with its whole reading."""
    vllm = FakeVllm()
    vllm.waiting.labels("m", "0").set(math.nan)

    assert read_counters(generate_latest(vllm.registry).decode(), 0.0) is None


def test_a_value_that_is_no_number_is_refused() -> None:
    """A damaged exposition is an error of the probe, not a zero."""
    with pytest.raises(ValueError, match="could not convert"):
        read_counters("vllm:num_requests_running three\n", 0.0)


def test_every_field_that_is_summed_is_one_of_the_reading() -> None:
    """The table of names and the value they fill do not drift apart."""
    assert set(signals._SUMS.values()) <= {field.name for field in msgspec.structs.fields(Counters)}
