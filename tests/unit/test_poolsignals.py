from __future__ import annotations

import msgspec
import pytest

from ratelimit.feedback import Feedback, after
from ratelimit.groupsupply import GroupSupply
from ratelimit.policy import Promise
from ratelimit.poolsignals import pool_signals
from ratelimit.publication import PublishedReplica
from serving.capacity import ReplicaGroup, RequestShape, Slo, WorkloadMix
from serving.profile import load_profile
from serving.signals import Activity, Histogram
from serving.stepsim import Knee

PROFILE = load_profile("h100-llama-3.1-8b")
MIX = WorkloadMix("one", (RequestShape(1000, 200),))
OWN = Promise(MIX, Slo(1.0, 0.05))
URLS = ("http://a", "http://b", "http://c")


def group(
    urls: tuple[str, ...] = URLS, slowdown: float = 1.0, others: tuple[Promise, ...] = (), requests_per_s: float = 10.0
) -> GroupSupply:
    knees = {promise: Knee(requests_per_s * slowdown, 0.9, 0.5, 0.04, "tpot") for promise in (OWN, *others)}
    return GroupSupply(
        group=ReplicaGroup(len(urls), PROFILE.step_time.slowed(slowdown), PROFILE.limits, OWN.slo.slowed(slowdown)),
        gpu="H100",
        gpus_per_replica=1,
        profile=PROFILE.name,
        slowdown=slowdown,
        knees=knees,
        provenance="test",
        replicas=tuple(PublishedReplica(url, "H100", PROFILE.name, slowdown, 10.0) for url in urls),
    )


def activity(prompt: float = 1000, output: float = 200, arrivals: float = 100, waiting: float = 0) -> Activity:
    """Ten seconds; 80 first tokens, 20 of them after more than a second and 5 of those after more than two."""
    return Activity(
        duration_s=10.0,
        arrivals=arrivals,
        started=80,
        refused=0,
        waiting=waiting,
        mean_prompt_tokens=prompt,
        mean_cached_tokens=0,
        mean_output_tokens=output,
        ttft=Histogram((1.0, 2.0, float("inf")), (60, 75, 80)),
        tpot=Histogram((0.05, float("inf")), (80, 80)),
    )


def test_a_pool_at_its_measured_supply_is_asked_for_all_of_it() -> None:
    """Three replicas of 10 requests/s that get 10 each of the mix are offered their whole supply, and serve 0.8."""
    seen = pool_signals(OWN, [group()], dict.fromkeys(URLS, activity()))

    assert seen is not None
    assert (seen.offered, seen.served, seen.duration_s) == pytest.approx((1.0, 0.8, 10.0))
    assert (seen.ttft.seen, seen.ttft.late, seen.tpot.late) == (240, 60, 0)
    assert seen.may_be_late == pytest.approx(0.05)


def test_what_is_refused_is_no_offered_work() -> None:
    """It leaves no queue and comes again elsewhere: the same request, refused by every replica, is not three."""
    refusing = msgspec.structs.replace(activity(), refused=500)
    seen = pool_signals(OWN, [group()], dict.fromkeys(URLS, refusing))

    assert seen is not None
    assert (seen.offered, seen.refused) == pytest.approx((1.0, 1500))


def test_longer_requests_are_more_work() -> None:
    """Twice as long prompts and answers at the same rate ask for more than the supply."""
    seen = pool_signals(OWN, [group()], dict.fromkeys(URLS, activity(prompt=2000, output=400)))

    assert seen is not None
    assert seen.offered > 1.5


def test_what_waits_is_told_as_the_time_to_start_it() -> None:
    """16 requests wait and 24 a second are started: two thirds of a second."""
    seen = pool_signals(OWN, [group()], {url: activity(waiting=16 / 3) for url in URLS})

    assert seen is not None
    assert seen.waiting_s == pytest.approx(16 / 24)


def test_a_replica_that_is_not_seen_counts_on_neither_side() -> None:
    """Lost metrics of one replica of three change no share."""
    seen = pool_signals(OWN, [group()], dict.fromkeys(URLS[:2], activity()))

    assert seen is not None
    assert seen.offered == pytest.approx(1.0)


def test_a_pool_of_which_too_little_is_seen_is_not_judged() -> None:
    """One replica of three is no pool, and none is none."""
    assert pool_signals(OWN, [group()], dict.fromkeys(URLS[:1], activity())) is None
    assert pool_signals(OWN, [group()], {}) is None
    assert pool_signals(OWN, [], {}) is None


def test_a_slowed_replica_is_held_to_its_slowed_bounds() -> None:
    """At half speed two seconds mean what one does at full speed."""
    seen = pool_signals(OWN, [group(slowdown=2.0)], dict.fromkeys(URLS, activity()))

    assert seen is not None
    assert (seen.ttft.bound_s, seen.ttft.late) == (2.0, 15)


def test_a_slow_replica_that_carries_little_does_not_make_the_pool_patient() -> None:
    """Nine replicas at full speed are soon seen to fall behind, though a tenth has a hundred times their bound."""
    fast = group(tuple(f"http://{n}" for n in range(9)))
    slow = group(("http://slow",), slowdown=100.0, requests_per_s=0.1)
    activities = {"http://slow": activity(arrivals=1)}
    state = Feedback()
    for waiting in (80, 160):
        activities |= {replica.url: activity(waiting=waiting) for replica in fast.replicas}
        seen = pool_signals(OWN, [slow, fast], activities)
        assert seen is not None
        assert 1.0 <= seen.ttft.bound_s < 1.2
        state = after(state, seen)

    assert state.factor < 1


def test_what_may_be_late_is_the_loosest_promise_of_any_replica() -> None:
    """Whichever replica is first: a knee that one group lacks changes nothing."""
    loose = group(URLS[:1], others=(Promise(MIX, Slo(2.0, 0.1, 90)),))
    tight = group(URLS[1:])
    for groups in ([loose, tight], [tight, loose]):
        seen = pool_signals(OWN, groups, dict.fromkeys(URLS, activity()))
        assert seen is not None
        assert seen.may_be_late == pytest.approx(0.1)


def test_requests_are_held_to_the_loosest_promise() -> None:
    """A replica does not say whose request was late, so only what every promise rules out counts."""
    batch = Promise(MIX, Slo(2.0, 0.1, 90))
    seen = pool_signals(OWN, [group(others=(batch,))], dict.fromkeys(URLS, activity()))

    assert seen is not None
    assert (seen.ttft.late, seen.may_be_late) == pytest.approx((15, 0.1))


def test_a_window_in_which_nothing_ended_counts_requests_as_the_mix_has_them() -> None:
    """Without lengths of their own, requests are taken to be the usual ones."""
    seen = pool_signals(OWN, [group()], dict.fromkeys(URLS, activity(prompt=0, output=0)))

    assert seen is not None
    assert seen.offered == pytest.approx(1.0)
