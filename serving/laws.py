"""The laws that points are fitted with: the linear step-time model, alone, within bounds, or with a surface. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import msgspec

from serving.capacity import StepTimeModel
from serving.equations import Equation
from serving.roofline import Roofline
from serving.solve import bounded_coefficients, mix_weights, nonnegative_coefficients
from serving.surface import Surface, surface_of

#: Where the linear model misses a point by more than this, a surface of measured factors is laid over it.
LINEAR_MISS = 0.10


class Law(msgspec.Struct, frozen=True):
    """A law of step times: the linear model, and where it misses, the surface over it.

    ``linear_miss`` is the size of the worst error of the linear fit by itself, which calls for a surface.
    """

    model: StepTimeModel
    surface: Surface | None = None
    linear_miss: float = 0.0

    def step_time_at(self, kv_tokens: float, context_tokens: float) -> StepTimeModel:
        """The linear model as it holds around that place."""
        return self.model if self.surface is None else self.surface.step_time_at(self.model, kv_tokens, context_tokens)

    def error(self, held: Equation) -> float:
        """By how much the law's token rate exceeds the measured one, as a share of it."""
        return rate_error(linear_share(self.step_time_at(held.kv_use, held.context), held))


#: From what the runs held to the law that explains them.
Fitter = Callable[[Sequence[Equation]], Law]


def linear_share(model: StepTimeModel, held: Equation) -> float:
    """Seconds that the linear model takes for what one measured second held: above 1 where it is too slow."""
    coefficients = (model.base_s, model.prompt_token_s, model.sequence_s, model.kv_token_s)
    return sum(c * x for c, x in zip(coefficients, held.linear, strict=True))


def rate_error(share: float) -> float:
    """By how much a token rate is too high where the model takes that share of the measured time."""
    return 1 / share - 1 if share > 0 else inf


def linear_law(held: Sequence[Equation]) -> Law:
    """Non-negative least squares."""
    return Law(StepTimeModel(*nonnegative_coefficients([each.linear for each in held])))


def linear_law_with_surface(held: Sequence[Equation]) -> Law:
    """The same, with a surface where it misses."""
    law = linear_law(held)
    miss = _miss(law, held)
    return Law(law.model, None, miss) if miss <= LINEAR_MISS else _with_surface(law.model, held, 0.0, miss)


def bounded_fitter(facts: Roofline) -> Fitter:
    """Fits within the roofline; where the linear model misses, with attention over prompts and a surface."""

    def fitted(held: Sequence[Equation]) -> Law:
        weights = mix_weights([each.mix for each in held])
        rows = [each.linear for each in held]
        law = Law(StepTimeModel(*bounded_coefficients(rows, weights, facts.spans[:4], speed_known=facts.scaled)))
        miss = _miss(law, held)
        if miss <= LINEAR_MISS:
            return Law(law.model, None, miss)
        attentive = [(*each.linear, each.prompt_context) for each in held]
        *linear, prompt_context_s = bounded_coefficients(attentive, weights, facts.spans, speed_known=facts.scaled)
        return _with_surface(StepTimeModel(*linear), held, prompt_context_s, miss)

    return fitted


def _miss(law: Law, held: Sequence[Equation]) -> float:
    return max(abs(law.error(each)) for each in held)


def _with_surface(model: StepTimeModel, held: Sequence[Equation], prompt_context_s: float, miss: float) -> Law:
    attentive = Surface((), prompt_context_s)
    places = [
        (each.kv_use, each.context, 1 / linear_share(attentive.attentive(model, each.context), each)) for each in held
    ]
    return Law(model, surface_of(places, prompt_context_s), miss)
