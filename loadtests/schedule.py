"""The offered load: who sends which request when, decided before anything is sent.

Arrivals are Poisson per key, so the load is open-loop by construction: a request's time never depends on an answer.
The same seed and rates give the same schedule, which is replayed unchanged against every fleet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import fsum
from random import Random

import msgspec

from ratelimit.publication import Limit, Publication
from serving.capacity import RequestShape


class KeyLoad(msgspec.Struct, frozen=True):
    """One caller's offered load."""

    key: str
    tier: str
    requests_per_s: float


class PlannedRequest(msgspec.Struct, frozen=True):
    """One request of the schedule; ``time_s`` counts from the start of the load."""

    index: int
    time_s: float
    key: str
    input_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Input and output tokens together, the weight of this request in every share."""
        return self.input_tokens + self.output_tokens


class Window(msgspec.Struct, frozen=True):
    """The measured part of a load, in seconds from its start: what comes before is warm-up."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """How long it lasts."""
        return self.end_s - self.start_s

    def holds(self, time_s: float) -> bool:
        """Whether that moment is measured."""
        return self.start_s <= time_s < self.end_s


class Schedule(msgspec.Struct, frozen=True):
    """A whole load, in order of time."""

    seed: int
    window: Window
    loads: tuple[KeyLoad, ...]
    requests: tuple[PlannedRequest, ...]

    @property
    def measured(self) -> tuple[PlannedRequest, ...]:
        """The requests inside the window."""
        return tuple(request for request in self.requests if self.window.holds(request.time_s))


def allowed_requests_per_s(limits: Sequence[Limit], shapes: Sequence[RequestShape]) -> float:
    """The request rate of these shapes at which the first of one key's rate limits binds.

    Raises ``ValueError`` for a key without rate limits, whose allowance has no bound.
    """
    mean_cost = {
        "requests": 1.0,
        "input_tokens": fsum(shape.input_tokens for shape in shapes) / len(shapes),
        "output_tokens": fsum(shape.output_tokens for shape in shapes) / len(shapes),
    }
    rates = [limit.per_minute / 60 / mean_cost[limit.name] for limit in limits if limit.name in mean_cost]
    if not rates:
        raise ValueError("this key has no rate limits on the model, so no load is proportional to them")
    return min(rates)


def offered_loads(
    tier_of_key: Mapping[str, str],
    publication: Publication,
    model: str,
    shapes: Sequence[RequestShape],
    times_allowed: float,
) -> tuple[KeyLoad, ...]:
    """Every key offers ``times_allowed`` × what its own limits allow at this publication."""
    return tuple(
        KeyLoad(key, tier, times_allowed * allowed_requests_per_s(publication.limits(tier, model), shapes))
        for key, tier in tier_of_key.items()
    )


def scaled(loads: Sequence[KeyLoad], factor: float) -> tuple[KeyLoad, ...]:
    """The same callers at ``factor`` × their rates."""
    return tuple(KeyLoad(load.key, load.tier, load.requests_per_s * factor) for load in loads)


def build_schedule(
    loads: Sequence[KeyLoad], shapes: Sequence[RequestShape], window: Window, seed: int, least_input_tokens: int = 1
) -> Schedule:
    """Seeded Poisson arrivals of every key over warm-up and window, their shapes drawn evenly.

    ``least_input_tokens`` is what the shortest prompt comes to with its chat template; shorter shapes are lifted to it.
    """
    arrivals = sorted(chain.from_iterable(_arrivals(load, shapes, window.end_s, seed) for load in loads))
    requests = tuple(
        PlannedRequest(index, time_s, key, max(least_input_tokens, inputs), outputs)
        for index, (time_s, key, inputs, outputs) in enumerate(arrivals)
    )
    return Schedule(seed, window, tuple(loads), requests)


def shortened(schedule: Schedule, window: Window) -> Schedule:
    """The same load, ended with a window that ends earlier."""
    requests = tuple(request for request in schedule.requests if request.time_s < window.end_s)
    return Schedule(schedule.seed, window, schedule.loads, requests)


def _arrivals(
    load: KeyLoad, shapes: Sequence[RequestShape], duration_s: float, seed: int
) -> list[tuple[float, str, int, int]]:
    """One key's arrivals, from its own stream of random numbers: adding a key leaves the others as they were."""
    rng = Random(f"{seed}/{load.key}")  # noqa: S311 - simulation, not security
    arrivals = []
    time_s = rng.expovariate(load.requests_per_s)
    while time_s < duration_s:
        shape = rng.choice(shapes)
        arrivals.append((time_s, load.key, shape.input_tokens, shape.output_tokens))
        time_s += rng.expovariate(load.requests_per_s)
    return arrivals
