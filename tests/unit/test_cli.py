from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ratelimit.cli import app
from ratelimit.keys import KeyFile
from ratelimit.keyuse import KeyUse, uses_file
from ratelimit.publication import Limit, LimitRule, Publication, TierLimits
from ratelimit.publisher import published_file
from ratelimit.usagefiles import UsageFiles
from tests.support.stack import write_config
from tests.support.usage import line

runner = CliRunner()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_check_accepts_the_example() -> None:
    """The config that the README starts from is good."""
    assert runner.invoke(app, ["check", str(Path(__file__).parents[2] / "penstock.yaml")]).exit_code == 0


def test_check_says_what_is_wrong_where_and_what_would_be_right(config: Path) -> None:
    """A misspelt profile is refused with file, line, place, and the names there are."""
    config.write_text(config.read_text().replace("h100-llama-3.1-8b", "h100-lama"))

    result = runner.invoke(app, ["check", str(config)])

    assert result.exit_code == 1
    assert f"{config}:" in result.output
    assert "h100-lama" in result.output
    assert "h100-llama-3.1-8b" in result.output


def test_check_finds_an_slo_that_no_load_meets(config: Path) -> None:
    """A bound below what one lone request takes is refused, and the message names it."""
    config.write_text(config.read_text().replace("tpot_ms: 50", "tpot_ms: 2"))

    result = runner.invoke(app, ["check", str(config)])

    assert result.exit_code == 1
    assert "2 ms" in result.output.replace("0.002 s", "2 ms")


def test_a_key_is_shown_once_and_its_secret_is_kept_nowhere(config: Path) -> None:
    """`keys create` prints the key; neither the state folder nor `keys list` holds it."""
    made = runner.invoke(app, ["keys", "create", "--org", "acme", "--tier", "pro", "--json", "--config", str(config)])
    key = json.loads(made.stdout)

    listed = runner.invoke(app, ["keys", "list", "--json", "--config", str(config)])

    assert [row["id"] for row in json.loads(listed.stdout)] == [key["id"]]
    state = config.parent / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    assert all(key["key"] not in path.read_text() for path in state.iterdir())


def test_a_key_is_rotated_and_each_of_its_secrets_is_listed(config: Path) -> None:
    """`keys rotate` prints a new secret for the same id; the list shows both, and when the key was last used."""
    options = ["--json", "--config", str(config)]
    made = json.loads(runner.invoke(app, ["keys", "create", "--org", "acme", "--tier", "pro", *options]).stdout)

    rotated = json.loads(runner.invoke(app, ["keys", "rotate", made["id"], "--overlap", "2h", *options]).stdout)

    assert rotated["id"] == made["id"]
    assert rotated["key"] != made["key"]
    with uses_file(config.parent / "state").changing() as uses:
        uses[:] = [KeyUse(made["id"], 1_700_000_000)]
    old, new = json.loads(runner.invoke(app, ["keys", "list", *options]).stdout)
    assert (old["id"], old["status"], old["last_used_at"]) == (made["id"], "active", 1_700_000_000)
    assert old["expires_at"] - new["created_at"] == 7200
    assert (new["id"], new["status"], new["expires_at"]) == (made["id"], "active", None)
    listed = runner.invoke(app, ["keys", "list", "--config", str(config)], env={"COLUMNS": "200"}).stdout
    assert "2023-11-14 22:13" in listed
    narrow = runner.invoke(app, ["keys", "list", "--config", str(config)], env={"COLUMNS": "70"}).stdout
    assert narrow.count(made["id"]) == 2
    assert made["key"] not in listed


def test_an_overlap_of_nothing_ends_the_old_secret(config: Path) -> None:
    """`--overlap 0` is taken, and a duration that is none is refused with the form that is right."""
    options = ["--json", "--config", str(config)]
    made = json.loads(runner.invoke(app, ["keys", "create", "--org", "acme", "--tier", "pro", *options]).stdout)

    assert runner.invoke(app, ["keys", "rotate", made["id"], "--overlap", "0", *options]).exit_code == 0

    assert [row["status"] for row in json.loads(runner.invoke(app, ["keys", "list", *options]).stdout)] == [
        "expired",
        "active",
    ]
    wrong = runner.invoke(app, ["keys", "rotate", made["id"], "--overlap", "soon", *options])
    assert wrong.exit_code == 1
    assert "2h" in wrong.output


def test_keys_of_unknown_tiers_and_orgs_are_refused(config: Path) -> None:
    """A key that could never be used is not made; the message names the tiers there are."""
    result = runner.invoke(app, ["keys", "create", "--org", "acme", "--tier", "gold", "--config", str(config)])

    assert result.exit_code == 1
    assert "pro, free, tiny" in result.output


def test_a_wrong_expiry_is_refused_with_the_form_that_is_right(config: Path) -> None:
    """Durations are numbers with a unit; the message shows some."""
    options = ["--org", "acme", "--tier", "pro", "--expires", "soon", "--config", str(config)]

    result = runner.invoke(app, ["keys", "create", *options])

    assert result.exit_code == 1
    assert "2h" in result.output


def test_explaining_before_anything_is_published_says_so(config: Path) -> None:
    """Without a publication there is nothing to explain, and the message says what to start."""
    result = runner.invoke(app, ["limits", "explain", "--config", str(config)])

    assert result.exit_code == 1
    assert "penstock up" in result.output


