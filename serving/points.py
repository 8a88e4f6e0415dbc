"""One run of a serving benchmark: the load, and what was seen of it, whoever measured it and with what. Pure."""

from __future__ import annotations

import msgspec


class MeasuredPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. Tokens are totals over the run's completed requests; None is what its source does not say.

    ``mix`` names the workload: runs with the same lengths have the same mix. ``input_tokens`` holds all prompt tokens,
    ``cached_tokens`` those of them that a prefix cache had. ``steps`` are the engine's steps in the run,
    ``kv_token_steps`` the sum of O·(I + O/2) over its requests. ``concurrency`` is the bound of a closed loop, or the
    most that were in flight; ``offered_per_s`` the request rate of an open loop. ``source`` says where it is from.
    TPOT is the mean over requests of their time per token, ITL the mean over all gaps between chunks. ``busy_s`` are
    the seconds of the run in which the engine worked.
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
    itl_mean_s: float | None = None
    busy_s: float | None = None

    @property
    def mean_input_tokens(self) -> float:
        """Prompt tokens of a request, in the mean."""
        return self.input_tokens / self.requests

    @property
    def mean_output_tokens(self) -> float:
        """Tokens of an answer, in the mean."""
        return self.output_tokens / self.requests

    @property
    def context_tokens(self) -> float:
        """I + O/2: the context in which the mean request's tokens are emitted."""
        return self.mean_input_tokens + self.mean_output_tokens / 2

    @property
    def life_s(self) -> float | None:
        """Mean time from sending a request to its last token, or TTFT + (time per token)·(O − 1); None if unknown.

        Medians stand in for means that a source leaves out. The mean TPOT weighs short answers as much as long ones,
        and a gap between chunks may bring several tokens: so the lesser of the two is the time of a token.
        """
        if self.e2e_mean_s is not None:
            return self.e2e_mean_s
        ttft_s = self.ttft_p50_s if self.ttft_mean_s is None else self.ttft_mean_s
        tpot_s = self.tpot_p50_s if self.tpot_mean_s is None else self.tpot_mean_s
        token_s = min((each for each in (tpot_s, self.itl_mean_s) if each is not None), default=None)
        if ttft_s is None or token_s is None:
            return None
        return ttft_s + token_s * max(0.0, self.mean_output_tokens - 1)

    @property
    def in_flight(self) -> float | None:
        """Requests in flight in the mean, by Little's law; None where their life is unknown."""
        return None if self.life_s is None else self.requests * self.life_s / self.duration_s

    @property
    def step_s(self) -> float | None:
        """Mean duration of an engine step as clients see it: the gap between chunks, or else the time per token."""
        return self.itl_mean_s or self.tpot_mean_s or self.tpot_p50_s
