from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from serving.capacity import (
    EngineLimits,
    InfeasibleSloError,
    ReplicaGroup,
    RequestShape,
    Slo,
    StepTimeModel,
    WorkloadMix,
    closed_form_requests_per_s,
    work_s,
)
from serving.mixes import load_mix
from serving.stepsim import Arrival, Knee, knee, percentile, poisson_arrivals, simulate

STEP_TIME = StepTimeModel(base_s=4e-3, prompt_token_s=2e-5, sequence_s=2.5e-5, kv_token_s=3e-8)
LIMITS = EngineLimits(max_num_seqs=256, max_num_batched_tokens=2048, kv_tokens=400_000, max_model_len=8192)
SLO = Slo(ttft_s=1.0, tpot_s=0.05)

shapes = st.builds(
    lambda inputs, cached, outputs: RequestShape(inputs, outputs, min(cached, inputs - 1)),
    st.integers(1, 90),
    st.integers(0, 40),
    st.integers(1, 40),
)
arrival_lists = st.lists(st.tuples(st.floats(0, 0.3), shapes), min_size=1, max_size=25).map(
    lambda pairs: [Arrival(time_s, shape) for time_s, shape in sorted(pairs, key=lambda pair: pair[0])]
)
tight_limits = st.builds(
    EngineLimits,
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(8, 64),
    kv_tokens=st.integers(160, 400),
    max_model_len=st.just(1000),
    block_size=st.sampled_from([1, 4, 16]),
)


