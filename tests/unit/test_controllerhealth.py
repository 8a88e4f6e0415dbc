"""What probes are told of a controller, by a clock of the test's."""

from __future__ import annotations

import pytest

from ratelimit.controllerhealth import ANSWER_WITHIN_S, STUCK_AFTER_S, ControllerHealth


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> ControllerHealth:
    return ControllerHealth(clock)


def test_a_standby_is_ready_while_redis_answers(health: ControllerHealth, clock: Clock) -> None:
    """Not before its first answer, and not when the last one is long ago."""
    assert health.unready()

    health.lease_asked(answered=True)
    assert not health.unready()

    clock.now_s += ANSWER_WITHIN_S + 1
    health.lease_asked(answered=False)
    assert "Redis" in health.unready()


def test_a_leader_is_ready_by_its_last_round(health: ControllerHealth) -> None:
    """A new leader once a round was good; none of it is remembered over a term."""
    health.lease_asked(answered=True)
    health.leads()
    assert health.unready() == "no round yet"

    health.round_ended(good=True)
    assert not health.unready()

    health.round_ended(good=False)
    assert "failed" in health.unready()

    health.stands_by()
    assert not health.unready()

    health.leads()
    assert health.unready() == "no round yet"


def test_who_asks_for_the_lease_lives_though_redis_is_away(health: ControllerHealth, clock: Clock) -> None:
    """A restart would not bring Redis back."""
    for _ in range(10):
        clock.now_s += STUCK_AFTER_S
        health.lease_asked(answered=False)

        assert not health.stuck()

    clock.now_s += STUCK_AFTER_S + 1
    assert "lease" in health.stuck()


def test_a_leader_whose_rounds_stand_still_is_stuck(health: ControllerHealth, clock: Clock) -> None:
    """Though it renews its lease; a failed round is a round."""
    health.leads()
    clock.now_s += STUCK_AFTER_S
    health.lease_asked(answered=True)
    health.round_ended(good=False)
    assert not health.stuck()

    clock.now_s += STUCK_AFTER_S + 1
    health.lease_asked(answered=True)
    assert "no round" in health.stuck()

    health.stands_by()
    assert not health.stuck()
