from __future__ import annotations

import sys
from math import inf, nan
from pathlib import Path

import msgspec
import pytest

from serving.capacity import EngineLimits, RequestShape, Slo, WorkloadMix
from serving.endpoint import SAMPLE_TEXT, Endpoint, EndpointError
from serving.enginefacts import Stated, settled_facts
from serving.fit import FitError
from serving.journal import Journal
from serving.measure import (
    MeasureSettings,
    MeasureTarget,
    Progress,
    Watcher,
    expected_left_s,
    fitting_mix,
    fitting_mixes,
    journal_settings,
    measure,
    most_runs,
    slow_lives_s,
)
from serving.measurement import MeasureError, Measurement, fitted_points
from serving.mixes import MIX_NAMES, load_mix
from serving.openloop import run_point
from serving.profile import dump_profile, parse_profile
from serving.records import Record
from serving.run_verdict import PointSettings, Seen, Verdict, window_of
from tests.support.fake_engine import FakeEngine
from tests.support.measured import STEP_TIME, sweep_of

pytestmark = pytest.mark.slow

SLO = Slo(ttft_s=1.0, tpot_s=0.03)
#: What the fake engine says of itself.
LIMITS = EngineLimits(32, 2048, 640 * 16, 512)
STATED = Stated(gpu="FAKE", dtype="bf16", max_num_seqs=32, max_num_batched_tokens=2048)
QUICK = PointSettings(warm_up_s=0.1, watch_s=0.6, most_s=20, least_requests=10, lag_bound_s=5)
SHORT = WorkloadMix("short", (RequestShape(20, 10), RequestShape(30, 20)))


@pytest.fixture
def engine() -> FakeEngine:
    """A healthy fake."""
    return FakeEngine()


def target(url: str, point: PointSettings = QUICK) -> MeasureTarget:
    """A measurement of the fake."""
    return MeasureTarget(url, "fake", MeasureSettings(SLO, point, search_points=5), STATED)


def watcher(news: list[str], progress: list[Progress] | None = None) -> Watcher:
    """Takes down what it is told."""
    return Watcher((progress if progress is not None else []).append, news.append)


def profile_kept(found: Measurement) -> None:
    """Nothing goes wrong with writing the profile."""
    assert found.profile


async def recorded(engine: FakeEngine, url: str, path: Path) -> MeasureTarget:
    """A journal of a whole measurement of an engine like the fake, interrupted before the profile was written."""
    what = target(url)
    async with Endpoint(url, None, 20) as endpoint:
        facts = settled_facts(await endpoint.report(), STATED)
    with Journal(path, journal_settings(what, facts)) as journal:
        for record in sweep_of(LIMITS, what.settings):
            journal.add(record)
    return what


async def test_an_interrupted_measurement_goes_on_from_its_journal(engine: FakeEngine, tmp_path: Path) -> None:
    """No run is repeated; the profile is valid, predicts its points, and says where every fact is from."""
    news: list[str] = []
    progress: list[Progress] = []
    async with engine.serving() as url:
        what = await recorded(engine, url, tmp_path / "journal")
        found = await measure(what, tmp_path / "journal", watcher(news, progress), profile_kept)

    profile = found.profile
    assert parse_profile(dump_profile(profile)) == profile
    assert "going on after" in news[0]
    assert max(len(body["prompt"]) for body in engine.bodies if isinstance(body["prompt"], list)) == 1
    assert progress[-1].done == progress[-1].total
    assert (profile.model, profile.gpu, profile.provenance.kind) == ("fake-llama", "FAKE", "measured")
    assert "gpu=FAKE (stated by the operator)" in profile.provenance.source
    assert profile.limits == LIMITS
    assert profile.tokens_per_byte == pytest.approx(0.25, abs=0.01)
    assert profile.step_time.base_s == pytest.approx(STEP_TIME.base_s, rel=0.1)
    assert profile.fit is not None
    assert profile.fit.residual_median < 0.05
    assert min(found.distinctness.values()) > 0.02


