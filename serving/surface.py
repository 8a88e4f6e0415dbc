"""Where the linear step-time model is off: the measured factors, interpolated over KV use and context. Pure.

The linear model misses what is not linear in its counts (attention over long prompts, kernels that fill up). A surface
holds measured ÷ modelled step time at each measured place, and interpolates between them by inverse squared distance
(Shepard), with both axes as logarithms: kernels are tuned by powers of two. At a measured place it gives that place's
factor back; outside the places it stays between the factors measured. What attention over a prompt costs, which grows
with the context too, is kept apart as a coefficient of its own, since it can be followed beyond the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, log

import msgspec

from serving.capacity import StepTimeModel

#: Places nearer than this share of a power of e are one place.
_SAME = 1e-6


class SurfacePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured place: KV tokens read by a step, mean context of a request in tokens, measured ÷ modelled time."""

    kv_tokens: float
    context_tokens: float
    factor: float


class Surface(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Factors by which a step really lasts, over (KV use, context).

    ``prompt_context_s`` is what attention adds to a prompt token for each token of the context before it, taken as half
    of the mean context; 0 where the points do not tell it. That is an empirical regressor: prompts attend to half of
    their own length, and to what was cached, but a place on the surface is known by its mean context alone.
    """

    points: tuple[SurfacePoint, ...]
    prompt_context_s: float = 0.0

    def factor_at(self, kv_tokens: float, context_tokens: float) -> float:
        """Measured ÷ modelled step time there. KV tokens and context in tokens, both positive."""
        weights = []
        for point in self.points:
            distance2 = log(kv_tokens / point.kv_tokens) ** 2 + log(context_tokens / point.context_tokens) ** 2
            if distance2 < _SAME**2:
                return point.factor
            weights.append(1 / distance2)
        return fsum(w * p.factor for w, p in zip(weights, self.points, strict=True)) / fsum(weights)

    def step_time_at(self, model: StepTimeModel, kv_tokens: float, context_tokens: float) -> StepTimeModel:
        """The linear model as it holds around that place."""
        return self.attentive(model, context_tokens).slowed(self.factor_at(kv_tokens, context_tokens))

    def attentive(self, model: StepTimeModel, context_tokens: float) -> StepTimeModel:
        """The linear model with attention over prompts of that context, and no factor yet."""
        prompt_token_s = model.prompt_token_s + self.prompt_context_s * context_tokens / 2
        return msgspec.structs.replace(model, prompt_token_s=prompt_token_s)


def surface_of(places: Sequence[tuple[float, float, float]], prompt_context_s: float = 0.0) -> Surface:
    """The surface through (KV tokens, context tokens, factor), places measured twice at their mean factor.

    Raises ``ValueError`` where there is no place, or one is not positive.
    """
    if not places or min(min(place) for place in places) <= 0:
        raise ValueError("a surface needs places, each with KV tokens, context and factor above 0")
    factors: dict[tuple[float, float], list[float]] = {}
    for kv_tokens, context_tokens, factor in places:
        factors.setdefault((kv_tokens, context_tokens), []).append(factor)
    return Surface(
        tuple(SurfacePoint(kv, context, fsum(found) / len(found)) for (kv, context), found in factors.items()),
        prompt_context_s,
    )
