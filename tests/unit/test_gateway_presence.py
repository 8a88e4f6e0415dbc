"""How many gateways are live, as one of them counts them over outages."""

from __future__ import annotations

from ratelimit.gateway.presence import HEARTBEAT_S, LIVE_S, LiveCount


def counted(live: LiveCount, since_s: float, counts: list[int]) -> float:
    """One count each heartbeat; the time of the next."""
    for number, count in enumerate(counts):
        live.counted(since_s + number * HEARTBEAT_S, count)
    return since_s + len(counts) * HEARTBEAT_S


def test_after_a_long_outage_a_gateway_is_not_alone() -> None:
    """The first counts may miss those who have not come back yet: the number before holds until all had their time."""
    live = LiveCount()
    next_s = counted(live, 0, [4, 4, 4])
    live.missed()
    next_s = counted(live, next_s + 100 * LIVE_S, [1, 1])
    assert live.value == 4
    live.missed()  # the second outage
    assert live.value == 4
    next_s = counted(live, next_s + LIVE_S, [2] * 5)
    assert live.value == 4
    counted(live, next_s, [2])
    assert live.value == 2


def test_a_gateway_that_stood_still_is_as_careful() -> None:
    """No beat failed, but none was sent for long either: the others may have been kept from theirs too."""
    live = LiveCount()
    next_s = counted(live, 0, [3])
    counted(live, next_s + 2 * LIVE_S, [1])
    assert live.value == 3


def test_the_count_falls_while_redis_answers() -> None:
    """A gateway that is gone is forgotten after a while, one that is new counts at once, and none is known at first."""
    live = LiveCount()
    live.missed()
    assert live.value == 0
    next_s = counted(live, 0, [2, 3])
    assert live.value == 3
    counted(live, next_s, [2] * 7)
    assert live.value == 2
