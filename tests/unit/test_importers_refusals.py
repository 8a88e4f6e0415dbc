from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import msgspec
import pytest

from serving.importers import ImporterError, import_results
from serving.importers.checks import checked
from serving.importers.results import RunRefusedError
from serving.pointchecks import StatedRate
from serving.points import MeasuredPoint
from tests.support.benchfiles import SOUND, content

VLLM, GUIDELLM, AIPERF = "vllm/closed_loop.json", "guidellm/concurrent.json.gz", "aiperf/profile_export_aiperf.json"
BENCH_ROWS = (files("serving") / "profiles" / "bench_serve_results.csv").read_text()
MLPERF_ROWS = (files("serving") / "profiles" / "mlperf_rows.csv").read_text()


def refusal(content: bytes | str) -> str:
    """What is said of a file that cannot be used."""
    raw = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(ImporterError) as refused:
        import_results(raw, "results")
    return str(refused.value)


def mended(name: str, change: Callable[[Any], object]) -> str:
    """A real file with one thing wrong in it."""
    document = json.loads(content(name))
    change(document)
    return json.dumps(document)


def row_of(table: str, line: int, **cells: object) -> str:
    """A table of one row, with these cells changed or added."""
    header, *rows = table.splitlines()
    names, values = header.split(","), rows[line].split(",")
    row = dict(zip(names, values, strict=True)) | {key: str(value) for key, value in cells.items()}
    return ",".join(row) + "\n" + ",".join(row.values()) + "\n"


def metrics_of(report: Any) -> Any:
    return report["benchmarks"][0]["metrics"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("total_output_tokens"), "a pooling run"),
        (lambda d: d.update(total_input_tokens=None), "total_input_tokens is missing"),
        (lambda d: d.update(mean_ttft_ms=float("nan")), "mean_ttft_ms is nan: the tool could not compute it"),
        (lambda d: d.update(mean_tpot_ms=float("inf")), "mean_tpot_ms is inf"),
        (lambda d: d.update(mean_ttft_ms=-3.0), "mean_ttft_ms is -3, it must not be negative"),
        (lambda d: d.update(completed=47.5), "completed is 47.5, it must be a whole number"),
        (lambda d: d.update(completed="many"), "completed is 'many', it must be a number"),
        (lambda d: d.update(duration=0), "duration is 0, it must be above it"),
        (lambda d: d.update(duration=d["duration"] * 1000), "looks like milliseconds where seconds belong"),
        (lambda d: d.update(output_throughput=d["output_throughput"] / 8), "the factor of 8 looks like a rate per GPU"),
        (lambda d: d.update(total_token_throughput=1.13 * d["total_token_throughput"]), "not of the same requests"),
        (lambda d: d.update(total_input_tokens=20), "these must be totals, not means"),
        (lambda d: d.update(median_ttft_ms=0.0), "the 50th percentile of its TTFT is 0"),
        (lambda d: d.update(p95_tpot_ms=1.0), "above 0.001 s at the 95th; are they exchanged?"),
        (
            lambda d: d.update(num_prefill_gpus=4),
            "num_prefill_gpus is '4': prefill and decode ran on GPUs of their own",
        ),
        (lambda d: d.update(disagg="true"), "output by the decode GPUs"),
    ],
)
def test_a_result_of_vllm_bench_that_makes_no_sense_is_refused(change: Callable[[Any], object], said: str) -> None:
    """What is missing, not finite, negative, in another unit or of another denominator, with how to mend it."""
    assert said in refusal(mended(VLLM, change))


@pytest.mark.parametrize("factor", [1e3, 1e-3])
@pytest.mark.parametrize("name", ["ttft", "tpot", "e2el"])
def test_a_latency_in_another_unit_is_refused(name: str, factor: float) -> None:
    """Seconds for milliseconds, or the reverse, in any one of the latencies."""

    def mix_up(result: Any) -> None:
        for key in result:
            if key.endswith(f"_{name}_ms"):
                result[key] *= factor

    said = refusal(mended(VLLM, mix_up))
    assert "unit" in said or "milliseconds" in said


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_all_latencies_in_another_unit_are_refused(factor: float) -> None:
    """Little's law tells, even where they agree with each other."""

    def mix_up(result: Any) -> None:
        for key in result:
            if key.endswith("_ms"):
                result[key] *= factor

    assert "milliseconds" in refusal(mended(VLLM, mix_up))


