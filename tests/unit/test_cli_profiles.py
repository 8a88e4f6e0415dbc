from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from ratelimit.cli import app
from serving.profile import ContextRange, Fit, dump_profile, load_profile, shipped_profiles

pytestmark = pytest.mark.slow

runner = CliRunner()
PNG = b"\x89PNG\r\n"


def own_profile(folder: Path, **changes: Any) -> Path:
    path = folder / "own.json"
    path.write_bytes(dump_profile(replace(load_profile("h100-llama-3.1-8b"), name="own", **changes)))
    return path


def test_list_names_every_shipped_profile_with_its_provenance() -> None:
    """Nothing that is shipped is hidden, and every estimate is marked in its row and explained."""
    result = runner.invoke(app, ["profiles", "list"])

    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == len(shipped_profiles())
    for row in rows:
        assert ("estimated ≈" in row) == (row.count("≈ ") > 1)
    assert "≈ estimated from data sheets and published results, not measured" in result.stderr


def test_list_for_scripts_holds_what_the_files_hold() -> None:
    """The JSON has one object a profile, coefficients in seconds."""
    listed = json.loads(runner.invoke(app, ["profiles", "list", "--json"]).stdout)

    assert [row["name"] for row in listed] == shipped_profiles()
    for row in listed:
        assert row["step_time"]["base_s"] == load_profile(row["name"]).step_time.base_s
        assert row["provenance"] in ("measured", "published", "estimated")


def test_list_takes_files_of_ones_own(tmp_path: Path) -> None:
    """A profile that was just measured stands beside a shipped one."""
    listed = runner.invoke(app, ["profiles", "list", str(own_profile(tmp_path)), "cpu-tiny-llama", "--json"])

    assert [row["name"] for row in json.loads(listed.stdout)] == ["own", "cpu-tiny-llama"]


def test_show_tells_sources_points_and_residuals() -> None:
    """Anchors, engine, coefficients, limits, every point and its residual are there."""
    shown = runner.invoke(app, ["profiles", "show", "h100-qwen3-32b"]).stdout
    profile = load_profile("h100-qwen3-32b")

    assert profile.fit is not None
    assert shown.count("bench_serve_results.csv") == len(profile.provenance.anchors) == len(profile.fit.points)
    assert f"{profile.provenance.engine} {profile.provenance.engine_version}" in shown
    assert f"{profile.step_time.base_s * 1e3:.4g} ms" in shown
    assert f"{profile.limits.kv_tokens:,}" in shown
    for point in profile.fit.points:
        assert point.mix in shown
    assert "not measured" in shown


def test_show_of_a_measurement_claims_no_estimate(tmp_path: Path) -> None:
    """A measured profile carries no mark; a GPU without facts is said to be unchecked."""
    plain = load_profile("cpu-tiny-llama")
    path = tmp_path / "own.json"
    path.write_bytes(dump_profile(replace(plain, provenance=replace(plain.provenance, kind="measured"))))
    shown = runner.invoke(app, ["profiles", "show", str(path)]).stdout

    assert "≈" not in shown
    assert "measured" in shown
    assert "no facts of GPU CPU and model tiny-llama" in shown


def test_show_for_scripts_is_the_document() -> None:
    """The JSON is the profile itself, and reads back as the same."""
    shown = runner.invoke(app, ["profiles", "show", "h200-llama-3.1-8b", "--json"])

    assert json.loads(shown.stdout) == json.loads(dump_profile(load_profile("h200-llama-3.1-8b")))


@pytest.mark.parametrize("name", ["h100-qwen3-32b", "cpu-tiny-llama"])
def test_show_draws_fits_and_measurements(name: str, tmp_path: Path) -> None:
    """A picture is written; drawn twice it is the same."""
    first, second = tmp_path / "a.png", tmp_path / "b.png"

    for path in (first, second):
        result = runner.invoke(app, ["profiles", "show", name, "--plot", str(path)])
        assert result.exit_code == 0, result.output

    assert first.read_bytes().startswith(PNG)
    assert first.read_bytes() == second.read_bytes()


