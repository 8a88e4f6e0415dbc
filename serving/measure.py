"""``penstock measure``: find what a live endpoint can do under an SLO, and write it down as a profile.

For each mix one anchor (a lone request at a time: the empty step) and a search for the largest Poisson rate that meets
the SLO (``search``). The step-time model is fitted from the steady runs of both in which the engine worked for many
steps on end. Every finished run goes to the journal, from which an interrupted measurement goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import msgspec

from serving.capacity import EngineLimits, Slo, WorkloadMix
from serving.closedloop import run_closed_point
from serving.endpoint import Endpoint
from serving.enginefacts import EngineFacts, Stated, settled_facts
from serving.identify import identifiability, planned_rows
from serving.journal import Journal
from serving.measured_knees import due_in, infeasible, verdicts
from serving.measurement import MeasureError, Measurement, Target, assemble
from serving.mixes import MIX_NAMES, load_mix
from serving.openloop import run_point
from serving.records import Kind, PointRun, Record
from serving.run_verdict import PointSettings, expected_s
from serving.search import SearchPlan, Tried, check_plan, next_rate
from serving.solve import check_solver

#: The mixes shrink no further than this to fit a context.
_SMALLEST_SCALE = 1 / 256
#: An anchor needs few requests: alike, one after the other.
_ANCHOR_REQUESTS = 10
#: A search starts with so many requests in flight, were they to live as long as alone.
_START_IN_FLIGHT = 4
#: Rates of a mix that cannot meet the SLO, run for the fit alone.
_FIT_POINTS = 3
#: A warm-up covers so many lives of a lone request.
_WARM_UP_LIVES = 2
#: Near its knee a request is expected to live so many times as long as alone.
_LOADED = 2
#: Runs repeated in one measurement because they were unsteady, or the client was late.
MOST_RETRIES = 4
#: An engine drops what is left within a step or two.
_DRAIN_TIMEOUT_S = 20.0


class MeasureSettings(msgspec.Struct, frozen=True):
    """How to measure. ``search_points`` bounds the open loops of a mix, ``tolerance`` is a knee's as a share of it."""

    slo: Slo
    point: PointSettings = PointSettings()
    search_points: int = 7
    tolerance: float = 0.1
    request_timeout_s: float = 120.0
    seed: int = 0


class MeasureTarget(msgspec.Struct, frozen=True):
    """What to measure: a URL, the profile's name, and what the operator states (``notes`` in free words)."""

    url: str
    name: str
    settings: MeasureSettings
    stated: Stated = Stated()
    model: str | None = None
    api_key: str | None = None
    notes: str = ""


class Progress(NamedTuple):
    """How far a measurement has come: runs done of the most there may be, what is next, about how long is left."""

    done: int
    total: int
    what: str
    left_s: float


class Watcher(NamedTuple):
    """Who is told: ``progress`` before each run, ``news`` in a sentence when something is worth knowing."""

    progress: Callable[[Progress], None]
    news: Callable[[str], None]


async def measure(
    target: MeasureTarget, journal_path: Path, watcher: Watcher, keep: Callable[[Measurement], None]
) -> Measurement:
    """Measure the endpoint, or go on measuring it, fit its profile, and have it kept.

    The journal counts as complete only when ``keep`` has returned: where it raises, the next call goes on from the runs
    that are there. Raises ``EndpointError`` where the endpoint is away or a request fails, ``FactsError`` where too
    little is known of the engine, ``MeasureError`` and ``FitError`` where the runs make no profile or SciPy is missing,
    ``JournalError`` for a journal in use.
    """
    settings = target.settings
    check_settings(settings)
    check_solver()
    async with Endpoint(target.url, target.api_key, settings.request_timeout_s) as endpoint:
        facts = settled_facts(await endpoint.report(target.model), target.stated)
        limits = engine_limits(facts)
        mixes = fitting_mixes(limits)
        unclear = identifiability(planned_rows(mixes, limits)).problem
        if unclear:
            raise MeasureError(f"these mixes on this engine would not tell: {unclear}")
        tokens_per_byte = await endpoint.tokens_per_byte(facts.model)
        with Journal(journal_path, journal_settings(target, facts)) as journal:
            if journal.news:
                watcher.news(journal.news)
            way_s = await endpoint.turnaround_s(facts.model)
            point = msgspec.structs.replace(settings.point, turnaround_s=round(way_s, 5))
            settings = msgspec.structs.replace(settings, point=point)
            await _Sweep(endpoint, facts.model, settings, mixes, journal, watcher).run()
            today = datetime.now(UTC).date().isoformat()
            made_of = Target(target.name, settings.slo, today, tokens_per_byte, target.notes)
            found = assemble(made_of, facts, limits, mixes, journal.records, settings.seed)
            keep(found)
            journal.complete()
    return found


