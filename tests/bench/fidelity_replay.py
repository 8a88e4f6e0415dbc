"""One schedule of requests, served by a real vLLM and by the step simulator, and what the two then differ in.

Both serve the very same requests at the very same moments (common random numbers), so that what is left between them is
no luck of the draw. Both are read by the same functions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from secrets import randbits
from time import monotonic
from typing import NamedTuple

import msgspec
import numpy as np
import psutil

from serving.capacity import EngineLimits, Slo, StepTimeModel, WorkloadMix
from serving.endpoint import FIRST_TOKEN_ID, Answer, Endpoint
from serving.engine.launch import Engine, EngineSpec
from serving.mixes import load_mix
from serving.outcomes import Load, RequestOutcome, Window, slo_load, summary
from serving.points import MeasuredPoint
from serving.profile import Profile, load_profile
from serving.stepsim import Arrival, percentile, simulate, unit_arrivals
from tests.support.engines import MODEL, family_of, free_port

PROFILE = "h100-llama-3.1-8b"
#: The longest request of every case fits, and the KV cache of each holds it.
MAX_MODEL_LEN = 8192
REQUEST_TIMEOUT_S = 300.0
DRAIN_TIMEOUT_S = 60.0
#: Share of the requests that only warm the replica up, as in the simulator's own judgement.
WARM_UP_SHARE = 0.2
#: Ids below this one are in the tiny model's vocabulary.
_TOKEN_ID_BOUND = 800


class Case(msgspec.Struct, frozen=True):
    """A mix with its lengths scaled, what bounds the batch, and an SLO at full speed; all ``slowdown`` times slower.

    ``short_of`` says what the batch runs out of first.
    Real vLLM costs CPU time for each token, so a virtual GPU at full speed would measure the host.
    """

    mix: str
    scale: float
    slo: Slo
    slowdown: float
    limits: Mapping[str, int] = {}
    short_of: str = "TPOT"

    @property
    def profile(self) -> Profile:
        """The virtual GPU's profile."""
        profile = load_profile(PROFILE)
        limits = msgspec.structs.replace(profile.limits, **{"max_model_len": MAX_MODEL_LEN, **self.limits})
        return msgspec.structs.replace(profile, limits=limits)

    @property
    def batch_limits(self) -> EngineLimits:
        """What bounds its batch."""
        return self.profile.limits

    @property
    def step_time(self) -> StepTimeModel:
        """The slowed device."""
        return self.profile.step_time.slowed(self.slowdown)

    @property
    def slowed_slo(self) -> Slo:
        """The SLO that means the same on the slowed device."""
        return self.slo.slowed(self.slowdown)

    @property
    def workload(self) -> WorkloadMix:
        """The scaled mix."""
        return load_mix(self.mix, self.scale)

    def spec(self) -> EngineSpec:
        """Its virtual GPU, on a free port."""
        return EngineSpec("virtual", MODEL, free_port(), profile=self.profile, slowdown=self.slowdown)

    def simulated(self, arrivals: Sequence[Arrival]) -> list[RequestOutcome]:
        """What the profile predicts of these requests."""
        return [
            RequestOutcome(
                outcome.arrival_s,
                outcome.arrival_s,
                outcome.first_token_s,
                outcome.finish_s,
                outcome.shape.input_tokens,
                outcome.shape.output_tokens,
            )
            for outcome in simulate(self.step_time, self.batch_limits, arrivals)
        ]

    def load(self, outcomes: Sequence[RequestOutcome]) -> float:
        """The SLO's percentiles over their bounds, the worse of the two, without the warm-up."""
        return slo_load(outcomes[int(len(outcomes) * WARM_UP_SHARE) :], self.slowed_slo)


class Replayed(NamedTuple):
    """The outcomes in order of arrival, how late the client sent (p99), and cores that the engine took meanwhile."""

    outcomes: list[RequestOutcome]
    lag_p99_s: float
    engine_cores: float


def schedule(mix: WorkloadMix, requests_per_s: float, duration_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals at that rate over that time. The same seed has the same gaps at each rate, stretched."""
    count = max(1, round(requests_per_s * duration_s))
    return [Arrival(one.time_s / requests_per_s, one.shape) for one in unit_arrivals(mix, count, seed)[:count]]


def stretched(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """The same requests, ``factor`` times as close to each other."""
    return [Arrival(arrival.time_s / factor, arrival.shape) for arrival in arrivals]


async def replay(engine: Engine, arrivals: Sequence[Arrival]) -> Replayed:
    """Send each request when it is due, and wait for every answer. Raises ``EndpointError`` where one fails."""
    ids = np.random.default_rng(randbits(64))
    prompts = [ids.integers(FIRST_TOKEN_ID, _TOKEN_ID_BOUND, a.shape.input_tokens).tolist() for a in arrivals]
    async with Endpoint(engine.url, None, REQUEST_TIMEOUT_S) as endpoint:
        await endpoint.drained(DRAIN_TIMEOUT_S)
        await endpoint.complete(MODEL, prompts[0][:1], 2)
        start_s, cpu_s = monotonic(), _cpu_s(engine)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_at(start_s + arrival.time_s, endpoint, prompt, arrival.shape.output_tokens))
                for arrival, prompt in zip(arrivals, prompts, strict=True)
            ]
        cores = (_cpu_s(engine) - cpu_s) / (monotonic() - start_s)
    outcomes = [
        RequestOutcome(
            arrival.time_s,
            answer.start_s - start_s,
            answer.first_token_s - start_s,
            answer.finish_s - start_s,
            answer.input_tokens,
            answer.output_tokens,
            answer.cached_tokens or 0,
        )
        for arrival, answer in zip(arrivals, [task.result() for task in tasks], strict=True)
    ]
    return Replayed(outcomes, percentile([outcome.lag_s for outcome in outcomes], 99), cores)


def point_of(mix: str, arrivals: Sequence[Arrival], outcomes: Sequence[RequestOutcome]) -> MeasuredPoint:
    """A run as a point, watched from the end of its warm-up to the last arrival."""
    window = Window(arrivals[int(len(arrivals) * WARM_UP_SHARE)].time_s, arrivals[-1].time_s)
    return summary(Load(mix, len(arrivals) / arrivals[-1].time_s), outcomes, window, None, 0.0)


async def _at(due_s: float, endpoint: Endpoint, prompt: list[int], output_tokens: int) -> Answer:
    await asyncio.sleep(max(0.0, due_s - monotonic()))
    return await endpoint.complete(MODEL, prompt, output_tokens)


def _cpu_s(engine: Engine) -> float:
    """CPU seconds that the server and all below it have taken."""
    total = 0.0
    for process in family_of(engine.pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