def test_compare_gives_rates_by_replica_gpu_and_watt(tmp_path: Path) -> None:
    """A replica of four GPUs is divided by four, ratios are by GPU and to the first, and estimates are marked."""
    names = ["h100-llama-3.1-70b", "b200-llama-3.1-70b"]

    told = json.loads(runner.invoke(app, ["profiles", "compare", *names, "--json"]).stdout)
    shown = runner.invoke(app, ["profiles", "compare", *names, "--plot", str(tmp_path / "p.png")])

    first, second = told["profiles"]
    assert first["per_gpu"]["requests_per_s"] == pytest.approx(first["per_replica"]["requests_per_s"] / 4)
    assert first["per_joule"]["output_tokens_per_s"] == pytest.approx(
        first["per_gpu"]["output_tokens_per_s"] / 700  # watts of one H100
    )
    assert second["ratio"] == pytest.approx(second["per_gpu"]["requests_per_s"] / first["per_gpu"]["requests_per_s"])
    assert first["estimated"]
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("estimated ≈") == 2
    assert f"≈ {second['ratio']:.2f}" in shown.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_compare_names_what_is_infeasible(tmp_path: Path) -> None:
    """A bound below an empty step is a row that says infeasible with the reason, and still a picture."""
    names = ["h100-llama-3.1-70b", "gb200-llama-3.1-8b"]

    result = runner.invoke(
        app,
        ["profiles", "compare", *names, "--tpot-ms", "5", "--plot", str(tmp_path / "p.svg")],
    )

    assert result.exit_code == 0, result.output
    assert "infeasible" in result.stdout
    assert "h100-llama-3.1-70b: infeasible:" in result.stderr
    assert "on an idle replica" in result.stderr
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_compare_extrapolates_on_request_only(tmp_path: Path) -> None:
    """A context beyond what was measured is refused; where it is asked for, the row says so."""
    fit = Fit((), residual_median=0.0, residual_max=0.0, context=ContextRange(100, 200))
    arguments = ["profiles", "compare", str(own_profile(tmp_path, fit=fit)), "--mix", "prefill-heavy"]

    refused = runner.invoke(app, arguments)
    asked_for = runner.invoke(app, [*arguments, "--extrapolate"])

    assert refused.exit_code == 1
    assert "is outside the measured range of 100 to 200 tokens; extrapolate on request only" in refused.stderr
    assert asked_for.exit_code == 0, asked_for.output
    assert "own: extrapolated:" in asked_for.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "h100-lama"], "there are a100-"),
        (["compare", "h100-llama-3.1-8b", "--mix", "chta"], "no workload mix 'chta'; there are chat"),
        (["compare", "h100-llama-3.1-8b", "--plot", "p.bmp"], "no picture format '.bmp'"),
        (["show", "cpu-tiny-llama", "--plot", "no/such/folder/p.png"], "No such file or directory"),
        (["list", "missing.json"], "cannot read profile missing.json"),
    ],
)
def test_mistakes_are_said_and_exit_with_1(arguments: list[str], told: str) -> None:
    """Each mistake is one message on standard error that says what would be right."""
    result = runner.invoke(app, ["profiles", *arguments])

    assert result.exit_code == 1
    assert told in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["list", "show", "compare"])
def test_a_contradictory_profile_is_refused(command: str, tmp_path: Path) -> None:
    """A step time in milliseconds is refused by every command, with what to look at."""
    base = load_profile("h100-llama-3.1-8b").step_time
    path = own_profile(tmp_path, step_time=replace(base, base_s=base.base_s * 1000))

    result = runner.invoke(app, ["profiles", command, str(path)])

    assert result.exit_code == 1
    assert "step_time.base_s is 3.7 s" in result.stderr
    assert "is it in seconds?" in result.stderr


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything but the picture works without it."""
    really_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return really_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)

    result = runner.invoke(app, ["profiles", "show", "h100-llama-3.1-8b", "--plot", str(tmp_path / "p.png")])

    assert result.exit_code == 1
    assert "h100-llama-3.1-8b" in result.stdout
    assert "pip install 'penstock[plot]'" in result.stderr
