"""What the store's answer means to a caller: the headers of an answer, or the refusal. Pure, but for ``Durations``."""

from __future__ import annotations

from ratelimit.gateway.charges import POOL_BUCKET, rooms
from ratelimit.gateway.errors import Headers, Rejection, over_limit, reduced_capacity
from ratelimit.gateway.headers import limit_headers
from ratelimit.gateway.terms import Terms
from ratelimit.meter import Admitted, Denied
from ratelimit.publication import Limit

_UNKNOWN_WAIT_US = 1_000_000
#: Weight of the newest request in the mean duration.
_NEWEST_SHARE = 0.1


class Durations:
    """A moving mean of how long requests take, by model: what a wait for a place in flight is estimated from."""

    def __init__(self) -> None:
        self._mean_s: dict[str, float] = {}

    def note(self, model: str, duration_s: float) -> None:
        """A request took this long."""
        mean = self._mean_s.get(model, duration_s)
        self._mean_s[model] = mean + _NEWEST_SHARE * (duration_s - mean)

    def mean_us(self, model: str) -> int:
        """The mean in microseconds; a second while nothing is known."""
        return round(1e6 * self._mean_s.get(model, 1.0))


def answer_headers(terms: Terms, admitted: Admitted | None) -> Headers:
    """The rate-limit headers of a served request; none where limits are not enforced."""
    return (*limit_headers(rooms(terms, admitted)), terms.policy_header) if admitted else ()


def refusal(terms: Terms, tier: str, denied: Denied, mean_duration_us: int) -> Rejection:
    """429 where the caller's own limit binds; 503 where the pool does, or the limit is 0 for want of capacity.

    A place in flight has no exact wait: of ``burst`` requests that take the mean duration one ends, on average, every
    ``mean_duration_us / burst``.
    """
    headers = (*limit_headers(rooms(terms, denied)), terms.policy_header)
    name = denied.bucket.rpartition(":")[2]
    limit = next((limit for limit in terms.limits if limit.name == name), None)
    if denied.bucket == POOL_BUCKET or limit is None:
        wait_us = _UNKNOWN_WAIT_US if denied.wait_us is None else denied.wait_us
        return reduced_capacity("The replicas of this model are fully used.", wait_us, POOL_BUCKET, headers)
    if limit.burst == 0:
        detail = "The fleet has no capacity left for this limit at the moment."
        return reduced_capacity(detail, _UNKNOWN_WAIT_US, limit.name, headers)
    told = f"{_told(limit)} for tier {tier} on {terms.pool.model}"
    if denied.wait_us is None:
        return over_limit(limit.name, told, mean_duration_us // limit.burst, estimated=True, headers=headers)
    return over_limit(limit.name, told, denied.wait_us, estimated=False, headers=headers)


def _told(limit: Limit) -> str:
    if limit.per_minute == 0:
        return f"at most {limit.burst} requests in flight"
    return f"at most {limit.per_minute} {limit.name.replace('_', ' ')} a minute and {limit.burst} at once"
