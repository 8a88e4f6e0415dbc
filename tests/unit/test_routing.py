from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from serving.routing import choose


class Replica(NamedTuple):
    url: str
    requests_per_s: float


def test_an_idle_replica_is_preferred_to_a_busy_one() -> None:
    """The replica without outstanding cost takes the request."""
    chosen = choose([Replica("a", 1.0), Replica("b", 1.0)], {"a": 3.0})

    assert chosen == Replica("b", 1.0)


def test_excluded_and_incapable_replicas_take_nothing() -> None:
    """With every replica excluded or without capacity there is no choice."""
    assert choose([Replica("a", 1.0), Replica("b", 0.0)], {}, exclude={"a"}) is None


@given(st.lists(st.floats(0.5, 8.0), min_size=1, max_size=6), st.integers(50, 400))
def test_work_is_shared_in_proportion_to_capacity(speeds: list[float], requests: int) -> None:
    """Sending many equal requests that never finish, no replica holds more than its share plus one request."""
    replicas = [Replica(str(i), speed) for i, speed in enumerate(speeds)]
    outstanding: dict[str, float] = {}
    for _ in range(requests):
        chosen = choose(replicas, outstanding)
        assert chosen is not None
        outstanding[chosen.url] = outstanding.get(chosen.url, 0.0) + 1.0

    for replica in replicas:
        share = requests * replica.requests_per_s / sum(speeds)
        assert outstanding.get(replica.url, 0.0) <= share + 1.0 + 1e-9
