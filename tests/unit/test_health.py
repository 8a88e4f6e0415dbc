from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from serving.fleet import HELD_METRICS, sum_metrics
from serving.health import (
    FLAP_QUIET_S,
    MOST_FLAP_DELAY_S,
    Observation,
    ReplicaHealth,
    found_again,
    lost,
    observe,
    raise_delay_s,
    stuck_time_s,
)
from serving.profile import load_profile

STUCK_AFTER_S = 5.0


def after(observations: Iterable[Observation]) -> ReplicaHealth:
    health = ReplicaHealth()
    for seen in observations:
        health = observe(health, seen, STUCK_AFTER_S)
    return health


def working(at_s: float, tokens: float, held: float = 3.0) -> Observation:
    return Observation(at_s, "healthy", held, tokens)


def test_a_replica_found_again_has_its_losses_for_as_long_as_they_mean_flapping() -> None:
    """One that was taken off while it was starting lost nothing; long ago is forgotten."""
    flapped = lost(ReplicaHealth("healthy", 90.0, losses=2), 100.0)

    assert flapped.losses == 3
    assert found_again(flapped, 110.0) == ReplicaHealth(since_s=110.0, losses=3)
    assert found_again(flapped, 100.0 + FLAP_QUIET_S).losses == 0
    assert lost(ReplicaHealth(since_s=90.0), 100.0).losses == 0


def test_a_replica_that_has_never_answered_is_starting_not_down() -> None:
    """Refused connections before the first healthy probe are a start-up, not a failure."""
    assert after([Observation(t, "refused") for t in range(5)]).phase == "starting"


def test_a_refused_connection_takes_a_healthy_replica_down_at_once() -> None:
    """One refused probe is enough, so that limits fall within one probe interval of a crash."""
    health = after([working(0.0, 1.0), Observation(0.5, "refused")])

    assert health.phase == "down"
    assert health.since_s == 0.5


def test_one_silent_probe_is_forgiven_and_a_second_is_not() -> None:
    """A busy server may miss one probe; two in a row take it down."""
    once = [working(0.0, 1.0), Observation(2.0, "silent")]

    assert after(once).phase == "healthy"
    assert after([*once, Observation(4.0, "silent")]).phase == "down"
    assert after([*once, working(2.5, 2.0), Observation(4.5, "silent")]).phase == "healthy"


def test_work_that_comes_to_an_idle_replica_has_not_waited_since_the_probe_before() -> None:
    """In a large fleet probes are further apart than stuck_after_s; only what was seen at two of them has waited."""
    idle = observe(ReplicaHealth(), Observation(0.0, "healthy", 0, 7), 5.0)
    begun = observe(idle, Observation(20.0, "healthy", 1, 7), 5.0)
    assert begun.phase == "healthy"
    assert observe(begun, Observation(24.9, "healthy", 1, 7), 5.0).phase == "healthy"
    assert observe(begun, Observation(25.0, "healthy", 1, 7), 5.0).phase == "stuck"


def test_work_without_progress_is_stuck_only_after_the_stated_time() -> None:
    """Neither counter moving while requests are held makes a replica stuck at ``stuck_after_s``, not before."""
    history = [working(0.0, 7.0), working(0.5, 7.0), working(4.9, 7.0)]

    assert after(history).phase == "healthy"
    assert after([*history, working(5.0, 7.0)]).phase == "stuck"


def test_an_idle_replica_is_never_stuck_and_its_idle_time_does_not_count() -> None:
    """Counters that rest while nothing is held prove nothing, also not against the first request after a long rest."""
    idle = [working(t, 7.0, held=0.0) for t in range(100)]

    assert after(idle).phase == "healthy"
    assert after([*idle, working(100.0, 7.0)]).phase == "healthy"