class NaiveRequest:
    """A request of the reference below."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.todo = arrival.shape.input_tokens - arrival.shape.cached_tokens
        self.in_cache = 0
        self.blocks = 0
        self.emitted: list[float] = []

    @property
    def context(self) -> int:
        return self.arrival.shape.input_tokens + len(self.emitted)


class NaiveReplica:
    """The scheduler's rules token by token, without any of the simulator's shortcuts."""

    def __init__(self, limits: EngineLimits, arrivals: list[Arrival]) -> None:
        self.limits = limits
        self.future = [NaiveRequest(arrival) for arrival in arrivals]
        self.waiting: list[NaiveRequest] = []
        self.running: list[NaiveRequest] = []
        self.free = limits.kv_tokens // limits.block_size - 1  # vLLM's null block
        self.now_s = 0.0
        self.preemptions = 0

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def run(self) -> None:
        while self.future or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.now_s = max(self.now_s, self.future[0].arrival.time_s)
            while self.future and self.future[0].arrival.time_s <= self.now_s:
                self.waiting.append(self.future.pop(0))
            self.step()

    def step(self) -> None:
        before = self.preemptions
        for request in [r for r in self.running if r.todo == 0]:
            self.extend(request)
        decodes = [r for r in self.running if r.todo == 0]
        chunks = self.chunks(self.limits.max_num_batched_tokens - len(decodes), may_admit=self.preemptions == before)
        finishing = [r for r, chunk in chunks if chunk == r.todo]
        kv = sum(r.in_cache + 1 for r in decodes) + sum(r.context for r in finishing)
        self.now_s += STEP_TIME.step_s(sum(chunk for _, chunk in chunks), len(decodes) + len(finishing), kv)
        for request, chunk in chunks:
            request.todo -= chunk
        for request in decodes + finishing:
            request.in_cache = request.context
            request.emitted.append(self.now_s)
        for request in [r for r in self.running if len(r.emitted) == r.arrival.shape.output_tokens]:
            self.running.remove(request)
            self.free += request.blocks

    def extend(self, request: NaiveRequest) -> None:
        """A block for the next token, at the expense of the latest admitted, which may be the request itself."""
        while request in self.running and self.blocks(request.in_cache + 1) > request.blocks:
            if self.free:
                self.free -= 1
                request.blocks += 1
                continue
            victim = self.running.pop()
            self.free += victim.blocks
            victim.blocks, victim.in_cache, victim.todo = 0, 0, victim.context
            self.waiting.insert(0, victim)
            self.preemptions += 1

    def chunks(self, budget: int, may_admit: bool) -> list[tuple[NaiveRequest, int]]:
        queue = [r for r in self.running if r.todo]
        chunks: list[tuple[NaiveRequest, int]] = []
        while budget > 0 and (queue or (may_admit and self.admit(queue))):
            request = queue.pop(0)
            chunks.append((request, min(budget, request.todo)))
            budget -= chunks[-1][1]
        return chunks

    def admit(self, queue: list[NaiveRequest]) -> bool:
        if not self.waiting or len(self.running) >= self.limits.max_num_seqs:
            return False
        needed = self.blocks(self.waiting[0].context)
        if needed > self.free:
            return False
        self.free -= needed
        request = self.waiting.pop(0)
        request.blocks = needed
        self.running.append(request)
        queue.append(request)
        return True


@settings(max_examples=100, deadline=None)
@given(arrivals=arrival_lists, limits=tight_limits)
def test_equals_a_token_by_token_reference(arrivals: list[Arrival], limits: EngineLimits) -> None:
    """The event-driven shortcuts (runs of decodes, block phases, lazy heap) change no outcome, preemptions included."""
    reference = NaiveReplica(limits, arrivals)
    requests = list(reference.future)
    reference.run()
    event("preempted" if reference.preemptions else "never preempted")

    for outcome, request in zip(simulate(STEP_TIME, limits, arrivals), requests, strict=True):
        assert outcome.first_token_s == pytest.approx(request.emitted[0], rel=1e-9)
        assert outcome.finish_s == pytest.approx(request.emitted[-1], rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(arrivals=arrival_lists, limits=tight_limits)
def test_every_request_is_served_after_its_own_prefill(arrivals: list[Arrival], limits: EngineLimits) -> None:
    """Conservation: each arrival has one outcome, in order, no sooner than its own steps take."""
    outcomes = simulate(STEP_TIME, limits, arrivals)

    assert [(o.arrival_s, o.shape) for o in outcomes] == [tuple(a) for a in arrivals]
    for outcome in outcomes:
        prompt = outcome.shape.input_tokens - outcome.shape.cached_tokens
        steps = -(-prompt // limits.max_num_batched_tokens)
        assert outcome.ttft_s >= (steps * STEP_TIME.base_s + prompt * STEP_TIME.prompt_token_s) * (1 - 1e-9)
        assert outcome.finish_s >= outcome.first_token_s + (outcome.shape.output_tokens - 1) * STEP_TIME.base_s * 0.999


def test_a_lone_request_takes_its_work_and_its_steps() -> None:
    """The sum over a request's steps is the closed-form work, to half a KV token per output token."""
    shape = RequestShape(3000, 200)

    (outcome,) = simulate(STEP_TIME, LIMITS, [Arrival(1.0, shape)])

    steps = 2 + 199
    slack_s = STEP_TIME.kv_token_s * shape.output_tokens / 2
    assert outcome.finish_s - 1.0 == pytest.approx(
        steps * STEP_TIME.base_s + work_s(STEP_TIME, shape), abs=slack_s * 1.01
    )
    assert outcome.first_token_s - 1.0 == pytest.approx(
        2 * STEP_TIME.base_s + 3000 * STEP_TIME.prompt_token_s + STEP_TIME.sequence_s + 3000 * STEP_TIME.kv_token_s
    )


def test_a_request_that_can_never_run_is_refused() -> None:
    """Longer than the context, larger than the KV cache, or empty: a clear error instead of a hang."""
    with pytest.raises(ValueError, match="exceeds the 8192"):
        simulate(STEP_TIME, LIMITS, [Arrival(0, RequestShape(8000, 200))])
    with pytest.raises(ValueError, match="KV cache 99 tokens"):
        simulate(STEP_TIME, EngineLimits(1, 64, 99, 1000), [Arrival(0, RequestShape(90, 20))])
    with pytest.raises(ValueError, match="is no request"):
        simulate(STEP_TIME, LIMITS, [Arrival(0, RequestShape(10, 0))])


