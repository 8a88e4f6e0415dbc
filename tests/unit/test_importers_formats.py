from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from serving.importers import Imported, ImporterError, import_results
from serving.points import MeasuredPoint
from serving.steady_points import unsteady_sign
from tests.support.benchfiles import FAILED, SOUND, content, file_name

PROFILES = files("serving") / "profiles"


def imported(name: str) -> Imported:
    return import_results(content(name), file_name(name))


def only_point(name: str) -> MeasuredPoint:
    (run,) = imported(name).runs
    return run.point


def decoded(name: str) -> Any:
    return json.loads(content(name))


@pytest.mark.parametrize(
    ("name", "tool", "version", "runs"),
    [
        ("vllm/closed_loop.json", "vllm bench serve", "", 1),
        ("vllm/open_loop.json", "vllm bench serve", "", 1),
        ("vllm/detailed.json", "vllm bench serve", "", 1),
        ("guidellm/sweep.json.gz", "GuideLLM", "0.8.1", 4),
        ("guidellm/concurrent.json.gz", "GuideLLM", "0.8.1", 1),
        ("aiperf/profile_export_aiperf.json", "AIPerf", "0.13.0", 1),
    ],
)
def test_each_tool_is_told_by_what_it_wrote(name: str, tool: str, version: str, runs: int) -> None:
    """Tool, version, day and runs come from the content; nothing of a sound file is refused."""
    found = imported(name)

    assert (found.tool, found.tool_version, len(found.runs), found.refused) == (tool, version, runs, ())
    assert (found.date, found.origin) == ("2026-11-21", "measured")
    assert {run.subject.model for run in found.runs} == {"tiny"}


@pytest.mark.parametrize("name", SOUND)
def test_every_point_of_a_sound_file_is_whole(name: str) -> None:
    """Latencies are in seconds and in order, and Little's law holds of the requests in flight within a quarter."""
    for run in imported(name).runs:
        point = run.point
        assert point.ttft_p50_s is not None
        assert point.ttft_p99_s is not None
        assert point.tpot_mean_s is not None
        assert 0.005 < point.ttft_p50_s <= point.ttft_p99_s < 1.5
        assert 0.017 < point.tpot_mean_s < 0.03  # the H100's 3.7 ms of an empty step, five times slowed, and the load
        assert point.in_flight is not None
        assert point.concurrency is not None
        assert 0 < point.in_flight <= 1.25 * point.concurrency


def test_a_closed_loop_of_vllm_bench_is_taken_over_exactly() -> None:
    """Totals, the loop's own bound and not the tool's count of the most in flight, and milliseconds as seconds."""
    result, point = decoded("vllm/closed_loop.json"), only_point("vllm/closed_loop.json")

    assert (point.requests, point.input_tokens, point.output_tokens) == (48, 6153, 1536)
    assert (point.concurrency, point.offered_per_s) == (4.0, None)
    assert result["max_concurrent_requests"] > 4
    assert point.duration_s == result["duration"]
    assert point.ttft_p95_s == pytest.approx(result["p95_ttft_ms"] / 1e3)
    assert point.tpot_mean_s == pytest.approx(result["mean_tpot_ms"] / 1e3)
    assert point.itl_mean_s == pytest.approx(result["mean_itl_ms"] / 1e3)
    assert point.e2e_mean_s == pytest.approx(result["mean_e2el_ms"] / 1e3)
    assert point.mix == "128 in, 32 out"
    assert unsteady_sign(point) is None


def test_an_open_loop_of_vllm_bench_keeps_its_rate() -> None:
    """The offered rate, the most in flight, and the median where no percentiles were asked for."""
    point = only_point("vllm/open_loop.json")

    assert (point.offered_per_s, point.concurrency) == (4.0, 7.0)
    assert point.ttft_p50_s is not None
    assert point.ttft_p95_s is None


def test_a_detailed_result_gives_what_the_plain_one_leaves_out() -> None:
    """Σ O·(I + O/2) over its requests, exactly."""
    result, point = decoded("vllm/detailed.json"), only_point("vllm/detailed.json")

    by_hand = sum(o * (i + o / 2) for i, o in zip(result["input_lens"], result["output_lens"], strict=True))
    assert point.kv_token_steps == pytest.approx(by_hand)


def test_details_stand_in_for_percentiles_that_were_not_asked_for() -> None:
    """Where the totals lack percentiles and the life of a request, the list of requests gives them."""
    result = decoded("vllm/detailed.json")
    known = {key: result.pop(key) for key in ("p95_ttft_ms", "p95_tpot_ms", "mean_e2el_ms")}
    (run,) = import_results(json.dumps(result).encode(), "detailed.json").runs

    assert run.point.ttft_p95_s == pytest.approx(known["p95_ttft_ms"] / 1e3)
    assert run.point.tpot_p95_s == pytest.approx(known["p95_tpot_ms"] / 1e3, rel=0.01)
    assert run.point.e2e_mean_s == pytest.approx(known["mean_e2el_ms"] / 1e3, rel=0.01)


