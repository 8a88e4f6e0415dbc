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
    busy_s = _busy_s(point)
    steps = run_steps(point, batch)
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


def run_steps(point: MeasuredPoint, batch: BatchBounds = UNKNOWN_BATCH) -> float:
    """Steps of the engine in the run: counted, else by its step time if it was steady, else by its load."""
    if point.steps is not None:
        return point.steps
    if point.step_s is not None and unsteady_sign(point) is None:
        return _busy_s(point) / point.step_s
    in_flight = point.requests if point.concurrency is None else min(point.requests, point.concurrency)
    resident = batch.resident(point.context_tokens, in_flight)
    return point.output_tokens / resident + (point.input_tokens - point.cached_tokens) / batch.max_num_batched_tokens


def _busy_s(point: MeasuredPoint) -> float:
    """Seconds of the run in which something was in flight.

    Under Poisson arrivals with L in flight in the mean an engine is idle for a share e^(−L) of the time. A closed loop,
    a burst, and a run whose steps were counted are taken as busy throughout.
    """
    if point.busy_s is not None:
        return point.busy_s
    in_flight = point.in_flight
    if point.steps is not None or in_flight is None or unsteady_sign(point) is not None:
        return point.duration_s
    if point.concurrency is not None and in_flight >= _CLOSED_LOOP_SHARE * point.concurrency:
        return point.duration_s
    return point.duration_s * (1 - exp(-in_flight))
