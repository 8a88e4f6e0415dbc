"""What the store's answer means to a caller: the headers of an answer, or the refusal. Pure, but for ``Durations``."""

from __future__ import annotations

from ratelimit.gateway.charges import limit_of, rooms
from ratelimit.gateway.errors import Headers, Rejection, over_limit, reduced_capacity
from ratelimit.gateway.headers import limit_headers
from ratelimit.gateway.local import LOCAL_BUCKET
from ratelimit.gateway.terms import Terms
from ratelimit.meter import Admitted, Denied
from ratelimit.publication import Limit

_UNKNOWN_WAIT_US = 1_000_000
_ALONE = "The rate limiter cannot be reached, and what may be served without it is used up. Please try again."
_WHOSE = {"key": "tier {tier}", "org": "the whole org", "tier": "all of tier {tier}", "model": "all callers"}
_WINDOWS = {"5h": "5 hours", "week": "a week"}
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
    """429 where the caller's own limit binds; 503 where the fleet is short: its pool, or a limit of 0 for want of it.

    So it is too while Redis is away: what this gateway may give out alone is less than the caller's limit. A place in
    flight has no exact wait: of ``burst`` requests that take the mean duration one ends, on average, every
    ``mean_duration_us / burst``.
    """
    headers = (*limit_headers(rooms(terms, denied)), terms.policy_header)
    limit, wait_us = limit_of(terms, denied.bucket), denied.wait_us
    if denied.bucket == LOCAL_BUCKET:
        return reduced_capacity(_ALONE, _UNKNOWN_WAIT_US if wait_us is None else wait_us, "outage")
    if limit is None:
        wait_us = _UNKNOWN_WAIT_US if wait_us is None else wait_us
        return reduced_capacity("The replicas of this model are fully used.", wait_us, "pool", headers)
    if limit.burst == 0:
        detail = "The fleet has no capacity left for this limit at the moment."
        return reduced_capacity(detail, _UNKNOWN_WAIT_US, limit.name, headers)
    told = f"{_told(limit)} for {_WHOSE[limit.per].format(tier=tier)} on {terms.pool.model}"
    if wait_us is None:
        return over_limit(limit.name, told, mean_duration_us // limit.burst, estimated=True, headers=headers)
    return over_limit(limit.name, told, wait_us, estimated=False, headers=headers)


def _told(limit: Limit) -> str:
    what = limit.name.replace("_", " ")
    if limit.name == "concurrency":
        return f"at most {limit.burst} requests in flight"
    if limit.window != "minute":
        return f"at most {limit.burst} {what} in {_WINDOWS[limit.window]} from the first"
    return f"at most {limit.per_minute} {what} a minute and {limit.burst} at once"