async def test_knees_have_intervals_that_hold_the_simulated_ones(engine: FakeEngine, tmp_path: Path) -> None:
    """The largest rate met lies at or below where the bound is crossed, and every knee is between tried rates."""
    async with engine.serving() as url:
        what = await recorded(engine, url, tmp_path / "journal")
        found = await measure(what, tmp_path / "journal", watcher([]), profile_kept)

    for knee in found.knees:
        assert knee.requests_per_s is not None
        assert knee.missed_per_s is not None
        crossing = knee.crossing_per_s
        assert crossing is not None
        assert crossing.low is not None
        assert crossing.high is not None
        assert crossing.low <= crossing.value <= crossing.high
        assert knee.requests_per_s <= crossing.value <= knee.missed_per_s
    names = {mix.name for mix in fitting_mixes(LIMITS)}
    assert {knee.mix for knee in found.knees} == names == {point.mix for point in found.points}


async def test_a_finished_measurement_is_not_continued(engine: FakeEngine, tmp_path: Path) -> None:
    """The next one says so, and the old points are kept aside."""
    async with engine.serving() as url:
        what = await recorded(engine, url, tmp_path / "journal")
        await measure(what, tmp_path / "journal", watcher([]), profile_kept)
        async with Endpoint(url, None, 20) as endpoint:
            facts = settled_facts(await endpoint.report(), STATED)
    with Journal(tmp_path / "journal", journal_settings(what, facts)) as journal:
        assert journal.records == []
        assert "was complete; measuring anew" in journal.news
    assert (tmp_path / "journal.old").exists()


async def test_a_measurement_whose_profile_was_not_kept_goes_on(engine: FakeEngine, tmp_path: Path) -> None:
    """A disk that is full at the end costs no run: the next call has them all, and writes the profile."""
    news: list[str] = []

    def failing(found: Measurement) -> None:
        raise MeasureError(f"no room for {found.profile.name}")

    async with engine.serving() as url:
        what = await recorded(engine, url, tmp_path / "journal")
        with pytest.raises(MeasureError, match="no room for fake"):
            await measure(what, tmp_path / "journal", watcher([]), failing)
        await measure(what, tmp_path / "journal", watcher(news), profile_kept)

    assert "going on after" in news[0]


async def test_want_of_scipy_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not after the last run."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(FitError, match=r"penstock\[measure\]"):
        await measure(target("http://127.0.0.1:9"), tmp_path / "journal", watcher([]), profile_kept)


def spoiled(records: list[Record], mix: str, kind: str) -> list[Record]:
    """The same runs, those of that kind and mix unsteady."""
    return [
        msgspec.structs.replace(record, run=msgspec.structs.replace(record.run, state="unsteady", why="they drifted"))
        if (record.mix, record.kind) == (mix, kind)
        else record
        for record in records
    ]


@pytest.mark.parametrize(("kind", "what"), [("anchor", "run alone"), ("open", "open-loop run")])
def test_no_profile_of_unsteady_runs(kind: str, what: str) -> None:
    """The mix, its runs and what to do are named."""
    records = spoiled(sweep_of(LIMITS, MeasureSettings(SLO, QUICK, search_points=5)), "decode-heavy/4", kind)

    with pytest.raises(MeasureError, match=rf"decode-heavy/4 has no steady {what} .*they drifted.* raise --point-s"):
        fitted_points([mix.name for mix in fitting_mixes(LIMITS)], records)