def check_settings(settings: MeasureSettings) -> None:
    """Raise ``MeasureError`` for settings that nothing can be measured with."""
    point = settings.point
    if not isfinite(point.warm_up_s) or point.warm_up_s < 0:
        raise MeasureError(f"--warm-up-s is {point.warm_up_s}, it must be a number of seconds that is not negative")
    if not (point.watch_s > 0 and point.warm_up_s + point.watch_s <= point.most_s < float("inf")):
        raise MeasureError("a point needs a positive --point-s, and --warm-up-s + --point-s <= --most-point-s")
    for name, bound_s in (("--lag-ms", point.lag_bound_s), ("the timeout of a request", settings.request_timeout_s)):
        if not 0 < bound_s < float("inf"):
            raise MeasureError(f"{name} comes to {bound_s} s, it must be a positive, finite time")
    try:
        check_plan(SearchPlan(1.0, settings.tolerance, settings.search_points))
    except ValueError as error:
        raise MeasureError(str(error)) from error


def fitting_mixes(limits: EngineLimits) -> list[WorkloadMix]:
    """Every mix at a scale that fits, no two of them alike. Raises ``MeasureError``.

    In a short context the synthetic mixes of one proportion shrink to the same lengths, and a fit that leaves one of
    two such mixes out leaves nothing out. So the longer keeps the room, and the shorter shrinks on.
    """
    longest_first: list[WorkloadMix] = []
    for name in reversed(MIX_NAMES):
        longest_first.append(fitting_mix(name, limits, apart_from=longest_first))
    return longest_first[::-1]


def fitting_mix(name: str, limits: EngineLimits, apart_from: Sequence[WorkloadMix] = ()) -> WorkloadMix:
    """The mix at the largest scale 1, ½, ¼ … at which its longest request fits and it has lengths of its own.

    A mix that had to shrink says so in its name (``chat/8``), so that runs of one name have the same lengths. Raises
    ``MeasureError``.
    """
    taken = {mix.shapes for mix in apart_from}
    longest = min(limits.max_model_len, limits.kv_tokens)
    scale = 1.0
    while scale >= _SMALLEST_SCALE:
        mix = load_mix(name, scale)
        fits = max(s.input_tokens + s.output_tokens for s in mix.shapes) <= longest
        if fits and mix.shapes not in taken:
            return mix if scale == 1 else WorkloadMix(f"{name}/{1 / scale:g}", mix.shapes)
        scale /= 2
    raise MeasureError(f"the mix {name} does not fit a context of {longest} tokens, however much it is scaled down")


def engine_limits(facts: EngineFacts) -> EngineLimits:
    """What bounds the engine's batch."""
    return EngineLimits(
        max_num_seqs=facts.max_num_seqs,
        max_num_batched_tokens=facts.max_num_batched_tokens,
        kv_tokens=facts.kv_tokens,
        max_model_len=facts.max_model_len,
        block_size=facts.block_size,
    )


def journal_settings(target: MeasureTarget, facts: EngineFacts) -> dict[str, str]:
    """Everything that must be alike for points to belong to one measurement.

    How long a point may take is none of it: the advice to raise it must not cost the points that are there.
    """
    settings = msgspec.to_builtins(target.settings)
    del settings["point"]["most_s"]
    parts = {"": settings, "engine's ": msgspec.to_builtins(facts)}
    named = {prefix + name: str(value) for prefix, part in parts.items() for name, value in part.items()}
    return {"endpoint": target.url, **named}


def expected_left_s(
    settings: MeasureSettings, lives_s: Mapping[str, float], anchors_left: int, rates_left: Mapping[str, int]
) -> float:
    """About how long the runs that are left take, were each search to need all its points.

    ``lives_s`` are lives of a lone request by mix; a mix that is not measured yet counts with the shortest run.
    """
    anchors_s = anchors_left * expected_s(settings.point, 0.0)
    return anchors_s + sum(
        left * expected_s(point_settings(settings.point, lives_s.get(mix, 0.0)), _LOADED * lives_s.get(mix, 0.0))
        for mix, left in rates_left.items()
    )


def slow_lives_s(slo: Slo) -> dict[str, float]:
    """Lives of a lone mean request by mix, at full length, where under load it takes as long as the SLO allows."""
    return {name: (slo.ttft_s + slo.tpot_s * load_mix(name).mean_output_tokens) / _LOADED for name in MIX_NAMES}


