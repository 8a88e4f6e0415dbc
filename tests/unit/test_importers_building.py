from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from ratelimit.cli import app
from serving.importers import Imported, ImporterError, import_results
from serving.importers.building import Stated, profile_of
from serving.profile import Profile, load_profile, parse_profile
from tests.support.benchfiles import DATA, FITTING, content

PROFILES = files("serving") / "profiles"
SLOWDOWN = 5.0
runner = CliRunner()


def fitting_runs() -> list[Imported]:
    return [import_results(content(f"vllm/{name}"), name) for name in FITTING]


def published(name: str) -> Imported:
    return import_results((PROFILES / name).read_bytes(), name)


def stated(**changes: object) -> Stated:
    """An H100 with the model that the virtual one had."""
    return msgspec.structs.replace(Stated("mine", "2026-11-22", model="llama-3.1-8b", gpu="H100"), **changes)


def test_runs_of_the_real_tool_give_the_virtual_gpus_profile_back() -> None:
    """The empty step is within 15 % of what the GPU was made with, times its slowdown, and the rates come out."""
    pytest.importorskip("scipy")
    profile, truth = profile_of(fitting_runs(), stated()), load_profile("h100-llama-3.1-8b").step_time

    assert profile.fit is not None
    assert profile.step_time.base_s == pytest.approx(SLOWDOWN * truth.base_s, rel=0.15)
    assert profile.fit.residual_median < 0.1
    assert len(profile.fit.points) == len(FITTING)


def test_the_provenance_names_files_tool_and_what_was_not_measured() -> None:
    """Where each number is from, down to the limits that data sheets had to give."""
    pytest.importorskip("scipy")
    made = profile_of(fitting_runs(), stated(engine="vLLM", engine_version="0.32.0", kv_tokens=915069)).provenance

    assert (made.kind, made.date, made.engine, made.engine_version) == ("measured", "2026-11-21", "vLLM", "0.32.0")
    assert all(f"{name} (vllm bench serve, 2026-11-21)" in made.source for name in FITTING)
    assert "context, sequences, tokens of a step: not measured, from data sheets and vLLM's defaults" in made.source
    assert "KV tokens" not in made.source


def test_mlperf_rows_alone_make_no_profile_and_beside_runs_its_anchors() -> None:
    """No step time follows from output rates; with runs, those of the same GPU and model are named."""
    rows = published("mlperf_rows.csv")
    with pytest.raises(ImporterError, match="from which no step time follows; add runs"):
        profile_of([rows], stated())

    pytest.importorskip("scipy")
    anchors = profile_of([*fitting_runs(), rows], stated()).provenance.anchors
    assert len(anchors) == 2
    assert all("H100, llama3.1-8b" in anchor for anchor in anchors)


def test_a_run_that_stands_in_two_files_counts_once() -> None:
    """The same result under another name is no second measurement."""
    pytest.importorskip("scipy")
    runs = fitting_runs()
    again = import_results(content(f"vllm/{FITTING[0]}"), "copy.json")

    profile = profile_of([*runs, again], stated())

    assert profile.fit is not None
    assert len(profile.fit.points) == len(FITTING)


def test_runs_of_several_subjects_are_refused_until_one_is_chosen() -> None:
    """A profile is of one model on one GPU type, served in one way; published runs say so and stay published."""
    rows = published("bench_serve_results.csv")
    with pytest.raises(ImporterError, match=r"model is 'deepseek-r1', .* choose with --only"):
        profile_of([rows], stated(model="", gpu=""))
    with pytest.raises(ImporterError, match="say 'mi300x'; give another --only"):
        profile_of([rows], stated(only=("mi300x",)))

    pytest.importorskip("scipy")
    command = next(run.subject.serve_command for run in rows.runs if "gpt-oss-120b" in run.subject.serve_command)
    chosen = stated(model="", gpu="", only=(command, "h100"), kv_tokens=900_000, max_model_len=131072)
    profile = profile_of([rows], chosen)

    assert profile.model == "gpt-oss-120b"
    assert profile.provenance.kind in ("published", "estimated")
    assert command in profile.provenance.source


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"model": "", "gpu": ""}, "give --kv-tokens and --max-model-len"),
        ({"gpu": "TPU v9"}, "no facts of llama-3.1-8b on TPU v9"),
        ({"model": "mystery", "kv_tokens": 9000}, "give --max-model-len"),
        ({"max_model_len": 100}, "raise it to the server's"),
        ({"kv_tokens": 10**9}, "and 1 × H100 have"),
    ],
)
def test_what_nobody_states_or_cannot_be_is_asked_for(missing: dict[str, object], said: str) -> None:
    """Limits that no data sheet tells are asked for, and a profile that contradicts itself is not made."""
    pytest.importorskip("scipy")
    with pytest.raises(ImporterError, match=said):
        profile_of(fitting_runs(), stated(**missing))


