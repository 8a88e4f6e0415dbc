from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.feedback import (
    CUT,
    LEAST_FACTOR,
    MEMORY_S,
    MOST_CUT,
    MOST_MEMORY_S,
    SETTLE_S,
    Feedback,
    LateShare,
    Seen,
    Signals,
    after,
)
from serving.batching import BatchingReplica, SimulatedRequest
from serving.capacity import EngineLimits, Slo, StepTimeModel, WorkloadMix
from serving.mixes import load_mix
from serving.profile import load_profile
from serving.stepsim import knee

WINDOW_S = 15.0
PROFILE = load_profile("h100-llama-3.1-8b")
CHAT = load_mix("chat", 1.0)


def window(
    offered: float = 0.9, late: float = 0.0, waiting_s: float = 0.0, refused: float = 0, seen: float = 300
) -> Signals:
    """A quarter of a minute of 300 requests; ``late`` is the share beyond the TTFT bound of 1 s."""
    return Signals(
        duration_s=WINDOW_S,
        offered=offered,
        served=min(offered, 0.7) if waiting_s else offered,
        arrivals=seen,
        ttft=LateShare("TTFT", 1.0, seen, late * seen),
        tpot=LateShare("TPOT", 0.05, seen, 0.0),
        may_be_late=0.05,
        waiting_s=waiting_s,
        refused=refused,
    )


def fed(state: Feedback, windows: list[Signals]) -> Feedback:
    for each in windows:
        state = after(state, each)
    return state


def test_requests_that_are_late_at_a_load_the_profile_carries_trim_the_supply() -> None:
    """A fleet that misses its TTFT bound though no more was asked than it was measured at does less: a bounded cut."""
    state = fed(Feedback(), [window(late=0.9)] * 12)

    assert state.factor == pytest.approx(1 - CUT)
    assert "90% of" in state.reason
    assert "TTFT bound of 1 s" in state.reason
    assert "90% of the measured supply was taken in" in state.reason


def test_a_queue_that_grows_cuts_at_once_to_what_is_served_but_by_a_bounded_step() -> None:
    """Where work waits, what is served is all the fleet can do; two windows suffice to see it."""
    state = fed(Feedback(), [window(waiting_s=4.0), window(waiting_s=9.0)])

    assert state.factor == pytest.approx(1 - MOST_CUT)
    assert "needs 9 s to be started" in state.reason


def test_refusals_of_replicas_trim_the_supply() -> None:
    """A replica with a bound on its queue answers 503 where others would queue; that counts as much."""
    state = fed(Feedback(), [window(refused=15)] * 12)

    assert state.factor < 1
    assert "503" in state.reason


@pytest.mark.parametrize("offered", [1.0, 1.05, 1.5])
def test_no_backlog_is_made_up_where_queues_are_full(offered: float) -> None:
    """A fleet that serves 0.7 and refuses is slow, though the estimate of what it took in stays above its supply."""
    signals = msgspec.structs.replace(window(offered, late=0.6, waiting_s=0.9, refused=60), served=0.7)

    assert fed(Feedback(), [signals] * 240).factor == LEAST_FACTOR


@pytest.mark.parametrize(
    "signals",
    [
        window(offered=1.5, late=1.0),
        window(offered=1.5, waiting_s=30.0),
        window(offered=1.0, late=0.6, refused=60),  # served in full, and more was asked
    ],
)
def test_an_overload_by_others_is_not_blamed_on_the_fleet(signals: Signals) -> None:
    """Where more is asked than was measured, a fleet that does all of its profile is late too."""
    assert fed(Feedback(), [signals] * 100).factor == 1


def test_the_backlog_of_an_overload_is_not_blamed_on_the_fleet_either() -> None:
    """After ten minutes at twice the supply a good fleet needs long to work off what waits."""
    overloaded = fed(Feedback(), [window(offered=2.0, waiting_s=10.0 * n) for n in range(1, 41)])

    assert fed(overloaded, [window(offered=0.9, late=1.0, waiting_s=400.0)] * 20).factor == 1


