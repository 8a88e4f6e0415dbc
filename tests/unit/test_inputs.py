from __future__ import annotations

from typing import Literal

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.inputs import counted
from serving.fleet import ReplicaSpec, ReplicaStatus
from serving.health import Observation, ReplicaHealth, ReplicaPhase, observe

RAISE_AFTER_S = {"m": 5.0}


def status(url: str, phase: ReplicaPhase, since_s: float) -> ReplicaStatus:
    return ReplicaStatus(ReplicaSpec(url, "m", "H100", "h100-llama-3.1-8b"), ReplicaHealth(phase, since_s))


def test_a_new_replica_counts_after_its_time_and_not_before() -> None:
    """Limits rise when a replica that joins others has been healthy for raise_after_s."""
    fleet = [status("old", "healthy", 0.0), status("new", "healthy", 100.0)]
    before = frozenset({"old"})

    assert counted(fleet, before, RAISE_AFTER_S, now_s=104.9) == {"old"}
    assert counted(fleet, before, RAISE_AFTER_S, now_s=105.0) == {"old", "new"}


def test_a_lost_replica_stops_counting_at_once() -> None:
    """Limits fall with the first observation that a replica is down or stuck."""
    before = frozenset({"a", "b", "c"})
    fleet = [status("a", "healthy", 0.0), status("b", "stuck", 9.0), status("c", "down", 9.0)]

    assert counted(fleet, before, RAISE_AFTER_S, now_s=9.0) == {"a"}


def test_the_first_replica_of_a_model_counts_at_once() -> None:
    """Where nothing was promised there is nothing to take back, so nobody waits for raise_after_s."""
    assert counted([status("a", "healthy", 10.0)], frozenset(), RAISE_AFTER_S, now_s=10.0) == {"a"}


def test_a_flapping_replica_raises_limits_once_and_not_at_each_return() -> None:
    """One replica of two that comes and goes every 8 s counts again only when it has stayed."""
    steady = status("steady", "healthy", 0.0)
    flapping, before, changes = ReplicaHealth("healthy", 0.0), frozenset({"steady", "flapping"}), 0
    for tick in range(1, 400):
        answer: Literal["healthy", "refused"] = "refused" if tick % 16 in (0, 1) else "healthy"
        flapping = observe(flapping, Observation(tick / 2, answer), 60.0)
        fleet = [steady, ReplicaStatus(msgspec.structs.replace(steady.spec, url="flapping"), flapping)]
        now = counted(fleet, before, RAISE_AFTER_S, now_s=tick / 2)
        changes += now != before
        before = now

    assert before == {"steady"}
    assert changes <= 3


@given(
    st.lists(st.tuples(st.sampled_from(["starting", "healthy", "stuck", "down"]), st.floats(0, 20)), max_size=6),
    st.sets(st.integers(0, 5)),
)
def test_only_healthy_replicas_ever_count(seen: list[tuple[ReplicaPhase, float]], before: set[int]) -> None:
    """Whatever counted before, a replica that is not healthy now does not; one that is and did, still does."""
    fleet = [status(str(i), phase, since_s) for i, (phase, since_s) in enumerate(seen)]
    healthy = {entry.spec.url for entry in fleet if entry.health.phase == "healthy"}
    counted_before = frozenset(str(i) for i in before)

    now = counted(fleet, counted_before, RAISE_AFTER_S, now_s=20.0)

    assert counted_before & healthy <= now <= healthy
    assert bool(now) == bool(healthy)
