from __future__ import annotations

from math import inf
from typing import Literal

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.inputs import FleetNow, counted
from serving.fleet import ReplicaSpec, ReplicaStatus
from serving.health import Observation, ReplicaHealth, ReplicaPhase, observe, raise_delay_s

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


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["healthy", "down"]), st.floats(0, 900)), max_size=6
    ),
    st.sets(st.integers(0, 5)),
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
)
def test_who_counts_is_decided_replica_by_replica(
    seen: list[tuple[str, ReplicaPhase, float]], before: set[int], losses: list[int]
) -> None:
    """Of several models too: a replica counts if it did, if it has stayed, or if nothing of its model counted; and the
    time told for the next one is when the first of those that have not stayed yet will have.
    """
    now_s, raise_after_s = 900.0, {"a": 5.0, "b": 100.0}
    fleet = [
        ReplicaStatus(ReplicaSpec(str(i), model, "H100", "p"), ReplicaHealth(phase, since_s, losses=losses[i]))
        for i, (model, phase, since_s) in enumerate(seen)
        if model in raise_after_s
    ]
    healthy = [each for each in fleet if each.health.phase == "healthy"]
    kept = {each.spec.url for each in healthy if int(each.spec.url) in before}
    served = {each.spec.model for each in healthy if each.spec.url in kept}
    stays_s = {
        each.spec.url: each.health.since_s + raise_delay_s(raise_after_s[each.spec.model], losses[int(each.spec.url)])
        for each in healthy
    }

    assert counted(fleet, frozenset(map(str, before)), raise_after_s, now_s) == {
        each.spec.url
        for each in healthy
        if each.spec.url in kept
        or each.spec.model not in served
        or each.health.has_stayed(raise_after_s[each.spec.model], now_s)
    }
    told = FleetNow({each.spec.url: each for each in fleet}, now_s, {}).next_raise_s(raise_after_s)
    assert told == min((at_s for at_s in stays_s.values() if at_s > now_s), default=inf)