def test_a_queue_that_shrinks_after_a_cut_is_let_go() -> None:
    """The factor suffices when what waits gets less; a second cut would only overshoot."""
    cut = fed(Feedback(), [window(waiting_s=4.0), window(waiting_s=20.0)])

    drained = fed(cut, [window(offered=0.8, late=1.0, waiting_s=20.0 - n) for n in range(16)])

    assert drained.factor == cut.factor


def test_a_cut_is_given_time_to_take_effect() -> None:
    """Requests admitted before the cut are late still; they say nothing of the factor after it."""
    cut = fed(Feedback(), [window(waiting_s=4.0), window(waiting_s=20.0)])

    settling = fed(cut, [window(late=1.0, waiting_s=20.0 + 10 * n) for n in range(int(SETTLE_S / WINDOW_S))])

    assert settling.factor == cut.factor


def test_no_signals_change_nothing() -> None:
    """A lost metrics endpoint is no evidence: neither a cut, nor a recovery, nor the passing of time."""
    cut = fed(Feedback(), [window(late=0.9)] * 12)

    assert after(cut, None) == cut


def test_few_requests_are_no_evidence() -> None:
    """Three late ones of four do not make a slow fleet."""
    assert fed(Feedback(), [window(late=0.75, seen=0.5)] * 8).factor == 1


def test_a_fleet_that_is_well_again_gets_all_of_its_supply_back_slowly() -> None:
    """It recovers below where it was cut at first, and beyond it when that is no longer remembered."""
    cut = fed(Feedback(), [window(late=0.9)] * 12)
    steps = [cut.factor]
    state = cut
    for _ in range(400):
        state = after(state, window())
        steps.append(state.factor)

    assert max(steps[: int(MEMORY_S / WINDOW_S) - 10]) < 1
    assert steps[-1] == 1
    assert steps == sorted(steps)
    assert state.reason == ""


@pytest.mark.parametrize("idle", [window(offered=0.0, seen=0), window(offered=0.1, seen=30)])
def test_an_idle_night_gives_nothing_back(idle: Signals) -> None:
    """A fleet that has next to nothing to do meets its SLO however slow it is: the trim is there in the morning."""
    trimmed = fed(Feedback(), [window(offered=0.6, late=0.9)] * 200)
    assert trimmed.factor == LEAST_FACTOR

    after_the_night = fed(trimmed, [idle] * 2000)

    assert (after_the_night.factor, after_the_night.memory_left_s) == (LEAST_FACTOR, trimmed.memory_left_s)
    assert fed(after_the_night, [window(offered=0.5)] * 60).factor > LEAST_FACTOR


def test_a_pool_that_may_never_be_asked_for_all_gets_its_supply_back_too() -> None:
    """With a spare for each replica callers use half: that they met the SLO there says as much as that they missed."""
    trimmed = fed(Feedback(), [window(offered=0.5, late=0.9)] * 12)
    state = trimmed
    for _ in range(800):
        state = after(state, window(offered=0.5 * state.factor))

    assert trimmed.factor < 1
    assert state.factor == 1