def test_explain_says_what_is_assured_and_what_is_borrowed(config: Path) -> None:
    """`limits explain` tells each tier's ceilings and place among the borrowers, and the operator's rules for it."""
    limits = (Limit("requests", 60, 5, "x", ceiling_per_minute=600, ceiling_burst=50),)
    tiers = (
        TierLimits("pro", "llama-3.1-8b", 1, limits, borrow_up_to=900),
        TierLimits("free", "llama-3.1-8b", 1, limits[:0], priority=1, shadow=True),
    )
    rules = (LimitRule("requests", 7, "org", "week", tiers=("pro",), reason="contract"),)
    with published_file(config.parent / "state").changing() as newest:
        newest[:] = [Publication(1, "now", "test", enforce=True, pools=(), tiers=tiers, rules=rules)]
    key = KeyFile(config.parent / "state").create(org="acme", tier="pro", name="n")[1]

    explained = {
        what: " ".join(runner.invoke(app, ["limits", "explain", what, "-c", str(config)]).output.split())
        for what in ("pro", "free", key.id)
    }

    assert "requests 60/min, up to 600/min while idle" in explained["pro"]
    assert (
        "borrows what others leave idle (priority 0), while the pool's bucket is at most 0.9 full" in explained["pro"]
    )
    assert "7 requests in a week from the first use, per org: set by operator: contract" in explained["pro"]
    assert "never borrows" in explained["free"]
    assert "shadow" in explained["free"]
    assert "contract" not in explained["free"]
    assert "requests 7 in a window of week per org" in explained[key.id]


def test_setting_a_limit_of_an_unknown_tier_names_those_there_are(config: Path) -> None:
    """A slip in a tier's name is not kept as an override that never acts."""
    with published_file(config.parent / "state").changing() as newest:
        tiers = (TierLimits("pro", "llama-3.1-8b", 1, ()),)
        newest[:] = [Publication(1, "now", "test", enforce=True, pools=(), tiers=tiers)]

    options = ["--tier", "por", "--for", "2h", "--reason", "x", "-c", str(config)]
    result = runner.invoke(app, ["limits", "set", "requests", "5", *options])

    assert result.exit_code == 1
    assert "tiers are pro" in result.output


def test_revoking_an_unknown_key_names_where_ids_are_shown(config: Path) -> None:
    """An id that does not exist is an error with a way on."""
    result = runner.invoke(app, ["keys", "revoke", "k_00000000", "--config", str(config)])

    assert result.exit_code == 1
    assert "penstock keys list" in result.output


@pytest.fixture
def used(config: Path) -> Path:
    """The config of an installation with three records of two orgs, the last of them a day later."""
    lines = [
        line("a", "1700000000000-0"),
        line("b", "1700000000001-0", key="k_2", org="zeta", cached_tokens=1_000_000),
        line("c", "1700086400000-0", model="other"),
    ]
    UsageFiles(config.parent / "state").append(lines)
    return config


def test_usage_is_exported_by_period_and_by_whose_it_was(used: Path) -> None:
    """JSON lines and CSV tell the same records, those from `since` on and before `until`."""

    def export(*options: str) -> str:
        return runner.invoke(app, ["usage", "export", "--config", str(used), "--since", "2023-11-14", *options]).stdout

    assert [json.loads(text)["id"] for text in export().splitlines()] == ["a", "b", "c"]
    assert [json.loads(text)["id"] for text in export("--until", "2023-11-15").splitlines()] == ["a", "b"]
    assert [json.loads(text)["id"] for text in export("--org", "zeta").splitlines()] == ["b"]
    assert [json.loads(text)["id"] for text in export("--key", "k_1", "--model", "other").splitlines()] == ["c"]
    heading, *rows = export("--format", "csv").splitlines()
    assert heading.startswith("id,time,key,org,tier,model,route,stream,input_tokens,")
    assert [row.split(",")[0] for row in rows] == ["a", "b", "c"]


def test_usage_is_summed_up(used: Path) -> None:
    """By org, key and model unless told otherwise; a table for people, numbers for scripts."""
    options = ["--config", str(used), "--since", "2023-11-14"]

    by_org = json.loads(runner.invoke(app, ["usage", "sum", "--by", "org", "--json", *options]).stdout)
    table = runner.invoke(app, ["usage", "sum", *options], env={"COLUMNS": "160"}).stdout

    assert [(row["org"], row["requests"], row["input_tokens"], row["cost_us"]) for row in by_org] == [
        ("acme", 2, 20, 4_000_000),
        ("zeta", 1, 10, 2_000_000),
    ]
    assert "1,000,000" in table
    assert table.count("k_1") == 2


def test_a_wrong_period_or_grouping_is_refused_with_the_form_that_is_right(config: Path) -> None:
    """The messages show what to write."""
    moment = runner.invoke(app, ["usage", "export", "--since", "yesterday", "--config", str(config)])
    grouping = runner.invoke(app, ["usage", "sum", "--by", "color", "--config", str(config)])
    assert (moment.exit_code, grouping.exit_code) == (1, 1)
    assert "2026-01-31" in moment.output
    assert "key, org, model, tier" in grouping.output


def test_a_gateway_needs_a_usable_admin_token(config: Path) -> None:
    """A token file that is too weak stops the start, and the message says how to make one."""
    token = config.parent / "token"
    token.write_text("weak")
    config.write_text(
        config.read_text()
        .replace("redis: embedded", "redis: redis://127.0.0.1:1/0")
        .replace("gateway: {", "gateway: {admin_token_file: token, ")
    )

    result = runner.invoke(app, ["gateway", "--config", str(config)])

    assert result.exit_code == 1
    assert "openssl rand" in result.output
