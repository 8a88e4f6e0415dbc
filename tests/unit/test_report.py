"""Records to figures, figures to report.json and the screen."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from loadtests.answers import StreamedAnswer, retry_after_s
from loadtests.claims import Claim, StepResult
from loadtests.plot import Band, draw
from loadtests.prediction import Prediction
from loadtests.prompts import PromptSizeError, chat_body, measured_template, words
from loadtests.report import EngineFacts, build_report, dump_report, screen
from loadtests.results import Figures, LoadRun, RequestRecord, figures, meets_slo, tokens_per_s
from loadtests.schedule import PlannedRequest, Schedule, Window
from loadtests.wire import Ending, read_run
from serving.capacity import Slo

SLO = Slo(ttft_s=2.0, tpot_s=0.5)
WINDOW = Window(10, 20)
REQUESTS = (
    PlannedRequest(0, 5.0, "a", 1000, 1000),
    PlannedRequest(1, 11.0, "a", 90, 10),
    PlannedRequest(2, 12.0, "a", 270, 30),
    PlannedRequest(3, 13.0, "b", 90, 10),
    PlannedRequest(4, 14.0, "b", 90, 10),
)
RECORDS = (
    RequestRecord(0, "throttled", 5.0, 5.0, 429, retry_after_s=1.0),
    RequestRecord(1, "admitted", 11.01, 14.5, 200, first_token_s=12.0, input_tokens=90, output_tokens=10),
    RequestRecord(2, "throttled", 12.02, 12.03, 429, retry_after_s=1.0),
    RequestRecord(3, "admitted", 13.03, 19.0, 200, first_token_s=16.0, input_tokens=90, output_tokens=10),
    RequestRecord(4, "failed", 14.04, 14.1, 502, problem="status 502"),
)


def measured() -> Figures:
    """The figures of the load above."""
    return figures(Schedule(1, WINDOW, (), REQUESTS), LoadRun(RECORDS, 3), SLO)


def test_shares_are_by_tokens_and_inside_the_window() -> None:
    """300 of 600 tokens were refused in the window, in one of four requests; the one in warm-up does not count."""
    seen = measured()

    assert seen.throttled_share == 0.5
    assert seen.throttled_request_share == 0.25
    assert (seen.offered_rps, seen.offered_tokens_per_s) == (0.4, 60.0)


def test_goodput_is_what_met_the_slo() -> None:
    """Of two admitted requests one met the SLO: its 100 tokens over 10 s are the goodput, and 0.5 the share."""
    seen = measured()

    assert seen.goodput_tokens_per_s == 10.0
    assert seen.slo_met_share == 0.5
    assert (seen.ttft_p50_ms, seen.ttft_p95_ms) == (1000.0, 3000.0)
    assert seen.tpot_p50_ms == pytest.approx(2.5 / 9 * 1000)


def test_errors_and_lag_count_over_the_whole_load() -> None:
    """A failure outside the window is a failure all the same; lag is taken over every request."""
    seen = measured()

    assert (seen.errors, seen.peak_in_flight) == (1, 3)
    assert seen.schedule_lag_p99_ms == pytest.approx(40)


@pytest.mark.parametrize(
    ("record", "met"),
    [
        (RequestRecord(0, "admitted", 0, 6.5, first_token_s=2.0, output_tokens=10), True),
        (RequestRecord(0, "admitted", 0, 6.6, first_token_s=2.0, output_tokens=10), False),
        (RequestRecord(0, "admitted", 0, 6.5, first_token_s=2.01, output_tokens=10), False),
        (RequestRecord(0, "admitted", 0, 2.0, first_token_s=2.0, output_tokens=1), True),
        (RequestRecord(0, "cut", 0, 2.1), False),
        (RequestRecord(0, "cut", 0, 1.9), None),
        (RequestRecord(0, "cut", 0, 9.0, first_token_s=1.0), None),
        (RequestRecord(0, "throttled", 0, 0.1), None),
    ],
)
def test_the_slo_is_judged_where_it_can_be(record: RequestRecord, met: bool | None) -> None:
    """Both bounds count, from the scheduled time; a request cut before its first token was due proves nothing."""
    assert meets_slo(record, PlannedRequest(0, 0.0, "a", 10, 10), SLO) is met


def test_rates_by_bin_add_up() -> None:
    """Every planned token is in the bin of its time, warm-up included."""
    rates = tokens_per_s(REQUESTS, WINDOW, 4.0)

    assert rates == (0.0, 500.0, 25.0 + 0.0, 125.0 - 0.0, 0.0)
    assert sum(rates) * 4 == sum(r.tokens for r in REQUESTS)


def result(prediction: float | None) -> StepResult:
    """The load above as a step."""
    foretold = None if prediction is None else Prediction(prediction, prediction, 10.0, 1.0, {})
    return StepResult("1 replica", 1, 20.0, foretold, measured())


def test_report_has_the_shape_that_was_asked_for() -> None:
    """The fields of report.json and of its steps are exactly those of the scenario's definition."""
    facts = EngineFacts("vllm", "0.32.0", "virtual H100", 10)
    claims = [Claim("throttling falls", True, "0.7 → 0.4")]
    report = msgspec.json.decode(dump_report(build_report(facts, [result(0.52)], result(0.5), result(None), claims)))

    assert list(report) == ["engine", "steps", "control", "limiter_off", "claims"]
    assert list(report["engine"]) == ["name", "version", "device", "slowdown"]
    wanted = (
        "replicas offered_rps offered_tokens_per_s throttled_share throttled_request_share predicted_throttled_share "
        "goodput_tokens_per_s capacity_tokens_per_s slo_met_share ttft_p50_ms ttft_p95_ms tpot_p50_ms errors "
        "schedule_lag_p99_ms"
    )
    for step in (*report["steps"], report["control"], report["limiter_off"]):
        assert " ".join(step) == wanted
    assert report["steps"][0]["predicted_throttled_share"] == 0.52
    assert report["limiter_off"]["predicted_throttled_share"] is None
    assert report["claims"] == [{"name": "throttling falls", "holds": True, "detail": "0.7 → 0.4"}]


