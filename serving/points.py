"""One run of a serving benchmark: the load, and what was seen of it, whoever measured it and with what. Pure."""

from __future__ import annotations

import msgspec


class MeasuredPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. Tokens are totals over the run's completed requests; None is what its source does not say.

    ``mix`` names the workload: runs with the same lengths have the same mix. ``input_tokens`` holds all prompt tokens,
    ``cached_tokens`` those of them that a prefix cache had. ``steps`` are the engine's steps in the run,
    ``kv_token_steps`` the sum of O·(I + O/2) over its requests. ``concurrency`` is the bound of a closed loop, or the
    most that were in flight; ``offered_per_s`` the request rate of an open loop. ``source`` says where it is from.
    """

    mix: str
    requests: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    concurrency: float | None = None
    offered_per_s: float | None = None
    cached_tokens: int = 0
    failed: int = 0
    steps: float | None = None
    kv_token_steps: float | None = None
    ttft_mean_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_mean_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p95_s: float | None = None
    tpot_p99_s: float | None = None
    e2e_mean_s: float | None = None
    source: str = ""
