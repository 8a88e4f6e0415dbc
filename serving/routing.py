"""Which replica takes a request: the one that would finish its outstanding cost first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol, TypeVar


class Routable(Protocol):
    """What routing needs to know of a replica: where it is, and how many requests a second it can serve."""

    @property
    def url(self) -> str: ...
    @property
    def requests_per_s(self) -> float: ...


R = TypeVar("R", bound=Routable)


def choose(replicas: Iterable[R], outstanding: Mapping[str, float], exclude: Collection[str] = ()) -> R | None:
    """The replica with the least outstanding cost for its capacity, or ``None`` if every one is excluded.

    ``outstanding`` maps a replica's URL to the cost of the requests it holds, in any unit common to all. The cost of
    a request is the same on every replica, so dividing by ``requests_per_s`` sends work in proportion to capacity.
    Ties go to the replica with the larger capacity, then to the first named.
    """
    candidates = [replica for replica in replicas if replica.url not in exclude and replica.requests_per_s > 0]
    return min(
        candidates,
        key=lambda replica: (outstanding.get(replica.url, 0.0) / replica.requests_per_s, -replica.requests_per_s),
        default=None,
    )
