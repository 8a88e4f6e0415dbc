"""One open-loop point: Poisson arrivals at a given rate, each sent when it is due whatever became of the others.

Latencies are from the intended time, and how late the client sent is recorded and bounded, so a client that cannot keep
up fails its point instead of flattering the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

from serving.capacity import RequestShape, WorkloadMix
from serving.endpoint import Endpoint
from serving.outcomes import Load
from serving.records import PointRun
from serving.run_verdict import PointSettings
from serving.running import Run
from serving.stepsim import Arrival

SOURCE = "penstock measure: open loop, Poisson"


async def run_point(
    endpoint: Endpoint,
    model: str,
    mix: WorkloadMix,
    requests_per_s: float,
    settings: PointSettings,
    seed: int = 0,
) -> PointRun:
    """Drive the endpoint at that rate until the point is steady, hopeless or out of time.

    The same seed gives the same arrivals and shapes; at another rate, the same gaps stretched. What is still open at
    the end is left, and the engine drops it; wait for ``endpoint.drained`` before the next point. Raises
    ``EndpointError`` where a request fails, and ``ValueError`` for a rate that is not positive.
    """
    if not 0 < requests_per_s < float("inf"):
        raise ValueError(f"an open loop of {requests_per_s} requests/s; it needs a positive rate")

    async def pace(run: Run) -> None:
        for arrival in endless_arrivals(mix, requests_per_s, seed):
            await asyncio.sleep(max(0.0, arrival.time_s - run.now_s))
            run.start(arrival.time_s, arrival.shape)

    load = Load(mix.name, offered_per_s=round(requests_per_s, 6), source=SOURCE)
    return await Run(endpoint, model, load, settings, pace).result()


def endless_arrivals(mix: WorkloadMix, requests_per_s: float, seed: int) -> Iterator[Arrival]:
    """Poisson arrivals without end, their shapes in whole shuffled rounds of the mix."""
    gaps, shapes = Random(f"gaps/{seed}"), endless_shapes(mix, seed)  # noqa: S311 - load, not secrets
    time_s = 0.0
    while True:
        time_s += gaps.expovariate(1.0) / requests_per_s
        yield Arrival(time_s, next(shapes))


def endless_shapes(mix: WorkloadMix, seed: int) -> Iterator[RequestShape]:
    """The mix in shuffled rounds, so that no shape is over-represented."""
    rng = Random(f"shapes/{mix.name}/{seed}")  # noqa: S311 - load, not secrets
    while True:
        yield from rng.sample(mix.shapes, len(mix.shapes))
