"""What a law says of a run that it has not seen, from what is known of the run beforehand. Pure.

That is its lengths, how many requests it has, and either how many are in flight (a closed loop, a burst) or at what
rate they come (an open loop). Its own steps and latencies, counted or seen, are what the prediction is held against.

- A closed loop or a burst keeps the engine full: its load gives the steps, and the law how long they take. The error is
  one of the token rate.
- An open loop below saturation lasts as long as its arrivals do, whatever the engine: there is no token rate to
  predict. A step of T seconds works off what came in it: with λ requests a second of w seconds of work each beside the
  empty step c0, T = c0 + (λ/b)·w·T, of the share b = 1 − e^(−λ·O·T) of the time in which anything is in flight (O steps
  a request). The error is one of the step time.
"""

from __future__ import annotations

from math import exp, inf

from serving.capacity import StepTimeModel
from serving.equations import busy_seconds, equation, equation_with, is_open_loop, load_steps
from serving.laws import Law, rate_error
from serving.points import MeasuredPoint
from serving.roofline import BatchBounds

#: Halvings of the interval in which the step time lies, and rounds between it and the surface's place.
_HALVINGS = 60
_ROUNDS = 20


def unseen_error(law: Law, point: MeasuredPoint, batch: BatchBounds) -> float:
    """By how much the law is too fast for the run, as a share: of its token rate, or in an open loop of its steps."""
    if is_open_loop(point):
        return rate_error(open_loop_step_s(law, point) * equation(point, batch).steps)
    return law.error(equation_with(point, load_steps(point, batch), busy_seconds(point)))


def open_loop_step_s(law: Law, point: MeasuredPoint) -> float:
    """The mean step at the run's rate and lengths; infinite where the law says that the rate saturates it."""
    per_s = point.offered_per_s or point.requests / point.duration_s
    kv_per_request = (point.kv_token_steps or point.output_tokens * point.context_tokens) / point.requests
    model, step_s = law.model, 0.0
    for _ in range(1 if law.surface is None else _ROUNDS):
        step_s = _step_s(model, point, per_s, kv_per_request)
        if step_s == inf:
            return inf
        kv_use = kv_per_request * _starts_per_step(per_s, point.mean_output_tokens, step_s)
        model = law.step_time_at(kv_use, point.context_tokens)
    return step_s


def _step_s(model: StepTimeModel, point: MeasuredPoint, per_s: float, kv_per_request: float) -> float:
    outputs = point.mean_output_tokens
    prompt_tokens = (point.input_tokens - point.cached_tokens) / point.requests
    work_s = model.prompt_token_s * prompt_tokens + model.sequence_s * outputs + model.kv_token_s * kv_per_request
    if per_s * work_s >= 1:
        return inf
    # x/(1 − e^(−x)) ≤ 1 + x bounds the step time, and below it the equation has one root.
    least_s, most_s = 0.0, (model.base_s + work_s / outputs) / (1 - per_s * work_s)
    for _ in range(_HALVINGS):
        middle_s = (least_s + most_s) / 2
        if middle_s < model.base_s + work_s * _starts_per_step(per_s, outputs, middle_s):
            least_s = middle_s
        else:
            most_s = middle_s
    return most_s


def _starts_per_step(per_s: float, outputs: float, step_s: float) -> float:
    """Requests that come during a step in which anything is in flight: at the least one in each request's own steps."""
    in_flight = per_s * outputs * step_s
    return per_s * step_s / (1 - exp(-in_flight)) if in_flight > 1e-9 else 1 / outputs
