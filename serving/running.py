"""One run against a live endpoint: requests sent as a pacer says, watched until the rules have a verdict.

Prompts are random token ids drawn anew in every process, so that their length is exact and no prompt shares a prefix
with another, not even with the same point of an interrupted run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from secrets import randbits
from time import monotonic

import numpy as np

from serving.capacity import RequestShape
from serving.endpoint import FIRST_TOKEN_ID, Answer, Endpoint, EndpointError, EngineBusyError
from serving.enginefacts import Counters
from serving.outcomes import Load, RequestOutcome, Window, overlapping, summary
from serving.records import PointRun
from serving.run_verdict import PointSettings, Seen, Verdict, lag_p99_s, verdict, window_of
from serving.trend import Sample

#: Even a tiny vocabulary has the ids below.
_TOKEN_ID_BOUND = 800
#: Samples and marks in the planned time of a point.
_SAMPLES = 200
_MARKS = 15
_LEAST_SAMPLE_S = 0.02
#: Prompts that share no prefix find at most this share of their tokens in a prefix cache.
MOST_CACHED_SHARE = 0.01


class Run:
    """The requests of one run. ``pace`` sends them by ``request`` until it is cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        load: Load,
        settings: PointSettings,
        pace: Callable[[Run], Awaitable[None]],
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._load = load
        self._settings = settings
        self._pace = pace
        self._ids = np.random.default_rng(randbits(64))
        self._open: dict[int, float] = {}
        self._numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self._refused = 0
        self._in_flight: list[Sample] = []
        self._ttft: list[Sample] = []
        self._outcomes: list[RequestOutcome] = []
        self._cached: list[int | None] = []
        self._marks: list[Counters] = []

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return monotonic() - self._origin_s

    async def result(self) -> PointRun:
        """Run, watch, and wait for the requests that count. Raises ``EndpointError`` if any request failed."""
        self._origin_s = monotonic()
        pacer = asyncio.ensure_future(self._pace(self))
        try:
            found = await self._watch(pacer)
            if found.state == "steady" and not await self._answered(found.window, pacer):
                why = f"requests were still open at its end after {self._settings.most_s:g} s; raise --most-point-s"
                found = Verdict("short", why, found.window)
        finally:
            pacer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(pacer, *self._tasks, return_exceptions=True)
        return self._result(found)

    def start(self, scheduled_s: float, shape: RequestShape) -> None:
        """Send a request now that was due then, and do not wait for it."""
        task = asyncio.create_task(self.request(scheduled_s, shape))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def request(self, scheduled_s: float, shape: RequestShape) -> None:
        """Send a request and take its answer down."""
        number = next(self._numbers)
        self._open[number] = scheduled_s
        prompt = self._ids.integers(FIRST_TOKEN_ID, _TOKEN_ID_BOUND, shape.input_tokens).tolist()
        try:
            self._take(scheduled_s, await self._endpoint.complete(self._model, prompt, shape.output_tokens))
        except EngineBusyError as error:
            self._refused += 1
            if self._load.offered_per_s is None:
                self._failure = error
        except EndpointError as error:
            self._failure = self._failure or error
        finally:
            del self._open[number]

    def _take(self, scheduled_s: float, answer: Answer) -> None:
        first_s = answer.first_token_s - self._origin_s
        outcome = RequestOutcome(
            round(scheduled_s, 5),
            round(answer.start_s - self._origin_s, 5),
            round(first_s, 5),
            round(answer.finish_s - self._origin_s, 5),
            answer.input_tokens,
            answer.output_tokens,
            answer.cached_tokens or 0,
        )
        self._outcomes.append(outcome)
        self._cached.append(answer.cached_tokens)
        self._ttft.append(Sample(first_s, outcome.ttft_s))

    async def _watch(self, pacer: asyncio.Future[None]) -> Verdict:
        sample_s = max(_LEAST_SAMPLE_S, self._settings.watch_s / _SAMPLES)
        mark_s = self._settings.watch_s / _MARKS
        next_mark_s = 0.0
        while True:
            await asyncio.sleep(sample_s)
            self._check(pacer)
            self._in_flight.append(Sample(self.now_s, len(self._open)))
            if self.now_s < next_mark_s:
                continue
            next_mark_s = min(self.now_s + mark_s, self._settings.most_s)
            counters = await self._endpoint.counters()
            self._marks.append(counters._replace(time_s=counters.time_s - self._origin_s))
            seen = self._seen()
            if self._refused:
                why = f"the engine refused {self._refused} requests for want of capacity"
                return Verdict("over-saturated", why, window_of(self._settings, seen))
            found = verdict(self._settings, seen)
            if found is not None:
                return found

    async def _answered(self, window: Window, pacer: asyncio.Future[None]) -> bool:
        """Wait, under unchanged load, for every request due in the window; false where the run's time is up first."""
        while any(window.start_s <= scheduled_s < window.end_s for scheduled_s in self._open.values()):
            if self.now_s >= self._settings.most_s:
                return False
            await asyncio.sleep(_LEAST_SAMPLE_S)
            self._check(pacer)
        return True

    def _check(self, pacer: asyncio.Future[None]) -> None:
        if self._failure is not None:
            raise EndpointError(f"{self._name()}: a request failed: {self._failure}") from self._failure
        if pacer.done():
            pacer.result()
            raise EndpointError(f"{self._name()}: its pacer ended before the run")

    def _seen(self) -> Seen:
        ttft = sorted(self._ttft)
        outcomes = sorted(self._outcomes, key=lambda outcome: outcome.scheduled_s)
        return Seen(self._in_flight, ttft, outcomes, self._marks, self._load.offered_per_s)

    def _result(self, found: Verdict) -> PointRun:
        window = found.window
        if window.duration_s <= 0:
            window = Window(0.0, max(self._marks[-1].time_s, _LEAST_SAMPLE_S))
        outcomes = overlapping(self._outcomes, window)
        self._check_cache(window)
        return PointRun(
            point=summary(
                self._load, self._outcomes, window, self._counted(window, "steps"), self._settings.turnaround_s
            ),
            state=found.state,
            why=found.why,
            outcomes=tuple(outcomes),
            window_s=(round(window.start_s, 4), round(window.end_s, 4)),
            lag_p99_s=round(lag_p99_s(outcomes), 5),
        )

    def _counted(self, window: Window, counter: str) -> float | None:
        """By how much a counter rose between the marks at the window's ends."""
        values = [getattr(mark, counter) for mark in self._marks if window.start_s <= mark.time_s <= window.end_s]
        return values[-1] - values[0] if len(values) > 1 and None not in values else None

    def _check_cache(self, window: Window) -> None:
        """Raise ``EndpointError`` where the engine found prompts in its cache that nobody can have put there."""
        prompts = sum(o.input_tokens for o in self._outcomes)
        told = [cached for cached in self._cached if cached is not None]
        hits = sum(told) if told else self._counted(window, "prefix_hit_tokens") or 0.0
        if hits > MOST_CACHED_SHARE * prompts:
            raise EndpointError(
                f"{self._name()}: the engine found {hits:.0f} of {prompts} prompt tokens in its prefix cache, though "
                "no two prompts share a prefix, so prefill would look faster than it is; start it without caching "
                "(--no-enable-prefix-caching), and see that nobody else uses it"
            )

    def _name(self) -> str:
        load = self._load
        at = f"{load.offered_per_s:.3g} requests/s" if load.offered_per_s else f"concurrency {load.concurrency:g}"
        return f"{load.mix} at {at}"