def test_details_of_other_requests_are_refused() -> None:
    """The list of requests must be the one that the totals are of."""

    def drop(result: Any) -> None:
        for key in ("input_lens", "output_lens", "ttfts", "itls", "errors"):
            result[key] = result[key][:-2]

    assert "it lists 6 answers" in refusal(mended("vllm/detailed.json", drop))
    unlike = mended("vllm/detailed.json", lambda d: d["ttfts"].pop())
    assert "unlike lengths" in refusal(unlike)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["metadata"].update(version=1), "metadata.version is 1, GuideLLM 0.8 writes 2"),
        (lambda d: d.update(benchmarks=[]), "it holds none"),
        (lambda d: metrics_of(d).pop("output_token_count"), "metrics.output_token_count is missing"),
        (lambda d: metrics_of(d)["request_totals"].update(successful=0, errored=3), "none of its 3 requests succeeded"),
        (lambda d: metrics_of(d)["request_totals"].update(errored=1), "1 of its 13 requests failed"),
        (lambda d: d["benchmarks"][0].update(duration=8000.0), "milliseconds where seconds belong"),
        (
            lambda d: metrics_of(d)["time_to_first_token_ms"]["successful"].update(mean="fast"),
            "time_to_first_token_ms.successful.mean is 'fast', it must be a number",
        ),
    ],
)
def test_a_report_of_guidellm_that_makes_no_sense_is_refused(change: Callable[[Any], object], said: str) -> None:
    """Another document version, nothing succeeded, missing metrics, other units."""
    assert said in refusal(mended(GUIDELLM, change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(schema_version="2.0"), "schema_version is '2.0'"),
        (lambda d: d.update(was_cancelled=True), "it was cancelled"),
        (lambda d: d.pop("request_count"), "request_count is missing"),
        (lambda d: d.pop("total_isl"), "total_isl is missing"),
        (lambda d: d["time_to_first_token"].update(unit="fortnights"), "time_to_first_token.unit is 'fortnights'"),
        (lambda d: d["benchmark_duration"].update(unit="ms"), "milliseconds where seconds belong"),
        (lambda d: d["inter_token_latency"].update(unit="sec"), "are TTFT, TPOT and the duration in their units"),
    ],
)
def test_an_export_of_aiperf_that_makes_no_sense_is_refused(change: Callable[[Any], object], said: str) -> None:
    """Another schema, a cancelled run, missing metrics, unknown and wrong units."""
    assert said in refusal(mended(AIPERF, change))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"requests": 0}, "requests is 0"),
        ({"duration_s": "nan"}, "duration_s is nan"),
        ({"input_tokens": -1}, "input_tokens is -1"),
        ({"output_tok_s": 327.6}, "output_tok_s is 327.6"),
        ({"ttft_p50_ms": "soon"}, "ttft_p50_ms is 'soon', it must be a number"),
        ({"duration_s": 76590}, "1000"),
        ({"disagg": "true"}, "prefill and decode ran on GPUs of their own"),
        ({"decode_gpus": 16}, "decode_gpus is '16'"),
        ({"serve_command": "vllm serve m --kv-transfer-config kv_producer"}, "no rate of one replica"),
        ({"requests": 1000.5, "req_s": ""}, "requests is 1000.5, it must be a whole number"),
        ({"duration_s": 1e-320, "req_s": 5e-324}, "duration_s is 1e-320"),
    ],
)
def test_a_row_of_our_columns_that_makes_no_sense_is_refused(cells: dict[str, object], said: str) -> None:
    """Zero successes, numbers that are none, contradictions, and rows of disaggregated deployments."""
    assert said in refusal(row_of(BENCH_ROWS, 0, **cells))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"output_tok_s": "nan"}, "output_tok_s is nan"),
        ({"output_tok_s": 0}, "output_tok_s is 0"),
        ({"output_tok_s_per_gpu": 101527.0}, "one of them has another denominator"),
        ({"gpu": ""}, "it names no gpu or no model"),
        ({"disaggregated": 1}, "no rate of one replica"),
    ],
)
def test_an_mlperf_row_that_makes_no_sense_is_refused(cells: dict[str, object], said: str) -> None:
    """No rate, no GPU, or a rate per GPU where the system's belongs."""
    quoteless = MLPERF_ROWS.replace('"TensorRT 10.11, CUDA 12.9"', "TensorRT")
    assert said in refusal(row_of(quoteless, 0, **cells))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "unknown format"),
        (b"\xff\xfe\x00", "it is no UTF-8 text"),
        (b"[1, 2]", "it is JSON, but no object"),
        (b'{"a": 1}', "unknown format"),
        (b'{"completed": 3, "duration": 2.0}', "it lacks request_throughput, total_input_tokens of vllm bench serve"),
        (b'{"disagg": true, "tput_per_gpu": 5.0, "input_tput_per_gpu": 4.0}', "states rates per GPU and no totals"),
        (b"model,gpu,engine,serve_command,requests\n", "it lacks the columns duration_s, input_tokens, output_tokens"),
        (b"[" * 100_000, "unknown format"),
    ],
)
def test_a_file_of_no_known_format_is_refused_with_what_is_known(text: bytes, said: str) -> None:
    """What it lacks where it is nearly one, and what can be imported."""
    told = refusal(text)
    assert said in told
    assert "vllm bench serve" in told or "the benchmark itself wrote" in told