def test_a_factor_missed_again_is_remembered_for_longer_and_not_for_ever() -> None:
    """A fleet that stays slow is tried more and more seldom, but always again."""
    state, memories = Feedback(), []
    for _ in range(8):
        state = fed(state, [window(late=0.9)] * 12)
        memories.append(state.memory_s)
        state = msgspec.structs.replace(state, memory_left_s=0.0, settling_s=0.0, factor=1.0)

    assert memories[:3] == [MEMORY_S, 2 * MEMORY_S, 4 * MEMORY_S]
    assert memories[-1] == MOST_MEMORY_S


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0.49},
        {"factor": 1.01},
        {"missed_at": 0.2},
        {"seen": (Seen(),)},
        {"settling_s": -1.0},
        {"grown": -1},
        {"backlog_s": float("nan")},
    ],
)
def test_a_state_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    """It comes from a file; with such a state every later round would fail."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Feedback(**wrong)


@given(
    st.lists(
        st.builds(
            window,
            offered=st.floats(0, 3),
            late=st.floats(0, 1),
            waiting_s=st.floats(0, 100),
            refused=st.floats(0, 100),
            seen=st.floats(0, 1000),
        ),
        max_size=60,
    )
)
def test_the_factor_stays_in_its_range_and_moves_in_bounded_steps(windows: list[Signals]) -> None:
    """Whatever is seen, supply is never trimmed below half, never above 1, and never by more than a step at once."""
    state = Feedback()
    for each in windows:
        now = after(state, each)
        assert LEAST_FACTOR <= now.factor <= 1
        assert now.factor >= state.factor - MOST_CUT - 0.006  # rounded to hundredths
        assert bool(now.reason) == (now.factor < 1)
        state = now


class LiveReplica(BatchingReplica):
    """The step simulator, fed with requests as it goes."""

    def __init__(self, step_time: StepTimeModel, limits: EngineLimits, most_waiting: int | None = None) -> None:
        self.requests: list[SimulatedRequest] = []
        self.refused: list[SimulatedRequest] = []
        self._most_waiting = most_waiting
        super().__init__(step_time, limits, self.requests)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def advance_to(self, time_s: float) -> None:
        while self._now_s < time_s:
            while self._arrived < len(self.requests) and self.requests[self._arrived].arrival_s <= self._now_s:
                full = self._most_waiting is not None and len(self._waiting) >= self._most_waiting
                (self.refused if full else self._waiting).append(self.requests[self._arrived])
                self._arrived += 1
            if self._running or self._waiting:
                self._advance()
            elif self._arrived < len(self.requests):
                self._now_s = self.requests[self._arrived].arrival_s
            else:
                self._now_s = time_s


class ClosedLoop:
    """A replica ``slower`` than its profile, under the load that the trimmed supply lets through, and the law."""

    #: A refused request is refused by so many replicas, and is sent again in the next window so many times.
    TRIED, SENT_AGAIN = 3, 2

    def __init__(self, mix: WorkloadMix, slo: Slo, slower: float, seed: int, most_waiting: int | None = None) -> None:
        self._mix, self._slo = mix, slo
        self.measured = knee(PROFILE.step_time, PROFILE.limits, mix, slo).requests_per_s
        slowed = PROFILE.step_time.slowed(slower)
        #: What the replica does of its measured supply, by its own knee.
        self.truth = knee(slowed, PROFILE.limits, mix, slo).requests_per_s / self.measured
        self._replica = LiveReplica(slowed, PROFILE.limits, most_waiting)
        self._times_sent: dict[SimulatedRequest, int] = {}
        self._random = Random(seed)
        self._first: list[SimulatedRequest] = []
        self._last: list[SimulatedRequest] = []
        self._time_s = 0.0
        self.state = Feedback()

    def run(self, hours: float, others: Callable[[float], float] = lambda _time_s: 0.0) -> list[float]:
        """The factors, window by window. Callers take all that they may; ``others`` (a share) come unasked."""
        factors = []
        for _ in range(int(hours * 3600 / WINDOW_S)):
            load = (self.state.factor + others(self._time_s)) * self.measured
            arrived = self._arrive(load, self._time_s + WINDOW_S)
            self._replica.advance_to(self._time_s)
            self.state = after(self.state, self._signals(arrived))
            factors.append(self.state.factor)
        return factors

    def _arrive(self, requests_per_s: float, until_s: float) -> int:
        arrived = self._sent_again(until_s)
        at_s = self._time_s + self._random.expovariate(requests_per_s)
        while at_s < until_s:
            arrived.append(SimulatedRequest(at_s, self._random.choice(self._mix.shapes)))
            at_s += self._random.expovariate(requests_per_s)
        arrived.sort(key=lambda request: request.arrival_s)
        self._replica.requests += arrived
        self._first += arrived
        self._time_s = until_s
        return len(arrived)

    def _sent_again(self, until_s: float) -> list[SimulatedRequest]:
        """What was refused, as it comes in this window; some of it was refused too often."""
        again, times_sent = [], dict[SimulatedRequest, int]()
        for request in self._replica.refused:
            sent = self._times_sent.get(request, 0)
            if sent < self.SENT_AGAIN:
                again.append(SimulatedRequest(self._random.uniform(self._time_s, until_s), request.shape))
                times_sent[again[-1]] = sent + 1
        self._times_sent = times_sent
        self._replica.refused.clear()
        return again

    def _signals(self, arrived: int) -> Signals:
        refused = set(self._replica.refused)
        arrived -= len(refused)
        started = [r for r in self._first if r.first_token_s >= 0]
        self._first = [r for r in self._first if r.first_token_s < 0 and r not in refused]
        ended = [r for r in self._last + started if r.finish_s >= 0]
        self._last = [r for r in self._last + started if r.finish_s < 0]
        late = sum(r.first_token_s - r.arrival_s > self._slo.ttft_s for r in started)
        decoded = [
            (r.finish_s - r.first_token_s) / (r.shape.output_tokens - 1) for r in ended if r.shape.output_tokens > 1
        ]
        started_per_s = max(len(started), 1) / WINDOW_S
        return Signals(
            duration_s=WINDOW_S,
            offered=arrived / WINDOW_S / self.measured,
            served=started_per_s / self.measured,
            arrivals=arrived,
            ttft=LateShare("TTFT", self._slo.ttft_s, len(started), late),
            tpot=LateShare("TPOT", self._slo.tpot_s, len(decoded), sum(each > self._slo.tpot_s for each in decoded)),
            may_be_late=1 - self._slo.percentile / 100,
            waiting_s=self._replica.waiting / started_per_s,
            refused=len(refused) * self.TRIED,
        )


TPOT_BOUND, TTFT_BOUND = Slo(1.0, 0.05), Slo(0.25, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slo", "slower", "within"), [(TPOT_BOUND, 1.38, 0.05), (TPOT_BOUND, 1.1, 0.05), (TTFT_BOUND, 1.3, 0.09)]
)
def test_a_slow_fleet_converges_to_what_it_does_and_stays(slo: Slo, slower: float, within: float) -> None:
    """Closed loop on the step simulator, under all the load that its limits allow: no oscillation.

    TTFT rises softly with load, so that a tenth too much is late by little more than chance explains.
    """
    loop = ClosedLoop(CHAT, slo, slower, seed=1)

    factors = loop.run(hours=1.5)

    settled = factors[int(1500 / WINDOW_S) :]
    assert max(abs(factor - loop.truth) for factor in settled) <= within + 0.005, (
        loop.truth,
        min(settled),
        max(settled),
    )
    changes = sum(one != other for one, other in pairwise(settled))
    assert changes <= 12


@pytest.mark.slow
@pytest.mark.parametrize("slo", [TPOT_BOUND, TTFT_BOUND, Slo(1.0, 0.03)])
def test_a_fleet_that_does_its_profile_is_not_trimmed_by_chance(slo: Slo) -> None:
    """At the knee itself one request in twenty is late, and many at once: hours of that are no evidence."""
    loop = ClosedLoop(CHAT, slo, 1.0, seed=2)

    assert set(loop.run(hours=1.5)) == {1.0}


@pytest.mark.slow
def test_a_fleet_overrun_by_others_is_not_trimmed() -> None:
    """Twenty minutes of half as much again from callers who pass no gateway leave a good fleet its supply."""
    loop = ClosedLoop(CHAT, TPOT_BOUND, 1.0, seed=3)

    factors = loop.run(hours=1.0, others=lambda time_s: 0.5 if 600 <= time_s < 1800 else -0.2)

    assert set(factors) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("slower", [1.3, 1.8])
def test_a_slow_fleet_that_refuses_is_trimmed_though_its_callers_send_again(slower: float) -> None:
    """A request that is refused three times and sent anew is one request's work: the retries excuse nothing."""
    loop = ClosedLoop(CHAT, TTFT_BOUND, slower, seed=4, most_waiting=8)

    factors = loop.run(hours=1.0)

    settled = factors[int(1800 / WINDOW_S) :]
    assert max(abs(factor - max(loop.truth, LEAST_FACTOR)) for factor in settled) <= 0.12, (loop.truth, settled)


@pytest.mark.slow
def test_a_fleet_overrun_by_others_that_refuses_is_not_trimmed() -> None:
    """It serves all of its supply and refuses the rest, again and again: that is no word against it."""
    loop = ClosedLoop(CHAT, TTFT_BOUND, 1.0, seed=5, most_waiting=8)

    factors = loop.run(hours=1.0, others=lambda time_s: 0.5 if 600 <= time_s < 1800 else -0.2)

    assert set(factors) == {1.0}