async def test_a_run_is_open_loop_and_its_prompts_are_exact(engine: FakeEngine) -> None:
    """Requests go out on a schedule that the seed decides; prompts are token ids that share no prefix."""
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        run = await run_point(endpoint, "fake-llama", SHORT, 50.0, QUICK, seed=7)
        again = await run_point(endpoint, "fake-llama", SHORT, 50.0, QUICK, seed=7)

    assert run.state == "steady", run.why
    due = {o.scheduled_s: (o.input_tokens, o.output_tokens) for o in run.outcomes}
    same = {o.scheduled_s: (o.input_tokens, o.output_tokens) for o in again.outcomes}
    assert len(due.keys() & same.keys()) > 10
    assert all(due[moment] == same[moment] for moment in due.keys() & same.keys())
    assert all(o.sent_s >= o.scheduled_s for o in run.outcomes)
    prompts = [tuple(body["prompt"]) for body in engine.bodies]
    assert len(set(prompts)) == len(prompts)
    assert all(body["min_tokens"] == body["max_tokens"] and body["ignore_eos"] for body in engine.bodies)
    point = run.point
    assert point.offered_per_s == 50.0
    assert point.requests >= QUICK.least_requests
    assert point.steps is not None
    assert 0 < (point.busy_s or 0) <= point.duration_s


async def test_overload_is_stopped_early(engine: FakeEngine) -> None:
    """A rate far above what the engine serves ends as over-saturated, long before its time is up."""
    engine.step_s = 0.02
    patient = msgspec.structs.replace(QUICK, watch_s=60.0, most_s=60.0, most_in_flight=60)
    async with engine.serving() as url, Endpoint(url, None, 60) as endpoint:
        run = await run_point(endpoint, "fake-llama", SHORT, 400.0, patient)

    assert run.state == "over-saturated"
    assert "60 requests were in flight" in run.why
    assert run.window_s[1] < 30


async def test_an_engine_that_refuses_is_over_saturated(engine: FakeEngine) -> None:
    """503 is overload, an answer about the rate; anything else is a failure of the run."""
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        engine.status = 503
        run = await run_point(endpoint, "fake-llama", SHORT, 50.0, QUICK)
        assert run.state == "over-saturated"
        assert "refused" in run.why
        engine.status = 500
        with pytest.raises(EndpointError, match=r"short at 50 requests/s: a request failed: .*answered 500"):
            await run_point(endpoint, "fake-llama", SHORT, 50.0, QUICK)


async def test_a_late_client_fails_its_point(engine: FakeEngine) -> None:
    """However little the bound is missed by, the run is not called steady."""
    strict = msgspec.structs.replace(QUICK, lag_bound_s=1e-7)
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        run = await run_point(endpoint, "fake-llama", SHORT, 100.0, strict)

    assert run.state == "lagged"
    assert "sent late" in run.why


async def test_a_run_out_of_time_says_what_it_lacks(engine: FakeEngine) -> None:
    """A point that may not last long enough is short, not steady."""
    hasty = msgspec.structs.replace(QUICK, most_s=2, least_requests=10_000)
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        run = await run_point(endpoint, "fake-llama", SHORT, 50.0, hasty)

    assert run.state == "short"
    assert "of 10000 requests" in run.why
    assert "raise --most-point-s" in run.why


