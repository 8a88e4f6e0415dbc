"""The prediction: a replay through the meter that throttles what the limits cannot carry, and nothing else."""

from __future__ import annotations

import msgspec
import pytest

from loadtests.prediction import Prediction, predict
from loadtests.schedule import KeyLoad, PlannedRequest, Schedule, Window, build_schedule
from ratelimit.publication import Limit, LimitName, Publication, PublishedPool, PublishedReplica, TierLimits
from serving.capacity import EngineLimits, ReplicaGroup, RequestShape, Slo, StepTimeModel

MODEL = "m"
SHAPES = (RequestShape(100, 20),)
WINDOW = Window(10, 70)
GROUP = ReplicaGroup(
    1, StepTimeModel(0.04, 2e-4, 2.4e-4, 2.6e-7), EngineLimits(256, 8192, 400_000, 4096), Slo(10.0, 0.3)
)
MANY = 10**7


def publication(
    *, requests: int = MANY, inputs: int = MANY, outputs: int = MANY, in_flight: int = 1000, replicas: int = 1
) -> Publication:
    """One tier with these limits a minute, each with 5 s of burst, on a pool whose budget binds nobody."""
    named: tuple[tuple[LimitName, int], ...] = (
        ("requests", requests),
        ("input_tokens", inputs),
        ("output_tokens", outputs),
    )
    limits = (*(Limit(name, rate, rate // 12, "") for name, rate in named), Limit("concurrency", 0, in_flight, ""))
    pool = PublishedPool(
        model=MODEL,
        replicas=tuple(PublishedReplica(f"http://{i}", "H100", "p", 10, 20) for i in range(replicas)),
        groups=(msgspec.structs.replace(GROUP, count=replicas),),
        max_model_len=4096,
        tokens_per_byte=0.3,
        default_max_output=64,
        budget_per_minute=10**12,
        budget_burst=10**11,
        usable_requests_per_s=20,
        usable_input_tokens_per_s=2000,
        usable_output_tokens_per_s=400,
        explanation="",
    )
    return Publication(1, "", "", enforce=True, pools=(pool,), tiers=(TierLimits("pro", MODEL, 1, limits),))


def load(rate: float = 10.0, seed: int = 1) -> Schedule:
    """One key sending requests of 100 input and 20 output tokens."""
    return build_schedule((KeyLoad("a", "pro", rate),), SHAPES, WINDOW, seed)


def exact(request: PlannedRequest) -> int:
    """A gateway that knows every prompt's length."""
    return request.input_tokens


def predicted(schedule: Schedule, limits: Publication) -> Prediction:
    """The prediction alone."""
    return predict(schedule, limits, MODEL, exact)[0]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (publication(requests=300), "requests"),
        (publication(inputs=30_000), "input_tokens"),
        (publication(outputs=6_000), "output_tokens"),
    ],
)
def test_half_the_rate_throttles_half_the_load(limits: Publication, name: str) -> None:
    """Any limit at half the offered rate refuses half, and is the one named; equal requests have equal shares."""
    foretold = predicted(load(), limits)

    assert foretold.throttled_share == pytest.approx(0.5, abs=0.05)
    assert foretold.throttled_request_share == pytest.approx(foretold.throttled_share)
    assert set(foretold.refused_by) == {name}


def test_ample_limits_throttle_nothing() -> None:
    """With limits far above the load every request is admitted, meets the SLO, and counts as goodput."""
    schedule = load()
    foretold = predicted(schedule, publication())

    assert foretold.throttled_share == 0
    assert foretold.slo_met_share == 1
    assert foretold.goodput_tokens_per_s == sum(r.tokens for r in schedule.measured) / WINDOW.length_s


def test_concurrency_follows_from_the_stays() -> None:
    """Two places in flight, each held for as long as the step simulator says, carry two requests per residence."""
    schedule, limits = load(), publication(in_flight=2)
    foretold, replay = predict(schedule, limits, MODEL, exact)
    stays_s = [stay.end_s for stay in replay.stays if stay is not None]
    carried = 2 / (sum(stays_s) / len(stays_s)) / 10

    assert set(foretold.refused_by) == {"concurrency"}
    assert 0.5 * carried < 1 - foretold.throttled_share < carried


def test_an_overestimated_prompt_is_given_back() -> None:
    """Holding each prompt at thrice its length until its first token throttles more, but not thrice as much."""
    schedule, limits = load(), publication(inputs=54_000)
    held_exactly = predicted(schedule, limits).throttled_share
    held_high = predict(schedule, limits, MODEL, lambda r: 3 * r.input_tokens)[0].throttled_share

    assert held_exactly < held_high < held_exactly + 0.1


def test_more_replicas_answer_sooner() -> None:
    """The same admitted load on four replicas has shorter stays than on one."""
    schedule = load(rate=30.0)

    def mean_stay_s(replicas: int) -> float:
        stays = predict(schedule, publication(replicas=replicas), MODEL, exact)[1].stays
        return sum(stay.end_s for stay in stays if stay is not None) / len(stays)

    assert mean_stay_s(4) < 0.8 * mean_stay_s(1)


def test_big_requests_lose_more_often() -> None:
    """Where limits bind, the share of tokens refused is above the share of requests refused."""
    shapes = (RequestShape(20, 5), RequestShape(400, 100))
    schedule = build_schedule((KeyLoad("a", "pro", 10.0),), shapes, WINDOW, 1)
    foretold = predicted(schedule, publication(inputs=60_000, outputs=15_000))

    assert foretold.throttled_share > foretold.throttled_request_share + 0.1


def test_same_schedule_same_prediction() -> None:
    """Nothing but the arguments decides."""
    assert predicted(load(), publication(outputs=6_000)) == predicted(load(), publication(outputs=6_000))


def test_an_empty_fleet_has_no_prediction() -> None:
    """Without replicas there is nothing to replay against, and the error says so."""
    with pytest.raises(ValueError, match="no replicas for other"):
        predict(load(), publication(), "other", exact)