def test_the_commands_own_context_bounds_the_profile() -> None:
    """A server started with --max-model-len takes no longer context, however long the model's own is."""
    pytest.importorskip("scipy")
    command = "vllm serve openai/gpt-oss-120b --max-model-len 32768"
    chosen = stated(model="", gpu="", only=(command, "h100"))
    profile = profile_of([published("bench_serve_results.csv")], chosen)

    assert profile.limits.max_model_len == 32768
    assert "KV tokens, sequences, tokens of a step: not measured" in profile.provenance.source


def test_what_the_files_do_not_say_is_asked_for() -> None:
    """GuideLLM reports no GPU."""
    report = import_results(content("guidellm/concurrent.json.gz"), "report.json")

    with pytest.raises(ImporterError, match="give --gpu"):
        profile_of([report], stated(gpu=""))


def test_the_command_shows_points_and_anchors() -> None:
    """A table with loads, latencies and steadiness; anchors below it."""
    shown = runner.invoke(
        app, ["import", str(DATA / "vllm" / FITTING[0]), str(PROFILES / "mlperf_rows.csv")], env={"COLUMNS": "120"}
    )

    assert shown.exit_code == 0, shown.output
    for text in ("128 in, 32 out", "2 in flight", "50.6/68.7", "anchor: MLPerf Inference v5.1 5.1-0083"):
        assert text in shown.stdout


def test_the_command_prints_json_for_scripts() -> None:
    """Every file with its runs, anchors and refusals; what was left out is also said to people."""
    shown = runner.invoke(app, ["import", str(PROFILES / "bench_serve_results.csv"), "--json"])

    (found,) = json.loads(shown.stdout)
    assert shown.exit_code == 0
    assert len(found["runs"]) + len(found["refused"]) == 270
    assert "left out, bench_serve_results.csv line" in shown.stderr
    assert "more left out; --json has all" in shown.stderr


def test_the_command_writes_a_profile(tmp_path: Path) -> None:
    """One that loads again, named by its file."""
    pytest.importorskip("scipy")
    out = tmp_path / "mine.json"
    paths = [str(DATA / "vllm" / name) for name in FITTING]
    made = runner.invoke(app, ["import", *paths, "--out", str(out), "--model", "llama-3.1-8b", "--gpu", "H100"])

    assert made.exit_code == 0, made.output
    profile: Profile = parse_profile(out.read_bytes())
    assert (profile.name, profile.gpu, profile.gpus_per_replica) == ("mine", "H100", 1)
    assert "measured; penstock import of" in made.stderr


@pytest.mark.parametrize("out", [(), ("--out", "never.json")])
def test_the_command_fails_with_every_files_problem(tmp_path: Path, out: tuple[str, ...]) -> None:
    """One that is away and one in which everything failed: both are named, nothing is written, status 1."""
    failed = runner.invoke(
        app,
        [
            "import",
            str(tmp_path / "away.json"),
            str(DATA / "vllm" / "all_failed.json"),
            *(str(tmp_path / part) if part.endswith(".json") else part for part in out),
        ],
    )

    assert failed.exit_code == 1
    assert "away.json: No such file" in failed.stderr
    assert "none of its 8 requests succeeded" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_why_nothing_can_be_fitted(tmp_path: Path) -> None:
    """Published output rates make no profile."""
    failed = runner.invoke(app, ["import", str(PROFILES / "mlperf_rows.csv"), "--out", str(tmp_path / "no.json")])

    assert failed.exit_code == 1
    assert "no step time follows" in failed.stderr
