from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

import serving
from ratelimit.cli import app
from serving.benchgroups import GroupReport, fit_groups, server_facts, server_roofline
from serving.benchrows import ServedAs

PUBLISHED = Path(serving.__file__).parent / "profiles" / "bench_serve_results.csv"
FIELDS = [
    "model",
    "gpu",
    "engine",
    "serve_command",
    "points",
    "steady_points",
    "mixes",
    "model_form",
    "loo_error_median",
    "loo_error_max",
    "two_rate_error_median",
    "status",
    "reason",
]


@pytest.fixture(scope="module")
def reports() -> list[GroupReport]:
    """Every group of the published runs."""
    with PUBLISHED.open(encoding="utf-8", newline="") as lines:
        return fit_groups(lines)


def test_every_published_group_ends_in_a_status_with_its_reason(reports: list[GroupReport]) -> None:
    """No row is lost: each is a point of its group, or refused by name; and each group says where it stands."""
    assert len(reports) == 109
    assert sum(report.points + len(report.refused) for report in reports) == 270
    for report in reports:
        assert report.reason
        assert (report.status == "refused") == (report.points == 0) == (report.model_form is None)


def test_a_group_that_ran_another_model_says_so(reports: list[GroupReport]) -> None:
    """Of the published rows three are under the name of a model that their command does not serve; no other is."""
    said = [report for report in reports if "the model column says" in report.reason]
    assert [(report.model, report.points) for report in said] == [("gpt-oss-20b", 1), ("qwen3-32b", 2)]
    assert [report.reason.rsplit("; ", 1)[1] for report in said] == [
        "the model column says gpt-oss-20b, but the serve command runs gpt-oss-120b: taken as gpt-oss-120b",
        "the model column says qwen3-32b, but the serve command runs qwen3-14b: taken as qwen3-14b",
    ]


def test_no_published_group_passes_for_measured(reports: list[GroupReport]) -> None:
    """Nearly all of these runs are bursts, and none has seven steady points of four mixes: every fit is estimated."""
    assert {report.provenance for report in reports} == {"estimated", None}
    assert {report.status for report in reports} == {"estimated", "refused"}


def test_unseen_mixes_are_predicted_better_than_by_two_rates(reports: list[GroupReport]) -> None:
    """Over the groups where both exist, the median error is lower than the plain envelope's by a third and more."""
    compared = [
        (report.loo_error_median, report.two_rate_error_median)
        for report in reports
        if report.loo_error_median is not None and report.two_rate_error_median is not None
    ]
    ours, two_rates = (median(errors) for errors in zip(*compared, strict=True))

    assert len(compared) == 26
    assert ours < two_rates * 2 / 3
    assert sum(mine < theirs for mine, theirs in compared) > 0.8 * len(compared)


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200"])
def test_the_advantage_holds_on_each_gpu_type(reports: list[GroupReport], gpu: str) -> None:
    """The constants of the roofline were not tuned to one GPU type at the cost of another."""
    compared = [r for r in reports if r.gpu == gpu and r.loo_error_median is not None]

    assert median(r.loo_error_median or 0 for r in compared) < median(r.two_rate_error_median or 0 for r in compared)


def test_both_errors_or_none(reports: list[GroupReport]) -> None:
    """A leave-one-mix-out error always stands beside that of the envelope, and needs three mixes."""
    for report in reports:
        assert (report.loo_error_median is None) == (report.two_rate_error_median is None)
        assert report.loo_error_median is None or report.mixes >= 3


def test_json_is_one_object_a_line_in_the_named_fields() -> None:
    """Scripts find the promised fields, first and in order, on every line of standard output."""
    result = CliRunner().invoke(app, ["fit", str(PUBLISHED), "--json"])

    assert result.exit_code == 0
    objects = [json.loads(text) for text in result.stdout.splitlines()]
    assert len(objects) == 109
    assert all(list(each)[: len(FIELDS)] == FIELDS for each in objects)


def test_people_get_a_table_and_what_it_comes_to() -> None:
    """Without --json there is a table, what is wrong with refused rows, and the comparison in one line."""
    result = CliRunner().invoke(app, ["fit", str(PUBLISHED)])

    assert result.exit_code == 0
    assert "unseen mix" in result.output
    assert "the same run as line" in result.output
    assert "109 groups: 108 estimated, 1 refused" in result.output


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"model,gpu\na,b\n", "are missing"), (b"\xff\xfe", "can't decode"), (None, "No such file")],
)
def test_an_unreadable_file_is_one_clear_line(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """A wrong file ends in its message and status 1, not in a traceback."""
    path = tmp_path / "runs.csv"
    if content is not None:
        path.write_bytes(content)
    result = CliRunner().invoke(app, ["fit", str(path), "--json"])

    assert result.exit_code == 1
    assert problem in result.output


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    """Spreadsheets put one before the header; the file is read as any other."""
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(PUBLISHED.read_bytes().splitlines(keepends=True)[:2]))
    result = CliRunner().invoke(app, ["fit", str(path), "--json"])

    assert result.exit_code == 0
    assert json.loads(result.stdout)["model"] == "deepseek-r1"


def test_a_missing_scipy_fails_the_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra there is one message that names it, not a refusal for each group."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    result = CliRunner().invoke(app, ["fit", str(PUBLISHED), "--json"])

    assert result.exit_code == 1
    assert result.output.count("penstock[measure]") == 1


@pytest.mark.parametrize(
    ("command", "gpus"),
    [
        ("vllm serve m", 1),
        ("vllm serve m -tp 4", 4),
        ("vllm serve m --tensor-parallel-size=8", 8),
        ("vllm serve m -tp 2 -pp 2", 4),
        ("vllm serve m -tp 2 -dp 4", 8),
        ("python3 -m sglang.launch_server --tp-size 8 --dp-size 8 --enable-dp-attention", 8),
        ("trtllm-serve m --tp_size 2", 2),
    ],
)
def test_the_gpus_of_a_server_are_read_from_its_command(command: str, gpus: int) -> None:
    """Tensor, pipeline and data parallelism multiply, except where data parallel attention shares the GPUs."""
    assert server_facts(ServedAs("qwen3-32b", "h100", "vllm", command)).gpus == gpus


def test_the_limits_of_a_batch_are_read_from_the_command() -> None:
    """What the server was told bounds its batches; and what started has room for one whole context."""
    served = ServedAs("qwen3-32b", "h100", "vllm", "vllm serve Qwen/Qwen3-32B --max-num-seqs 64 --max-model-len 20000")
    batch = server_roofline(served, server_facts(served)).batch

    assert batch.max_num_seqs == 64
    assert batch.kv_tokens >= 20000


def test_a_family_is_told_by_the_checkpoint_in_the_command() -> None:
    """``glm-4.x`` is no model; the command says which one was served."""
    facts = server_facts(ServedAs("glm-4.x", "h200", "vllm", "vllm serve zai-org/GLM-4.6-FP8 -tp 8"))

    assert facts.model is not None
    assert (facts.model.name, facts.dtype) == ("glm-4.6", "fp8")
