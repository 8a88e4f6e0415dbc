"""Recorded runs of a simulated engine: what ``penstock measure`` would have seen of it, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile

from serving.capacity import EngineLimits, StepTimeModel, WorkloadMix
from serving.measure import MeasureSettings, fitting_mixes
from serving.measured_knees import due_in, verdicts
from serving.openloop import endless_arrivals, endless_shapes
from serving.outcomes import Load, RequestOutcome, Window, summary
from serving.records import Kind, PointRun, Record
from serving.run_verdict import LIVES, State
from serving.search import SearchPlan, next_rate
from serving.stepsim import Arrival, Outcome, simulate

STEP_TIME = StepTimeModel(0.01, 2e-5, 2e-4, 2e-6)
#: Lives of a lone request that a run lasts, of which the first fifth warms up, and requests of a lone one.
_LIVES = 100
_ALONE = 60


def as_outcome(outcome: Outcome) -> RequestOutcome:
    """A simulated answer as a client records it."""
    shape = outcome.shape
    return RequestOutcome(
        outcome.arrival_s,
        outcome.arrival_s,
        outcome.first_token_s,
        outcome.finish_s,
        shape.input_tokens,
        shape.output_tokens,
    )


def record_of(kind: Kind, mix: WorkloadMix, level: float, outcomes: Sequence[RequestOutcome], state: State) -> Record:
    """The record of a run with these outcomes."""
    window = Window(outcomes[len(outcomes) // 5].scheduled_s, outcomes[-1].scheduled_s)
    load = Load(mix.name, offered_per_s=level) if kind == "open" else Load(mix.name, concurrency=level)
    point = summary(load, outcomes, window, None, 0.0)
    return Record(
        kind, mix.name, level, PointRun(point, state, "", tuple(outcomes), (window.start_s, window.end_s), 0.001)
    )


def anchor_of(mix: WorkloadMix, limits: EngineLimits, step_time: StepTimeModel = STEP_TIME) -> Record:
    """A request at a time."""
    now_s, outcomes = 0.0, []
    for shape in islice(endless_shapes(mix, 0), _ALONE):
        (alone,) = simulate(step_time, limits, [Arrival(now_s, shape)])
        outcomes.append(as_outcome(alone))
        now_s = alone.finish_s
    return record_of("anchor", mix, 1.0, outcomes, "steady")


def rate_of(
    mix: WorkloadMix, limits: EngineLimits, rate: float, life_s: float, step_time: StepTimeModel = STEP_TIME
) -> Record:
    """A Poisson rate; over-saturated where requests live too long for the run to be steady."""
    until_s = _LIVES * life_s
    arrivals = list(takewhile(lambda arrival: arrival.time_s < until_s, endless_arrivals(mix, rate, 0)))
    outcomes = [as_outcome(outcome) for outcome in simulate(step_time, limits, arrivals)]
    late = LIVES * sum(o.e2e_s for o in outcomes) / len(outcomes) > 0.8 * until_s
    return record_of("open", mix, rate, outcomes, "over-saturated" if late else "steady")


def sweep_of(limits: EngineLimits, settings: MeasureSettings, step_time: StepTimeModel = STEP_TIME) -> list[Record]:
    """All runs of a measurement."""
    mixes = fitting_mixes(limits)
    records = [anchor_of(mix, limits, step_time) for mix in mixes]
    for mix, anchor in zip(mixes, list(records), strict=True):
        lives = [outcome.e2e_s for outcome in due_in(anchor)]
        life_s = sum(lives) / len(lives)
        plan = SearchPlan(4 / life_s, settings.tolerance, settings.search_points)
        while (rate := next_rate(plan, verdicts(records, mix.name, settings.slo))) is not None:
            records.append(rate_of(mix, limits, rate, life_s, step_time))
    return records