async def test_a_run_does_not_wait_for_answers_beyond_its_time(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However steady it looked: a request that is still open when its time is up makes it short."""

    def soon_steady(settings: PointSettings, seen: Seen) -> Verdict | None:
        window = window_of(settings, seen)
        return Verdict("steady", "", window) if window.duration_s > 0.2 else None

    monkeypatch.setattr("serving.running.verdict", soon_steady)
    endless = WorkloadMix("endless", (RequestShape(20, 100_000),))
    hasty = msgspec.structs.replace(QUICK, most_s=0.9)
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        run = await run_point(endpoint, "fake-llama", endless, 50.0, hasty)

    assert run.state == "short"
    assert "still open at its end after 0.9 s; raise --most-point-s" in run.why


async def test_a_longer_bound_on_a_point_goes_on_from_the_journal(engine: FakeEngine, tmp_path: Path) -> None:
    """Whoever follows the advice to raise it keeps the points that are there."""
    news: list[str] = []
    async with engine.serving() as url:
        what = await recorded(engine, url, tmp_path / "journal")
        settings = msgspec.structs.replace(what.settings, point=msgspec.structs.replace(QUICK, most_s=99))
        longer = msgspec.structs.replace(what, settings=settings)
        await measure(longer, tmp_path / "journal", watcher(news), profile_kept)
    assert "going on after" in news[0]


async def test_prefix_cache_hits_are_refused(engine: FakeEngine) -> None:
    """Prompts share no prefix, so hits mean that somebody else is there, or that prefill is not measured."""
    engine.cached_tokens = 5
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        with pytest.raises(EndpointError, match=r"prefix cache.*--no-enable-prefix-caching"):
            await run_point(endpoint, "fake-llama", SHORT, 50.0, QUICK)


async def test_an_answer_is_counted_by_its_usage(engine: FakeEngine) -> None:
    """Three chunks that carry seven tokens are seven tokens."""
    engine.last_words = [{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}]
    async with engine.serving() as url, Endpoint(url + "/v1/", None, 20) as endpoint:
        answer = await endpoint.complete("fake-llama", [300] * 5, 3)

    assert (answer.input_tokens, answer.output_tokens) == (5, 7)
    assert answer.start_s < answer.first_token_s <= answer.finish_s


async def test_an_endpoint_that_is_away_is_named(tmp_path: Path) -> None:
    """Nothing listens: the message has the URL."""
    with pytest.raises(EndpointError, match=r"cannot reach http://127\.0\.0\.1:9"):
        await measure(target("http://127.0.0.1:9"), tmp_path / "journal", watcher([]), profile_kept)


async def test_no_success_quotes_the_first_refusal(engine: FakeEngine, tmp_path: Path) -> None:
    """The sample text is refused already, so nothing is measured."""
    engine.status = 503
    async with engine.serving() as url:
        with pytest.raises(EndpointError, match=r"answered 503: .*no capacity"):
            await measure(target(url), tmp_path / "journal", watcher([]), profile_kept)
    assert engine.bodies[0]["prompt"] == SAMPLE_TEXT
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("last_words", "message"),
    [
        ([], "reports no usage in its streams"),
        ([{"error": {"message": "engine died"}}], "failed within an answer: .*engine died"),
        ([{"choices": "none"}], r"streams what is not an OpenAI completion: .* at `\$\.choices`"),
    ],
)
async def test_a_stream_that_cannot_be_counted_is_refused(
    engine: FakeEngine, last_words: list[dict[str, object]], message: str
) -> None:
    """Without usage, after an error event, or in another format, an answer is no measurement."""
    engine.last_words = last_words
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        with pytest.raises(EndpointError, match=message):
            await endpoint.complete("fake-llama", [300], 1)


async def test_a_slow_answer_is_given_up(engine: FakeEngine) -> None:
    """Every request has a timeout."""
    async with engine.serving() as url, Endpoint(url, None, 0.1) as endpoint:
        with pytest.raises(EndpointError, match=r"did not finish an answer in 0\.1 s"):
            await endpoint.complete("fake-llama", [300], 100_000)


async def test_an_engine_that_does_not_drain_is_named(engine: FakeEngine) -> None:
    """Requests of somebody else would spoil the next point."""
    engine.metrics += 'vllm:num_requests_running{engine="1"} 3\n'
    async with engine.serving() as url, Endpoint(url, None, 20) as endpoint:
        with pytest.raises(EndpointError, match=r"still has 3 requests open .* somebody else uses it"):
            await endpoint.drained(0.0)


@pytest.mark.parametrize("name", MIX_NAMES)
@pytest.mark.parametrize("context", [256, 2048, 131_072])
def test_a_mix_is_scaled_to_the_context_and_no_further(name: str, context: int) -> None:
    """The longest request fits, and at twice the scale it would not (or the mix is whole)."""
    mix = fitting_mix(name, EngineLimits(8, 2048, 10**9, context))

    longest = max(s.input_tokens + s.output_tokens for s in mix.shapes)
    assert longest <= context
    assert longest * 2 > context * 0.95 or mix == load_mix(name)


@pytest.mark.parametrize("name", MIX_NAMES)
def test_a_mix_that_was_scaled_is_named_with_its_scale(name: str) -> None:
    """Points of the same name have the same lengths, whatever context they were measured in."""
    whole, shrunk = (fitting_mix(name, EngineLimits(8, 2048, 10**9, context)) for context in (131_072, 512))

    assert whole.name == name
    base, _, divisor = shrunk.name.partition("/")
    assert base == name
    assert shrunk.shapes == load_mix(name, 1 / float(divisor)).shapes


def test_a_context_too_small_for_any_mix_is_refused() -> None:
    """Not an endless loop of halving."""
    with pytest.raises(MeasureError, match="does not fit a context of 4 tokens"):
        fitting_mix("long-context", EngineLimits(8, 2048, 10**9, 4))


@pytest.mark.parametrize("context", [512, 4096, 8192, 32_768, 131_072])
def test_no_two_mixes_of_a_measurement_have_the_same_lengths(context: int) -> None:
    """Leaving one of two equal mixes out of a fit would leave nothing out."""
    mixes = fitting_mixes(EngineLimits(8, 2048, 10**9, context))

    assert len({mix.shapes for mix in mixes}) == len(mixes) == len(MIX_NAMES)
    assert all(s.input_tokens + s.output_tokens <= context for mix in mixes for s in mix.shapes)


@pytest.mark.parametrize(
    "settings",
    [
        MeasureSettings(SLO, PointSettings(watch_s=30, most_s=10)),
        MeasureSettings(SLO, PointSettings(warm_up_s=nan)),
        MeasureSettings(SLO, PointSettings(warm_up_s=inf)),
        MeasureSettings(SLO, PointSettings(watch_s=nan)),
        MeasureSettings(SLO, PointSettings(lag_bound_s=nan)),
        MeasureSettings(SLO, PointSettings(lag_bound_s=-1)),
        MeasureSettings(SLO, request_timeout_s=nan),
        MeasureSettings(SLO, tolerance=nan),
        MeasureSettings(SLO, search_points=0),
        MeasureSettings(SLO, tolerance=2),
    ],
)
async def test_settings_that_measure_nothing_are_refused(settings: MeasureSettings, tmp_path: Path) -> None:
    """Before anything is asked of the engine."""
    with pytest.raises(MeasureError, match=r"needs|must"):
        await measure(
            MeasureTarget("http://127.0.0.1:9", "x", settings), tmp_path / "journal", watcher([]), profile_kept
        )


def test_the_time_left_is_foretold_and_bounded() -> None:
    """Longer answers and more rates take longer, and no run is expected to take longer than it may."""
    settings = MeasureSettings(SLO)
    every = dict.fromkeys(MIX_NAMES, settings.search_points)
    short, long = (dict.fromkeys(MIX_NAMES, life) for life in (0.5, 8.0))

    bound_s = len(MIX_NAMES) * settings.search_points * settings.point.most_s
    assert most_runs(settings) == 4 * (1 + 7) + 4
    assert expected_left_s(settings, short, 0, every) < expected_left_s(settings, long, 0, every) <= bound_s
    slow = slow_lives_s(settings.slo)
    assert 2 * slow["chat"] == pytest.approx(SLO.ttft_s + SLO.tpot_s * load_mix("chat").mean_output_tokens)
    assert expected_left_s(settings, short, 0, every) < expected_left_s(settings, slow, 0, every) <= bound_s
    assert expected_left_s(settings, short, 0, dict.fromkeys(MIX_NAMES, 1)) < expected_left_s(settings, short, 0, every)
