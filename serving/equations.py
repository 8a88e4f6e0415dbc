"""What a run held, as the equation of the step-time model. Pure.

Over a run of D seconds, all of them spent in steps, the model says

    D = c0·(steps) + c_p·P + c_s·(output tokens) + c_k·Σ O·(I + O/2) + c_a·P·(I + O/2)/2

with P uncached prompt tokens in all. c_a, attention over prompts, is no part of the linear model and belongs to its
surface; its context is the mean one, I + O/2, by which a surface is asked. This holds of a burst as well as of a steady
run, as long as the engine was never idle and the steps are known:

- counted by the engine, they are taken as they are;
- of a steady run, steps = D ÷ step time, and the step time is the gap between chunks (ITL), or else the TPOT;
- of a burst the latencies of its beginning and its end differ too much. Its load tells: (output tokens) ÷ (sequences in
  a full batch) decode steps and (prompt tokens) ÷ (tokens of a step) prefill steps.
"""

from __future__ import annotations

from math import exp
from typing import NamedTuple

from serving.points import MeasuredPoint
from serving.roofline import BatchBounds
from serving.steady_points import unsteady_sign

#: Where nothing is known of the engine: vLLM's defaults for a large GPU, and no bound by KV.
UNKNOWN_BATCH = BatchBounds(max_num_seqs=1024, max_num_batched_tokens=8192, kv_tokens=float("inf"))
#: In a closed loop the mean in flight is its bound; in an open loop it stays this far below the most.
_CLOSED_LOOP_SHARE = 0.9


class Equation(NamedTuple):
    """What one busy second of a run held, and where on the surface it was: (KV tokens a step reads, mean context)."""

    steps: float
    prompt_tokens: float
    output_tokens: float
    kv_tokens: float
    prompt_context: float
    kv_use: float
    context: float
    mix: str

    @property
    def linear(self) -> tuple[float, float, float, float]:
        """The terms of the linear model."""
        return self.steps, self.prompt_tokens, self.output_tokens, self.kv_tokens


def equation(point: MeasuredPoint, batch: BatchBounds = UNKNOWN_BATCH) -> Equation:
    """The run's equation, per second in which its engine was busy. Needs requests, duration and tokens above 0."""
    busy_s = busy_seconds(point)
    return equation_with(point, _run_steps(point, busy_s, batch), busy_s)


def equation_with(point: MeasuredPoint, steps: float, busy_s: float) -> Equation:
    """The equation of a run that took so many steps in so many busy seconds."""
    kv_token_steps = point.kv_token_steps or point.output_tokens * point.context_tokens
    prompt_tokens = point.input_tokens - point.cached_tokens
    return Equation(
        steps=steps / busy_s,
        prompt_tokens=prompt_tokens / busy_s,
        output_tokens=point.output_tokens / busy_s,
        kv_tokens=kv_token_steps / busy_s,
        prompt_context=prompt_tokens * point.context_tokens / 2 / busy_s,
        kv_use=kv_token_steps / steps,
        context=point.context_tokens,
        mix=point.mix,
    )


def is_open_loop(point: MeasuredPoint) -> bool:
    """Whether the run was steady at a rate, not at a number in flight: it lasted as long as its arrivals did.

    A closed loop is told by its bound where no rate is stated: in the mean nearly as many are in flight as at most.
    """
    if unsteady_sign(point) is not None:
        return False
    if point.offered_per_s is not None or point.concurrency is None:
        return True
    return point.in_flight is not None and point.in_flight < _CLOSED_LOOP_SHARE * point.concurrency


def load_steps(point: MeasuredPoint, batch: BatchBounds = UNKNOWN_BATCH) -> float:
    """Steps that a closed loop or a burst must take, from its lengths and how many are in flight.

    In a burst prompts are read before answers are written. In a steady closed loop they are read beside them: a request
    is in as many steps as it emits tokens, and in more where its prompt fills several.
    """
    in_flight = point.requests if point.concurrency is None else min(point.requests, point.concurrency)
    resident = batch.resident(point.context_tokens, in_flight)
    prompt_steps = (point.input_tokens - point.cached_tokens) / batch.max_num_batched_tokens
    if unsteady_sign(point) is not None:
        return point.output_tokens / resident + prompt_steps
    own_steps = point.output_tokens + max(0.0, prompt_steps - point.requests)
    return max(own_steps / resident, prompt_steps)


def busy_seconds(point: MeasuredPoint) -> float:
    """Seconds of the run in which something was in flight.

    Under Poisson arrivals with L in flight in the mean an engine is idle for a share e^(−L) of the time. A closed loop,
    a burst, and a run whose steps were counted are taken as busy throughout.
    """
    if point.busy_s is not None:
        return point.busy_s
    if point.steps is not None or point.in_flight is None or not is_open_loop(point):
        return point.duration_s
    return point.duration_s * (1 - exp(-point.in_flight))


def _run_steps(point: MeasuredPoint, busy_s: float, batch: BatchBounds) -> float:
    """Steps of the engine in the run: counted, else by its step time if it was steady, else by its load."""
    if point.steps is not None:
        return point.steps
    if point.step_s is not None and unsteady_sign(point) is None:
        return busy_s / point.step_s
    return load_steps(point, batch)