def test_a_token_that_moves_frees_a_stuck_replica() -> None:
    """A thawed replica is healthy again from its first progress."""
    stuck = [working(0.0, 7.0), working(6.0, 7.0)]

    assert after(stuck).phase == "stuck"
    assert after([*stuck, working(7.0, 8.0)]).phase == "healthy"


@given(st.lists(st.tuples(st.sampled_from(["healthy", "refused", "silent"]), st.integers(0, 3), st.integers(0, 3))))
def test_the_time_in_a_phase_starts_when_the_phase_is_entered(seen: list[tuple[str, int, int]]) -> None:
    """``since_s`` changes exactly when the phase does, so raise-after timers cannot be reset or inherited."""
    health = ReplicaHealth()
    for at_s, (answer, held, tokens) in enumerate(seen, start=1):
        before = health
        health = observe(health, Observation(at_s, answer, held, tokens), STUCK_AFTER_S)  # type: ignore[arg-type]  # sampled from the literals

        assert health.since_s == (before.since_s if health.phase == before.phase else at_s)


def test_metrics_are_summed_over_their_labels_and_no_others() -> None:
    """Only the named series count, whatever labels they carry."""
    exposition = (
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 3.0\n'
        'vllm:num_requests_waiting{engine="0"} 4.0\n'
        'vllm:num_requests_waiting_by_reason{reason="capacity"} 99.0\n'
    )

    assert sum_metrics(exposition, HELD_METRICS) == 9.0


def test_the_time_until_stuck_is_longer_than_any_step() -> None:
    """A slow device may take longer for one full step than is configured; up to 1:10 this one does not."""
    profile = load_profile("h100-llama-3.1-8b")
    full_step_s = profile.step_time.step_s(8192, 1024, 915_069)

    assert stuck_time_s(5.0, profile.step_time.slowed(10), profile.limits) == 5.0
    assert stuck_time_s(5.0, profile.step_time.slowed(100), profile.limits) > 100 * full_step_s


def lost_and_back(health: ReplicaHealth, at_s: float) -> ReplicaHealth:
    """Refused at ``at_s``, and answering again a second later."""
    down = observe(health, Observation(at_s, "refused"), STUCK_AFTER_S)
    return observe(down, Observation(at_s + 1, "healthy"), STUCK_AFTER_S)


def test_a_flapping_replica_must_stay_for_twice_as_long_each_time() -> None:
    """The first loss costs the configured delay; the next ones double it, so that limits do not oscillate."""
    health, delays = after([working(0.0, 1.0)]), []
    for n in range(4):
        health = lost_and_back(health, 10.0 * (n + 1))
        delays.append(next(t for t in range(1000) if health.has_stayed(5.0, health.since_s + t)))

    assert delays == [5, 10, 20, 40]


def test_the_delay_of_a_flapping_replica_is_bounded() -> None:
    """However often it was lost, a replica that has come back for good counts in the end; a longer own delay holds."""
    assert raise_delay_s(5.0, losses=10_000) == MOST_FLAP_DELAY_S
    assert raise_delay_s(0.0, losses=3) == 4.0
    assert raise_delay_s(3600.0, losses=3) == 3600.0


def test_a_quiet_time_forgives_earlier_losses() -> None:
    """A replica that was lost, and then healthy for long, is no flapping one when it is lost again."""
    health = after([working(0.0, 1.0)])
    for n in range(5):
        health = lost_and_back(health, 10.0 * (n + 1))

    quiet = lost_and_back(health, health.since_s + FLAP_QUIET_S)

    assert quiet.losses == 1
    assert lost_and_back(health, health.since_s + FLAP_QUIET_S - 1).losses == 6


def test_a_replica_that_freezes_and_moves_again_flaps_too() -> None:
    """Stuck and free by turns is as unsteady as down and up."""
    health = after([working(0.0, 1.0), working(5.0, 1.0), working(5.5, 2.0), working(10.5, 2.0), working(11.0, 3.0)])

    assert (health.phase, health.losses) == ("healthy", 2)