def test_screen_shows_each_step_and_each_claim() -> None:
    """The table has the observed and predicted shares, and a failed claim is seen as one."""
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115 - closed below
    console.print(screen([result(0.52)], [Claim("falls", True, "yes"), Claim("gone", False, "no")], "slowed 1:10"))
    console.file.close()
    text = console.export_text()

    assert "50.0%" in text
    assert "52.0%" in text
    assert "FAILS  gone" in text
    assert "slowed 1:10" in text


def test_picture_is_written(tmp_path: Path) -> None:
    """A PNG comes out for steps of unlike size."""
    band = Band("1 replica", 2.0, 4.0, (5.0,) * 6, (3.0,) * 6, (2.0,) * 6, (2.1,) * 6, 3.0, 0.4, 0.42)
    control = msgspec.structs.replace(band, title="4 replicas, doubled load", offered=(10.0,) * 6)
    draw([band, control], "slowed 1:10", tmp_path / "throttling.png")

    assert (tmp_path / "throttling.png").read_bytes().startswith(b"\x89PNG")


def test_records_are_whole_or_refused() -> None:
    """Records come back in order of the schedule; a load without its last line, or with gaps, is no result."""
    lines = [msgspec.json.encode(record) for record in reversed(RECORDS)]
    ending = msgspec.json.encode(Ending(3))

    assert read_run([*lines, ending], 5) == LoadRun(RECORDS, 3)
    with pytest.raises(ValueError, match="peak_in_flight"):
        read_run(lines, 5)
    with pytest.raises(ValueError, match="not one for each"):
        read_run([*lines[1:], ending], 5)
    with pytest.raises(ValueError, match="no records"):
        read_run([], 5)


def answer(*lines: bytes) -> StreamedAnswer:
    """An answer that has read these lines."""
    read = StreamedAnswer()
    for line in lines:
        read.read(line)
    return read


CONTENT = b'data: {"choices":[{"index":0,"delta":{"content":" word"}}]}\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"length"}]}\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n'


def test_a_whole_answer_is_complete() -> None:
    """Only chunks with text are content; usage and finish_reason make the answer complete."""
    assert StreamedAnswer().read(CONTENT) == "content"
    assert StreamedAnswer().read(FINISH) == "nothing"
    assert StreamedAnswer().read(b": ping\n") == "nothing"
    whole = answer(CONTENT, FINISH, USAGE, b"data: [DONE]\n")
    assert whole.incomplete(2) is None
    assert (whole.input_tokens, whole.output_tokens) == (7, 2)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ((CONTENT, USAGE, b"data: [DONE]\n"), "without a finish_reason"),
        ((CONTENT, FINISH, b"data: [DONE]\n"), "usage says 0"),
        ((CONTENT, b'data: {"error":{"message":"gone"}}\n'), "gone"),
        ((b"data: {oops\n",), "a chunk that is none"),
    ],
)
def test_what_an_answer_lacks_is_told(lines: tuple[bytes, ...], problem: str) -> None:
    """A stream that ends early, errs, or is short of its tokens is incomplete, whatever [DONE] says."""
    assert problem in (answer(*lines).incomplete(2) or "")


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "3", "retry-after-ms": "2100"}, 2.1),
        ({}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "1.5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "3", "retry-after-ms": "3001"}, None),
        ({"retry-after": "3", "retry-after-ms": "0"}, None),
    ],
)
def test_only_a_true_wait_is_valid(headers: dict[str, str], wait_s: float | None) -> None:
    """Retry-After is a whole number of seconds of at least 1, and the milliseconds never exceed it."""
    assert retry_after_s(headers) == wait_s


def test_prompts_have_their_words_and_differ() -> None:
    """A prompt has the words asked for, the same for the same salt and another for another."""
    assert len(words(50, "1/1").split()) == 50
    assert words(50, "1/1") == words(50, "1/1") != words(50, "1/2")
    body = msgspec.json.decode(chat_body("m", words(3, ""), 9))
    assert (body["max_tokens"], body["ignore_eos"], body["stream_options"]) == (9, True, {"include_usage": True})


def test_template_is_what_is_not_words() -> None:
    """The engine's count minus the words is the template; a tokenizer that splits words is refused with its counts."""
    assert measured_template((1, 9), (64, 72)).tokens == 8
    assert measured_template((1, 9), (64, 72)).least_input_tokens == 9
    with pytest.raises(PromptSizeError, match="9 tokens for 1 words and 140 for 64"):
        measured_template((1, 9), (64, 140))