def most_runs(settings: MeasureSettings) -> int:
    """Runs of a measurement at most."""
    return len(MIX_NAMES) * (1 + settings.search_points) + MOST_RETRIES


def point_settings(point: PointSettings, life_s: float) -> PointSettings:
    """The point with a warm-up that lasts until requests of such a life leave as fast as they come."""
    warm_up_s = min(max(point.warm_up_s, _WARM_UP_LIVES * life_s), point.most_s - point.watch_s)
    return msgspec.structs.replace(point, warm_up_s=warm_up_s)


_Run = Callable[[], Awaitable[PointRun]]


class _Sweep:
    """The runs of one measurement, each taken from the journal where it is there."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        settings: MeasureSettings,
        mixes: Sequence[WorkloadMix],
        journal: Journal,
        watcher: Watcher,
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._settings = settings
        self._mixes = mixes
        self._journal = journal
        self._watcher = watcher
        self._retries_left = MOST_RETRIES
        self._lives_s: dict[str, float] = {}
        self._rates_left = dict.fromkeys((mix.name for mix in mixes), settings.search_points)

    async def run(self) -> None:
        """Every anchor, then every search."""
        anchors = {mix.name: await self._anchor(mix) for mix in self._mixes}
        for mix in self._mixes:
            await self._search(mix, anchors[mix.name])
        self._tell("fitting")

    async def _anchor(self, mix: WorkloadMix) -> Record:
        point = msgspec.structs.replace(self._settings.point, least_requests=_ANCHOR_REQUESTS)

        async def run() -> PointRun:
            return await run_closed_point(self._endpoint, self._model, mix, 1, point, self._settings.seed)

        record = await self._recorded("anchor", mix, 1.0, run)
        lives = [outcome.e2e_s for outcome in due_in(record)]
        self._lives_s[mix.name] = sum(lives) / len(lives)
        return record

    async def _search(self, mix: WorkloadMix, anchor: Record) -> None:
        settings, life_s = self._settings, self._lives_s[mix.name]
        plan = SearchPlan(_START_IN_FLIGHT / life_s, settings.tolerance, settings.search_points)
        impossible = infeasible(anchor, settings.slo)
        if impossible:
            self._watcher.news(f"{mix.name}: {impossible}; it is run at a few rates for the fit alone")
            plan = plan._replace(most_points=min(_FIT_POINTS, settings.search_points))
        tried: list[Tried] = []
        while (rate := next_rate(plan, tried)) is not None:
            record = await self._rate(mix, rate, point_settings(settings.point, life_s))
            is_good = record.run.state == "steady" if impossible else verdicts([record], mix.name, settings.slo)[0].met
            tried.append(Tried(rate, is_good))
            self._rates_left[mix.name] -= 1
        self._rates_left[mix.name] = 0

    async def _rate(self, mix: WorkloadMix, rate: float, point: PointSettings) -> Record:
        async def run() -> PointRun:
            return await run_point(self._endpoint, self._model, mix, rate, point, self._settings.seed)

        return await self._recorded("open", mix, rate, run)

    async def _recorded(self, kind: Kind, mix: WorkloadMix, level: float, run: _Run) -> Record:
        """The journal's record of a run, or a new one, repeated once where it was unsteady or late."""
        name = f"{mix.name} {'alone' if kind == 'anchor' else f'at {level:.3g}/s'}"
        for record in self._journal.records:
            if (record.kind, record.mix, record.level) == (kind, mix.name, level):
                return record
        self._tell(name)
        result = await self._drained(run)
        if result.state in {"unsteady", "lagged"} and self._retries_left > 0:
            self._retries_left -= 1
            self._watcher.news(f"{name} was {result.state} ({result.why}); once more")
            self._tell(name)
            result = await self._drained(run)
        if result.state in {"lagged", "short"}:
            advice = "measure from a machine with a free core" if result.state == "lagged" else "then run it again"
            raise MeasureError(f"{name}: {result.why}; {advice}; the points so far are in {self._journal.path}")
        record = Record(kind, mix.name, level, result)
        self._journal.add(record)
        return record

    async def _drained(self, run: _Run) -> PointRun:
        result = await run()
        await self._endpoint.drained(_DRAIN_TIMEOUT_S)
        return result

    def _tell(self, what: str) -> None:
        done = len(self._journal.records)
        anchors_left = len(self._mixes) - len(self._lives_s)
        left = sum(self._rates_left.values()) + anchors_left
        left_s = expected_left_s(self._settings, self._lives_s, anchors_left, self._rates_left)
        self._watcher.progress(Progress(done, done + left, what, left_s))
