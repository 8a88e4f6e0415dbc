"""How throughput buys latency: the loads one replica can carry, and what each does to TTFT and TPOT. Pure.

A curve is simulated, not drawn from a formula: each of its points is one Poisson rate of the mix, served step by step
by ``stepsim``, with the percentile that an SLO would look at. All points share their random numbers, so that a curve
is a function of its arguments and neighbours differ by their load alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from serving.capacity import (
    EngineLimits,
    ReplicaGroup,
    Slo,
    StepTimeModel,
    WorkloadMix,
    closed_form_requests_per_s,
)
from serving.stepsim import Arrival, Outcome, horizon_requests, percentile, simulate, unit_arrivals

#: An SLO that everything meets: thirty years.
WITHOUT_BOUNDS = Slo(1e9, 1e9)
#: Loads of a curve, as shares of the rate that no latency bound limits.
LOAD_SHARES = (
    *(0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7),
    *(0.74, 0.78, 0.81, 0.84, 0.86, 0.88, 0.9, 0.915, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99),
)
#: A coarser curve, of shorter runs, to see the shape by.
SKETCH_SHARES = LOAD_SHARES[::3]
SKETCH_REQUESTS = 1000
_WARM_UP_SHARE = 0.2


class Throughput(msgspec.Struct, frozen=True):
    """A rate of a mix, in requests and in uncached input and output tokens a second."""

    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float

    def over(self, divisor: float) -> Throughput:
        """The same rate, shared out: by GPUs, or by watts (tokens/s per watt are tokens per joule)."""
        return Throughput(
            self.requests_per_s / divisor, self.input_tokens_per_s / divisor, self.output_tokens_per_s / divisor
        )


class CurvePoint(msgspec.Struct, frozen=True):
    """One load of one replica, and the percentile of TTFT and TPOT that it gives."""

    rate: Throughput
    ttft_s: float
    tpot_s: float


def throughput_of(mix: WorkloadMix, requests_per_s: float) -> Throughput:
    """What that many requests of the mix are in tokens."""
    return Throughput(requests_per_s, requests_per_s * mix.mean_input_tokens, requests_per_s * mix.mean_output_tokens)


def throughput_curve(
    step_time: StepTimeModel,
    limits: EngineLimits,
    mix: WorkloadMix,
    slo: Slo,
    shares: Sequence[float] = LOAD_SHARES,
    requests: int | None = None,
    seed: int = 0,
) -> tuple[CurvePoint, ...]:
    """The loads of one replica in ascending order, up to the last that meets the TTFT bound of ``slo``.

    Its TPOT bound ends no curve, for TPOT is the axis that a curve is read along. Percentiles are the SLO's. Each load
    is run for ``requests`` arrivals, as many as for a knee under the SLO where that is not said. Raises ``ValueError``
    where the mix holds a request that the replica can never run.
    """
    ceiling = closed_form_requests_per_s(ReplicaGroup(1, step_time, limits, WITHOUT_BOUNDS), mix)
    at_one_a_second = unit_arrivals(mix, requests or horizon_requests(ceiling, mix, slo), seed)
    points: list[CurvePoint] = []
    for rate in sorted(ceiling * share for share in shares):
        arrivals = [Arrival(arrival.time_s / rate, arrival.shape) for arrival in at_one_a_second]
        point = _point(simulate(step_time, limits, arrivals), throughput_of(mix, rate), slo.percentile)
        if point.ttft_s > slo.ttft_s:
            break
        points.append(point)
    return tuple(points)


def _point(outcomes: Sequence[Outcome], rate: Throughput, percent: float) -> CurvePoint:
    steady = outcomes[int(len(outcomes) * _WARM_UP_SHARE) :]
    return CurvePoint(
        rate,
        ttft_s=percentile([o.ttft_s for o in steady], percent),
        tpot_s=percentile([o.tpot_s for o in steady if o.shape.output_tokens > 1], percent),
    )