def test_poisson_arrivals_have_the_rate_and_are_reproducible() -> None:
    """Same seed, same arrivals; the count is that of the rate within four standard deviations."""
    mix = load_mix("chat", 0.125)

    arrivals = poisson_arrivals(mix, 50.0, 100.0, seed=3)

    assert arrivals == poisson_arrivals(mix, 50.0, 100.0, seed=3)
    assert arrivals != poisson_arrivals(mix, 50.0, 100.0, seed=4)
    assert abs(len(arrivals) - 5000) < 4 * 5000**0.5
    assert all(0 <= a.time_s <= b.time_s < 100 for a, b in pairwise(arrivals))


def test_load_slows_every_percentile_down() -> None:
    """Stretching the same arrivals to a higher rate never makes the mean TTFT or TPOT better."""
    unit = poisson_arrivals(load_mix("chat", 0.25), 1.0, 1500.0, seed=1)
    means = []
    for rate in (5.0, 20.0, 60.0, 120.0):
        outcomes = simulate(STEP_TIME, LIMITS, [Arrival(a.time_s / rate, a.shape) for a in unit])
        means.append((sum(o.ttft_s for o in outcomes) / len(outcomes), sum(o.tpot_s for o in outcomes) / len(outcomes)))

    assert all(low[0] < high[0] and low[1] < high[1] for low, high in pairwise(means))


@pytest.mark.parametrize("name", ["chat", "decode-heavy", "prefill-heavy"])
def test_the_knee_meets_the_slo_and_more_load_does_not(name: str) -> None:
    """At the knee both percentiles hold; 5 % more load misses one of them, on the same kind of arrivals."""
    mix = load_mix(name, 0.25)
    found = knee(STEP_TIME, LIMITS, mix, SLO)

    assert 0 < found.requests_per_s <= closed_form_requests_per_s(ReplicaGroup(1, STEP_TIME, LIMITS, SLO), mix)
    assert 0 < found.utilization <= 1
    assert found.ttft_s <= SLO.ttft_s
    assert found.tpot_s <= SLO.tpot_s
    assert _misses(mix, found.requests_per_s * 1.08)


def _misses(mix: WorkloadMix, rate: float) -> bool:
    outcomes = simulate(STEP_TIME, LIMITS, poisson_arrivals(mix, rate, 4000 / rate, seed=9))[800:]
    tpots = [o.tpot_s for o in outcomes if o.shape.output_tokens > 1]
    return percentile([o.ttft_s for o in outcomes], 95) > SLO.ttft_s or percentile(tpots, 95) > SLO.tpot_s


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_knee_depends_little_on_the_seed(seed: int) -> None:
    """Another sample of arrivals moves the knee by less than 3 %: the horizon is long enough."""
    mix = load_mix("chat", 0.125)

    reference = knee(STEP_TIME, LIMITS, mix, SLO)

    assert knee(STEP_TIME, LIMITS, mix, SLO, seed).requests_per_s == pytest.approx(reference.requests_per_s, rel=0.03)
    assert knee(STEP_TIME, LIMITS, mix, SLO) == reference


@settings(max_examples=5, deadline=None)
@given(factor=st.floats(1.5, 40))
def test_a_slower_device_has_a_slower_knee(factor: float) -> None:
    """Slowing the device and its SLO by f divides the knee by f and multiplies its latencies by f."""
    mix = load_mix("chat", 0.125)
    whole, slowed = knee(STEP_TIME, LIMITS, mix, SLO), knee(STEP_TIME.slowed(factor), LIMITS, mix, SLO.slowed(factor))

    assert slowed.requests_per_s * factor == pytest.approx(whole.requests_per_s, rel=0.01)
    assert slowed.tpot_s / factor == pytest.approx(whole.tpot_s, rel=0.01)
    assert slowed.bound == whole.bound


