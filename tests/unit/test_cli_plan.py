"""`penstock plan` from the outside: what it prints, draws and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ratelimit.cli import app
from ratelimit.cli.planviews import short

pytestmark = pytest.mark.slow

runner = CliRunner()


def test_the_json_is_what_scripts_were_promised() -> None:
    """`--example NAME --json` prints one object with the promised fields, and nothing else on standard output."""
    result = runner.invoke(app, ["plan", "--example", "node-8xh100", "--json"])

    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {"fleet", "supply", "usable", "tiers", "assumptions"} <= set(document)
    assert document["supply"]["H100"]["provenance"]["kind"] == "estimated"
    for tier in document["tiers"]:
        assert {"tier", "rpm", "itpm", "otpm", "concurrency", "keys", "throttled_share"} <= set(tier)
        assert 0 <= tier["throttled_share"] <= 1
    assert document["before"] is None


def test_the_committed_plan_is_what_the_command_prints() -> None:
    """docs/plan-colossus-1.json is the command's output; docs/planning.md has its table and every assumption."""
    docs = Path(__file__).parents[2] / "docs"
    result = runner.invoke(app, ["plan", "--example", "colossus-1", "--json"])
    page, document = (docs / "planning.md").read_text(), json.loads(result.stdout)
    table = runner.invoke(app, ["plan", "--example", "colossus-1"]).stdout
    shown = page[page.index("\n```\nA site like Colossus 1") :].split("```")[1]

    assert json.loads((docs / "plan-colossus-1.json").read_text()) == document
    assert all(f"- {assumption}\n" in page for assumption in document["assumptions"])
    assert not {line.rstrip() for line in shown.splitlines()} - {line.rstrip() for line in table.splitlines()}
    assert document["cells"]["arithmetic"] in page


def test_the_table_shows_provenance_assumptions_and_both_fleets() -> None:
    """What is added and lost is shown beside what was, and every figure's source is under it."""
    result = runner.invoke(app, ["plan", "--example", "node-8xh100", "--add", "H200=8", "--lose", "H100=4"])

    assert result.exit_code == 0, result.output
    for text in ("before", "after", "+8 H200, -4 H100", "estimated", "assumptions", "tokens a joule", "power of node"):
        assert text in result.stdout


def test_a_tier_without_limits_is_shown_as_unlimited(tmp_path: Path) -> None:
    """Who is unlimited by policy is said to be so, in the table and in the picture of limits."""
    text = runner.invoke(app, ["plan", "--example", "laptop", "--yaml"]).stdout
    all_limits = "unlimited: [requests, input_tokens, output_tokens, concurrency], share"
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("share", all_limits, 1))

    result = runner.invoke(app, ["plan", str(path), "--plot", str(tmp_path)])

    assert result.exit_code == 0, result.output
    assert "unlimited" in result.stdout
    assert (tmp_path / "plan-laptop-limits.png").exists()


def test_an_example_is_a_file_to_start_from(tmp_path: Path) -> None:
    """`--yaml` prints the example as a file that is planned like it."""
    text = runner.invoke(app, ["plan", "--example", "laptop", "--yaml"]).stdout
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    mine = runner.invoke(app, ["plan", str(path), "--json"])
    example = runner.invoke(app, ["plan", "--example", "laptop", "--json"])
    assert mine.exit_code == 0, mine.output
    assert json.loads(mine.stdout) == json.loads(example.stdout)


def test_a_usage_export_takes_the_place_of_the_demand(tmp_path: Path) -> None:
    """`--replay` plans for what was recorded: its keys, its tiers, its lengths."""
    log = tmp_path / "usage.csv"
    rows = [f"{60 * i},pro,k_{i % 3},{50 + i % 7},{20 + i % 5}" for i in range(600)]
    log.write_text("time,tier,key,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")

    result = runner.invoke(app, ["plan", "--example", "laptop", "--replay", str(log), "--times", "50", "--json"])

    assert result.exit_code == 0, result.output
    tiers = {tier["tier"]: tier for tier in json.loads(result.stdout)["tiers"]}
    assert tiers["pro"]["keys"] == 3
    assert tiers["pro"]["offered_requests_per_s"] == pytest.approx(50 / 60, rel=0.01)
    assert tiers["free"]["keys"] == 0
    assert tiers["free"]["throttled_share"] == 0


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """`--plot` draws limits, throttling and supply into a folder, and the same numbers give the same files."""
    pytest.importorskip("matplotlib")
    for folder in ("one", "two"):
        arguments = ["plan", "--example", "laptop", "--add", "CPU=1", "--plot", str(tmp_path / folder)]
        assert runner.invoke(app, arguments).exit_code == 0
    names = ["plan-laptop-limits.png", "plan-laptop-supply.png", "plan-laptop-throttled.png"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no Matplotlib is told what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = runner.invoke(app, ["plan", "--example", "laptop", "--plot", str(tmp_path)])
    assert result.exit_code == 1
    assert "penstock[plot]" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--example colossus-1"),
        (["--example", "colossus-2"], "colossus-1"),
        (["--example", "laptop", "--add", "H100"], "H200=1000"),
        (["--example", "laptop", "--lose", "CPU=2"], "cannot lose 2"),
        (["--example", "laptop", "--add", "X9000=2"], "no GPU type 'X9000'"),
        (["--example", "laptop", "--times", "nan"], "above 0"),
        (["--example", "laptop", "--times", "1000000"], "in requests a second"),
        (["--example", "laptop", "--times", "1e308"], "nearer to 1"),
        (["--example", "laptop", "--add", "CPU=1__0"], "H200=1000"),
        (["--example", "laptop", "--replay", "nowhere.csv"], "cannot read"),
        (["nowhere.yaml"], "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(arguments: list[str], said: str) -> None:
    """Each is one message on standard error with what to do, and exit status 1."""
    result = runner.invoke(app, ["plan", *arguments])
    assert result.exit_code == 1
    assert said in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (8200, "8,200"),
        (36_000, "36k"),
        (1_800_000, "1.8M"),
        (9_999.4, "9,999"),
        (0, "0"),
        (94.17, "94.17"),
        (None, "unlimited"),
    ],
)
def test_numbers_are_short(value: float | None, said: str) -> None:
    """Up to ten thousand in full, then by thousands, never more than four digits."""
    assert short(value) == said
