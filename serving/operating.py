"""A profile where a mix and an SLO put it: the step-time model that holds there, and the knee. Pure."""

from __future__ import annotations

from math import fsum, log, sqrt
from typing import NamedTuple

from serving.capacity import InfeasibleSloError, Slo, StepTimeModel, WorkloadMix
from serving.profile import Profile
from serving.stepsim import Knee, knee
from serving.surface import Surface

#: Passes after the linear model's knee, and the part of a step's duration that is near enough: fits are no better.
MOST_PASSES = 6
SETTLED = 0.02


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

    Takes seconds where the profile has a surface, and then raises ``InfeasibleSloError`` as ``operating_point`` does.
    """
    return profile.step_time if profile.surface is None else operating_point(profile, mix, slo).step_time


def operating_point(profile: Profile, mix: WorkloadMix, slo: Slo) -> OperatingPoint:
    """The largest load of the mix that one replica serves under the SLO. Takes seconds.

    A profile with a surface has one model for each KV use, and the load decides the use: the model is one whose knee
    uses the KV that the model holds at. Raises ``InfeasibleSloError`` where no load meets the SLO.
    """
    note = extrapolation_note(profile, mix)
    if profile.surface is None:
        return OperatingPoint(profile.step_time, knee(profile.step_time, profile.limits, mix, slo), note)
    found = _settled(profile, profile.surface, mix, slo)
    return OperatingPoint(found.step_time, found.knee, note)


class _Pass(NamedTuple):
    """The model at one KV use (tokens), its knee, and what that knee uses.

    ``off`` is how much longer a step takes at the knee's own use than the model says, as a factor.
    """

    kv_tokens: float
    step_time: StepTimeModel
    knee: Knee
    used_tokens: float
    off: float


class _Bounds(NamedTuple):
    """KV uses (tokens) that were too little and too much for what their knees use; None while unknown."""

    low: float | None
    high: float | None

    def narrowed(self, tried: float, used: float) -> _Bounds:
        """With one more use tried; ``used`` is 0 where no load meets the SLO there."""
        return _Bounds(tried, self.high) if used > tried else _Bounds(self.low, tried)

    @property
    def halfway(self) -> float | None:
        return sqrt(self.low * self.high) if self.low and self.high else None


def _settled(profile: Profile, surface: Surface, mix: WorkloadMix, slo: Slo) -> _Pass:
    """Of a few passes the knee that fits its own model best: each is at the KV use of the knee before.

    Once one use was too little for its knee and another too much, or too much for any load, it is halfway between them,
    as logarithms. Where none fits, a model that is too slow for its knee is rather taken than one that is too fast.
    """
    passes = [_first(profile, surface, mix, slo)]
    bounds = _Bounds(None, None)
    wanted = passes[0].kv_tokens
    for _ in range(MOST_PASSES - 1):
        latest = passes[-1]
        if abs(log(latest.off)) <= SETTLED:
            break
        bounds = bounds.narrowed(wanted, latest.used_tokens if wanted == latest.kv_tokens else 0.0)
        wanted = bounds.halfway or latest.used_tokens
        try:
            passes.append(_pass(profile, surface, mix, slo, wanted))
        except InfeasibleSloError:
            continue
    return min(passes, key=lambda each: (log(each.off) > SETTLED, abs(log(each.off))))


def _first(profile: Profile, surface: Surface, mix: WorkloadMix, slo: Slo) -> _Pass:
    """The pass at the KV use of the linear model's knee, or of a request alone where one of the two has none."""
    try:
        line = knee(profile.step_time, profile.limits, mix, slo)
        return _pass(profile, surface, mix, slo, _kv_use(profile, mix, line))
    except InfeasibleSloError:
        return _pass(profile, surface, mix, slo, mean_context_tokens(mix))


def _pass(profile: Profile, surface: Surface, mix: WorkloadMix, slo: Slo, kv_tokens: float) -> _Pass:
    context_tokens = mean_context_tokens(mix)
    step_time = surface.step_time_at(profile.step_time, kv_tokens, context_tokens)
    found = knee(step_time, profile.limits, mix, slo)
    used = _kv_use(profile, mix, found)
    off = surface.factor_at(used, context_tokens) / surface.factor_at(kv_tokens, context_tokens)
    return _Pass(kv_tokens, step_time, found, used, off)


def _kv_use(profile: Profile, mix: WorkloadMix, found: Knee) -> float:
    """KV tokens that a step reads at a knee: requests in flight by Little's law, one at least, times their context."""
    in_flight = max(1.0, found.requests_per_s * mix.mean_output_tokens * found.tpot_s)
    return min(profile.limits.kv_tokens, in_flight * mean_context_tokens(mix))