def test_a_tight_slo_names_the_bound_that_it_is_limited_by() -> None:
    """With hardly any queueing allowed TTFT binds; with an ample TTFT it is TPOT."""
    mix = load_mix("prefill-heavy", 0.25)

    assert knee(STEP_TIME, LIMITS, mix, Slo(0.06, 1.0)).bound == "ttft"
    assert knee(STEP_TIME, LIMITS, mix, Slo(10.0, 0.02)).bound == "tpot"


def test_a_tighter_slo_never_raises_the_knee() -> None:
    """Relaxing either bound can only help."""
    mix = load_mix("chat", 0.25)
    rates = [
        knee(STEP_TIME, LIMITS, mix, Slo(ttft, tpot)).requests_per_s
        for ttft, tpot in ((0.1, 0.01), (0.1, 0.02), (1, 0.02), (1, 0.1))
    ]

    assert all(low <= high * 1.01 for low, high in pairwise(rates))


def test_a_growing_queue_is_refused_whatever_the_slo() -> None:
    """With boundless latency allowed the knee is where the replica keeps up, not the highest rate tried."""
    slots = EngineLimits(max_num_seqs=8, max_num_batched_tokens=2048, kv_tokens=400_000, max_model_len=8192)
    mix = WorkloadMix("uniform", (RequestShape(100, 50),))

    found = knee(STEP_TIME, slots, mix, Slo(1e6, 1e6))

    keeps_up = 8 / simulate(STEP_TIME, slots, [Arrival(0.0, mix.shapes[0])] * 8)[0].finish_s
    assert found.requests_per_s == pytest.approx(keeps_up, rel=0.08)


@pytest.mark.parametrize(
    ("slo", "bound"), [(Slo(0.005, 1.0), "TTFT"), (Slo(1.0, 0.00401), "TPOT"), (Slo(1.0, 0.003), "TPOT")]
)
def test_an_slo_that_no_load_meets_is_infeasible(slo: Slo, bound: str) -> None:
    """Not a knee of 0: an error that names the bound."""
    with pytest.raises(InfeasibleSloError, match=bound):
        knee(STEP_TIME, LIMITS, load_mix("chat", 0.25), slo)


def test_a_mix_that_does_not_fit_is_infeasible() -> None:
    """One request beyond the context makes the knee undefined, and the message says which."""
    with pytest.raises(
        InfeasibleSloError, match=r"long-context cannot be served: a request of \d+ \+ \d+ tokens exceeds"
    ):
        knee(STEP_TIME, LIMITS, load_mix("long-context"), SLO)


def test_answers_of_one_token_have_no_tpot() -> None:
    """A mix of single-token answers is bounded by TTFT alone."""
    found: Knee = knee(STEP_TIME, LIMITS, WorkloadMix("classify", (RequestShape(200, 1),)), SLO)

    assert found.tpot_s == 0
    assert found.requests_per_s > 0


def test_percentile_is_a_value_that_so_many_do_not_exceed() -> None:
    """The 95th of 1..100 is 95: no interpolation, so "met by 95 %" is literally true."""
    assert percentile(list(range(1, 101)), 95) == 95
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 95) == 0.0


def test_one_block_of_the_kv_cache_is_not_for_requests() -> None:
    """Of all blocks vLLM keeps one for itself (seen on a virtual GPU): what needs all of them never runs."""
    limits = EngineLimits(max_num_seqs=4, max_num_batched_tokens=64, kv_tokens=160, max_model_len=1000)
    assert simulate(STEP_TIME, limits, [Arrival(0.0, RequestShape(134, 10))])[0].finish_s > 0
    with pytest.raises(ValueError, match="exceeds the 144"):
        simulate(STEP_TIME, limits, [Arrival(0.0, RequestShape(135, 10))])
