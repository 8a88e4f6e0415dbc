"""One closed-loop point: so many workers, each sending its next request when the last is answered.

A sweep needs it for one thing only: a lone request at a time keeps the engine busy without a batch, which no open loop
does, and so tells the cost of an empty step from the rest.
"""

from __future__ import annotations

import asyncio

from serving.capacity import WorkloadMix
from serving.endpoint import Endpoint
from serving.openloop import endless_shapes
from serving.outcomes import Load
from serving.records import PointRun
from serving.run_verdict import PointSettings
from serving.running import Run

SOURCE = "penstock measure: closed loop"


async def run_closed_point(
    endpoint: Endpoint, model: str, mix: WorkloadMix, concurrency: int, settings: PointSettings, seed: int = 0
) -> PointRun:
    """Keep that many requests in flight until the point is long enough. Raises ``EndpointError`` where one fails."""
    shapes = endless_shapes(mix, seed)

    async def pace(run: Run) -> None:
        async def work() -> None:
            while True:
                await run.request(run.now_s, next(shapes))
                await asyncio.sleep(0)  # a request that fails at once must not keep the loop to itself

        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(work())

    load = Load(mix.name, concurrency=float(concurrency), source=SOURCE)
    return await Run(endpoint, model, load, settings, pace).result()