def test_appended_results_are_a_run_each() -> None:
    """``--append-result`` writes a document a line; the same lengths become the same mix."""
    lines = b"\n".join(content(f"vllm/{name}.json") for name in ("closed_loop", "fit_128_32_c8", "all_failed"))
    found = import_results(lines, "all.json")

    assert [run.point.source for run in found.runs] == ["all.json line 1", "all.json line 2"]
    assert {run.point.mix for run in found.runs} == {"128 in, 32 out"}
    assert [refusal.where for refusal in found.refused] == ["all.json line 3"]


def test_guidellms_tpot_is_its_inter_token_latency() -> None:
    """TTFT + TPOT·(O − 1) is the latency only with that one; its own time per token has the first token in it."""
    report = decoded("guidellm/concurrent.json.gz")
    metrics, point = report["benchmarks"][0]["metrics"], only_point("guidellm/concurrent.json.gz")

    assert point.ttft_mean_s is not None
    assert point.tpot_mean_s is not None
    made_s = point.ttft_mean_s + point.tpot_mean_s * (point.mean_output_tokens - 1)
    assert made_s == pytest.approx(point.e2e_mean_s, rel=0.01)
    assert point.tpot_mean_s < 0.999 * metrics["time_per_output_token_ms"]["successful"]["mean"] / 1e3


def test_requests_that_guidellm_cut_off_count_nowhere() -> None:
    """Its run of 8 s left two requests unfinished: neither their tokens nor they are in the point."""
    totals = decoded("guidellm/concurrent.json.gz")["benchmarks"][0]["metrics"]["request_totals"]
    point = only_point("guidellm/concurrent.json.gz")

    assert (totals["successful"], totals["incomplete"]) == (12, 2)
    assert (point.requests, point.failed, point.output_tokens) == (12, 0, 12 * 64)
    assert (point.concurrency, point.offered_per_s) == (2.0, None)


def test_prompt_tokens_that_guidellm_found_cached_are_known() -> None:
    """The sweep sent the prompts of an earlier one again; the engine told, and the report tells."""
    points = [run.point for run in imported("guidellm/sweep.json.gz").runs]

    assert [point.cached_tokens for point in points] == [1344] * 4
    assert [point.offered_per_s is None for point in points] == [True, True, False, False]
    assert points[1].concurrency == 16  # the most in flight, not the bound of 512 that was never reached


def test_an_export_of_aiperf_is_taken_over_exactly() -> None:
    """Its inter-token latency is the TPOT, its chunk latency the ITL, and the units are those that it states."""
    export, point = decoded("aiperf/profile_export_aiperf.json"), only_point("aiperf/profile_export_aiperf.json")

    assert (point.requests, point.input_tokens, point.output_tokens) == (24, 3072, 768)
    assert (point.offered_per_s, point.concurrency) == (3.0, 7.0)
    assert point.duration_s == export["benchmark_duration"]["avg"]
    assert point.tpot_p95_s == pytest.approx(export["inter_token_latency"]["p95"] / 1e3)
    assert point.itl_mean_s == pytest.approx(export["inter_chunk_latency"]["avg"] / 1e3)


def test_aiperfs_units_are_heeded() -> None:
    """The same latency in microseconds is the same latency."""
    export = decoded("aiperf/profile_export_aiperf.json")
    metric = export["time_to_first_token"]
    metric |= {key: value * 1e3 for key, value in metric.items() if isinstance(value, float)} | {"unit": "us"}
    (run,) = import_results(json.dumps(export).encode(), "export.json").runs

    assert run.point.ttft_mean_s == pytest.approx(only_point("aiperf/profile_export_aiperf.json").ttft_mean_s)


@pytest.mark.parametrize("name", FAILED)
def test_runs_that_failed_are_refused(name: str) -> None:
    """Nothing succeeded, or too little: both say so, and what to do."""
    with pytest.raises(ImporterError, match=r"none of its|of its \d+ requests failed") as refused:
        imported(name)

    assert "run it again" in str(refused.value)


def test_our_own_columns_are_read_as_penstock_fit_reads_them() -> None:
    """Every row of the published runs is a point or is refused with the reason; what it is of comes with it."""
    found = import_results((PROFILES / "bench_serve_results.csv").read_bytes(), "bench.csv")

    assert len(found.runs) + len(found.refused) == 270
    assert found.origin == "published"
    first = found.runs[0]
    assert (first.subject.model, first.subject.gpu, first.subject.engine) == ("deepseek-r1", "h200", "vllm")
    assert first.subject.engine_version == "0.11.0"
    assert (first.point.requests, first.point.duration_s, first.point.concurrency) == (1000, 76.59, 1000)
    assert first.point.ttft_mean_s == pytest.approx(17.74308)
    assert any("output_tok_s" in refusal.reason for refusal in found.refused)


def test_mlperf_rows_become_anchors_and_no_points() -> None:
    """Each states output tokens a second and GPU; there is no point to fit a step time to."""
    found = import_results((PROFILES / "mlperf_rows.csv").read_bytes(), "mlperf.csv")

    assert found.runs == ()
    assert len(found.anchors) == 14
    anchor = next(one for one in found.anchors if "5.1-0083" in one.text and "Offline" in one.text)
    assert (anchor.gpu, anchor.model, anchor.output_tokens_per_s_per_gpu) == ("H100", "llama3.1-8b", 5777.08)
    assert "RedHat" in anchor.text
