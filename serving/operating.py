"""A profile where a mix and an SLO put it: the step-time model that holds there, and the knee. Pure."""

from __future__ import annotations

from math import fsum
from typing import NamedTuple

from serving.capacity import Slo, StepTimeModel, WorkloadMix
from serving.profile import Profile
from serving.stepsim import Knee, knee


class OperatingPoint(NamedTuple):
    """The knee of one replica, the step-time model that it was found with, and a note where that is extrapolated."""

    step_time: StepTimeModel
    knee: Knee
    note: str


def mean_context_tokens(mix: WorkloadMix) -> float:
    """The context that a request of the mix has on the way through its answer, I + O/2, in the mean."""
    return fsum(shape.input_tokens + shape.output_tokens / 2 for shape in mix.shapes) / len(mix.shapes)


def extrapolation_note(profile: Profile, mix: WorkloadMix) -> str:
    """Empty where the profile was measured at the mix's context; else what to show beside all that follows from it."""
    return profile.extrapolated_step_time(profile.limits.kv_tokens, mean_context_tokens(mix))[1]


def step_time_around(profile: Profile, mix: WorkloadMix, slo: Slo) -> StepTimeModel:
    """The profile's step-time model for loads of the mix near the SLO.

    A profile with a surface has one model for each KV use. The use near the SLO is that of the linear model's knee:
    requests in flight by Little's law, times their context. Raises ``InfeasibleSloError``.
    """
    if profile.surface is None:
        return profile.step_time
    context_tokens = mean_context_tokens(mix)
    found = knee(profile.step_time, profile.limits, mix, slo)
    in_flight = found.requests_per_s * mix.mean_output_tokens * found.tpot_s
    kv_tokens = min(profile.limits.kv_tokens, max(1.0, in_flight * context_tokens))
    return profile.extrapolated_step_time(kv_tokens, context_tokens)[0]


def operating_point(profile: Profile, mix: WorkloadMix, slo: Slo) -> OperatingPoint:
    """The largest load of the mix that one replica serves under the SLO. Takes seconds.

    Raises ``InfeasibleSloError`` where no load meets it.
    """
    step_time = step_time_around(profile, mix, slo)
    return OperatingPoint(step_time, knee(step_time, profile.limits, mix, slo), extrapolation_note(profile, mix))