def test_a_bad_row_leaves_the_others() -> None:
    """Runs that cannot be vouched for are left out with their line, and the sound ones stay."""
    header, first, second = BENCH_ROWS.splitlines()[:3]
    found = import_results("\n".join((header, first.replace(",76.59,", ",7.659,"), second)).encode(), "rows.csv")

    assert [run.point.source.split(",")[0] for run in found.runs] != []
    assert [refused.where for refused in found.refused] == ["rows.csv line 2"]


def test_the_checks_pass_every_published_row_that_does_not_contradict_itself() -> None:
    """The bounds of the checks are wide enough for honest runs: 200 of them, of three engines and three GPU types."""
    runs = import_results(BENCH_ROWS.encode(), "rows.csv").runs

    assert len(runs) > 200
    for run in runs:
        assert checked(run.point) is run.point


def test_a_rate_is_held_to_its_total_beside_its_rounding() -> None:
    """0.06 requests/s is 100 requests in 1784 s, rounded; 0.08 is not."""
    point = MeasuredPoint("mix", 100, 1783.59, 3_200_000, 7699)

    assert checked(point, (StatedRate("req_s", 0.06, 100, 0.006),)) is point
    with pytest.raises(RunRefusedError, match=r"req_s is 0\.08"):
        checked(point, (StatedRate("req_s", 0.08, 100, 0.006),))


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_passes_with_its_latencies_halved_or_doubled(name: str) -> None:
    """The checks catch other units, not slow or fast engines."""
    for run in import_results(content(name), "file").runs:
        point = run.point
        for factor in (0.5, 1.9):
            scaled = {
                field: getattr(point, field) * factor
                for field in MeasuredPoint.__struct_fields__
                if field.startswith(("ttft", "tpot", "itl", "e2e")) and getattr(point, field) is not None
            }
            if point.duration_s > factor * (point.life_s or 0.0):
                assert checked(msgspec.structs.replace(point, **scaled))


def test_latencies_of_a_burst_that_are_a_thousandth_are_refused() -> None:
    """Slow tokens stay above any server's least even in the wrong unit; hardly any request in flight tells."""
    burst = MeasuredPoint(
        "mix", 1000, 76.59, 219_171, 200_752, concurrency=1000, ttft_mean_s=0.01774, tpot_mean_s=0.0005
    )

    with pytest.raises(
        RunRefusedError, match="of 1000 that were sent together; are TTFT, TPOT and the duration in their units"
    ):
        checked(burst)
