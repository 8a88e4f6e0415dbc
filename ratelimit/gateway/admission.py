"""What the store's answer means to a caller: the headers of an answer, or the refusal. Pure, but for ``Durations``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from zlib import crc32

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
#: No estimated wait is shorter: clients that are told next to nothing come back at once, and again.
LEAST_ESTIMATED_US = 1_000_000
#: An estimated wait is told longer by up to this share of it, so that those refused together do not come back together.
SPREAD_SHARE = 0.5


class Durations:
    """A moving mean of how long requests take, by caller: what a wait for a place in flight is estimated from.

    A caller is whatever a limit is shared by, such as a key on a model: what others ask for says nothing of its own.
    ``most_remembered`` are kept; the one that was idle longest is forgotten first.
    """

    def __init__(self, most_remembered: int = 20_000) -> None:
        self._most_remembered = most_remembered
        self._mean_s: OrderedDict[Hashable, float] = OrderedDict()

    def note(self, caller: Hashable, duration_s: float) -> None:
        """A request took this long."""
        mean = self._mean_s.get(caller, duration_s)
        self._mean_s[caller] = mean + _NEWEST_SHARE * (duration_s - mean)
        self._mean_s.move_to_end(caller)
        if len(self._mean_s) > self._most_remembered:
            self._mean_s.popitem(last=False)

    def mean_us(self, caller: Hashable) -> int:
        """The mean in microseconds; a second while nothing is known."""
        return round(1e6 * self._mean_s.get(caller, 1.0))


def answer_headers(terms: Terms, admitted: Admitted | None) -> Headers:
    """The rate-limit headers of a served request; none where limits are not enforced."""
    return (*limit_headers(rooms(terms, admitted)), terms.policy_header) if admitted else ()


def estimated_wait_us(mean_duration_us: int, places: int, request_id: str) -> int:
    """Microseconds until a place in flight may be free: of ``places``, one ends every ``mean_duration_us / places``.

    Never below ``LEAST_ESTIMATED_US``, and spread by the request's id.
    """
    wait_us = max(LEAST_ESTIMATED_US, mean_duration_us // places)
    return wait_us + int(wait_us * SPREAD_SHARE * crc32(request_id.encode()) / 2**32)


def refusal(terms: Terms, tier: str, denied: Denied, mean_duration_us: int, request_id: str = "") -> Rejection:
    """429 where the caller's own limit binds; 503 where the fleet is short: its pool, or a limit of 0 for want of it.

    So it is too while Redis is away: what this gateway may give out alone is less than the caller's limit. A place in
    flight has no exact wait: it is estimated, and spread by ``request_id``.
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
        wait_us = estimated_wait_us(mean_duration_us, limit.burst, request_id)
        return over_limit(limit.name, told, wait_us, estimated=True, headers=headers)
    return over_limit(limit.name, told, wait_us, estimated=False, headers=headers)


def _told(limit: Limit) -> str:
    what = limit.name.replace("_", " ")
    if limit.name == "concurrency":
        return f"at most {limit.burst} requests in flight"
    if limit.window != "minute":
        return f"at most {limit.burst} {what} in {_WINDOWS[limit.window]} from the first"
    return f"at most {limit.per_minute} {what} a minute and {limit.burst} at once"
