"""``penstock limits diff``, ``pending``, ``approve`` and ``history``, over files of our making."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from ratelimit import offline
from ratelimit.approval import Waiting
from ratelimit.audit import AuditLog, Entry
from ratelimit.cli import app
from ratelimit.difference import Difference, difference, snapshot
from ratelimit.governor import ApprovalFile, waiting_file
from ratelimit.keys import KeyFile
from ratelimit.overrides import OverrideFile, setting
from ratelimit.publication import Limit, Publication, PublishedPool, TierLimits
from ratelimit.publisher import published_file
from serving import operating
from serving.stepsim import Knee

runner = CliRunner()

CONFIG = """\
state_dir: {state}
pools:
  - model: m
    engines: [{{device: virtual, profile: h100-llama-3.1-8b, count: {count}, port: 8100}}]
tiers:
  - {{name: pro, share: {share}, ceiling: 1.0}}
  - {{name: free, share: 0.1, ceiling: 0.1}}
orgs: [{{name: acme}}]
{more}
"""


@pytest.fixture(autouse=True)
def knees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Knees without simulation; pages that are wide enough not to be cut."""
    monkeypatch.setattr(operating, "knee", lambda *_: Knee(10.0, 0.5, 0.5, 0.04, "tpot"))
    monkeypatch.setenv("COLUMNS", "200")


def write(folder: Path, name: str, share: float = 0.4, count: int = 2, more: str = "", state: str = "state") -> Path:
    path = folder / name
    path.write_text(CONFIG.format(share=share, count=count, more=more, state=state))
    return path


def limits(*args: object) -> Result:
    return runner.invoke(app, ["limits", *map(str, args)])


def publication(epoch: int, per_minute: int = 1000, keys: int = 2) -> Publication:
    tiers = tuple(
        TierLimits(name, "m", keys, (Limit("output_tokens", per_minute, 100, f"why {epoch}"),))
        for name in ("pro", "free")
    )
    pool = PublishedPool("m", (), (), 4096, 0.25, 64, 60_000_000, 1, 1.0, 1.0, 1.0, "")
    return Publication(epoch, f"2026-11-21T10:0{epoch}:00+00:00", f"cause {epoch}", True, (pool,), tiers)


def keep(state: Path, *amounts: int) -> None:
    """Epochs from 1 on with these amounts; the last is published."""
    before: Publication | None = None
    for epoch, amount in enumerate(amounts, start=1):
        now = publication(epoch, amount)
        does = difference(snapshot(before) if before else None, snapshot(now))
        kept = Entry(epoch, now.published_at, now.reason, before.epoch if before else 0, does, snapshot(now))
        AuditLog(state).append(kept)
        before = now
    with published_file(state).changing() as newest:
        newest[:] = [before] if before else []


def test_a_lower_share_is_told_tier_by_tier_and_stops_a_pipeline(tmp_path: Path) -> None:
    """The table says what falls, by how much and for whom; the exit status is for CI."""
    more = "approval: {falls_above: 0.5}"
    a, b = write(tmp_path, "a.yaml", more=more), write(tmp_path, "b.yaml", share=0.1, more=more)

    result = limits("diff", a, b, "--keys", "pro=4")

    assert result.exit_code == 3
    (row,) = [line for line in result.output.splitlines() if "output_tokens per key" in line]
    assert row.split()[:2] == ["pro", "m"]
    assert "-75.2 %" in row
    assert "its 4 keys, each" in row
    assert "would wait for approval" in result.output


def test_no_fall_is_exit_status_0(tmp_path: Path) -> None:
    """A rise passes, and so does a change by nothing."""
    more = "approval: {falls_above: 0.5}"
    a, b = write(tmp_path, "a.yaml", more=more), write(tmp_path, "b.yaml", share=0.5, more=more)

    assert limits("diff", a, a).exit_code == 0
    assert "no limit differs" in limits("diff", a, a).output
    assert limits("diff", a, b).exit_code == 0


def test_a_change_is_measured_by_the_bound_before_it(tmp_path: Path) -> None:
    """A config that allows itself more is still told by what is allowed now; the option outranks both."""
    a = write(tmp_path, "a.yaml", more="approval: {falls_above: 0.2}")
    b = write(tmp_path, "b.yaml", share=0.2, more="approval: {falls_above: 0.9}")

    c = write(tmp_path, "c.yaml", share=0.2, more="approval: {falls_above: 0.2}")

    assert limits("diff", a, b).exit_code == 3
    assert limits("diff", a, c).exit_code == 3
    assert limits("diff", a, c, "--falls-above", "0.6").exit_code == 0


def test_a_bound_that_is_taken_away_is_told_and_stops_a_pipeline(tmp_path: Path) -> None:
    """No limit differs, and yet nothing would wait any more; the way back is no fall."""
    a = write(tmp_path, "a.yaml", more="approval: {falls_above: 0.2}")
    b = write(tmp_path, "b.yaml")

    result = limits("diff", a, b)
    assert result.exit_code == 3
    assert "approval.falls_above: 20 % → unset" in result.output
    assert limits("diff", b, a).exit_code == 0


def test_without_a_bound_nothing_gates(tmp_path: Path) -> None:
    """Where nothing would wait the exit status is 0, and the output says why."""
    result = limits("diff", write(tmp_path, "a.yaml"), write(tmp_path, "b.yaml", share=0.1))

    assert result.exit_code == 0
    assert "approval.falls_above is not set" in result.output


def test_a_smaller_fleet_is_told_in_supply_and_limits(tmp_path: Path) -> None:
    """The JSON has the pools' replicas and rates, and each limit with its fall."""
    a, b = write(tmp_path, "a.yaml", count=4), write(tmp_path, "b.yaml", count=1)

    result = limits("diff", a, b, "--json", "--falls-above", "0.5")

    document = json.loads(result.stdout)
    assert result.exit_code == 3
    (pool,) = document["pools"]
    assert (pool["before"]["replicas"], pool["after"]["replicas"]) == ({"H100": 4}, {"H100": 1})
    assert pool["after"]["requests_per_s"] == pytest.approx(pool["before"]["requests_per_s"] / 4)
    falls = [limit["fall"] for limit in document["limits"] if limit["limit"] == "output_tokens"]
    assert falls == [pytest.approx(0.75, abs=0.02)] * len(falls)
    assert (document["falls"], document["falls_above"]) == (True, 0.5)
    assert document["largest_fall"] == max(limit["fall"] for limit in document["limits"])


def test_keys_and_overrides_of_the_state_folder_are_counted(tmp_path: Path) -> None:
    """What would be published now has the keys that there are, and the overrides in force."""
    a = write(tmp_path, "a.yaml", state="elsewhere")
    b = write(tmp_path, "b.yaml")
    for i in range(4):
        KeyFile(tmp_path / "state").create(org="acme", tier="pro", name=f"k{i}")
    OverrideFile(tmp_path / "state").add(setting("free", "output_tokens", 7, 4e9, "abuse"), 0)

    document = json.loads(limits("diff", a, b, "--json", "--config", a).stdout)

    keys = {limit["who"]: limit["keys_after"] for limit in document["limits"]}
    assert keys["pro"] == 4
    (free,) = [x for x in document["limits"] if (x["who"], x["limit"], x["per"]) == ("free", "output_tokens", "key")]
    assert free["after"]["assured"] == 7


def test_keys_are_counted_as_published(tmp_path: Path) -> None:
    """The counts in force, which may be learned, outrank those of the keys that were issued."""
    a = write(tmp_path, "a.yaml")
    keep(tmp_path / "state", 1000)

    document = json.loads(limits("diff", "published", a, "--json", "--config", a).stdout)

    assert {limit["keys_after"] for limit in document["limits"] if limit["who"] == "pro"} == {2}


def test_epochs_and_what_is_published_are_compared(tmp_path: Path) -> None:
    """Any epoch that is kept can be named, on either side."""
    a = write(tmp_path, "a.yaml", more="approval: {falls_above: 0.5}")
    keep(tmp_path / "state", 1000, 100, 900)

    assert limits("diff", "1", "published", "--config", a).exit_code == 0
    assert "-10 %" in limits("diff", "1", "published", "--config", a).output
    assert limits("diff", "1", "2", "--config", a).exit_code == 3
    assert limits("diff", "3", "3", "--config", a).exit_code == 0


@pytest.mark.parametrize(
    ("side", "said"),
    [("9", "epoch 9 is not in the audit log; no epoch is kept"), ("published", "nothing has been published")],
)
def test_a_side_that_is_not_there_is_named(tmp_path: Path, side: str, said: str) -> None:
    """The message says what was looked for and where."""
    a = write(tmp_path, "a.yaml")
    result = limits("diff", a, side, "--config", a)

    assert result.exit_code == 1
    assert said in result.output


def test_a_wrong_count_of_keys_is_refused_with_the_right_form(tmp_path: Path) -> None:
    """A typing error is no count."""
    a = write(tmp_path, "a.yaml")
    result = limits("diff", a, a, "--keys", "pro:4")

    assert result.exit_code == 2
    assert "--keys pro=40" in result.output


def test_keys_of_a_tier_that_no_compared_config_has_are_refused(tmp_path: Path) -> None:
    """A misspelt tier would be compared as if it had one key; the message names those that there are."""
    a = write(tmp_path, "a.yaml")
    result = limits("diff", a, a, "--keys", "por=40")

    assert result.exit_code == 2
    assert "no tier por; tiers are free, pro" in result.output


def test_knees_that_are_not_found_in_time_are_an_error_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback, but what took too long."""
    monkeypatch.setattr(offline, "_TIMEOUT_S", 0.0)
    a = write(tmp_path, "a.yaml")
    result = limits("diff", a, a)

    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "was not found within 0 s" in result.output


def test_an_audit_log_that_cannot_be_read_is_an_error_with_a_message(tmp_path: Path) -> None:
    """A folder where a file should be, as after a slip of the hand: the message says which."""
    a = write(tmp_path, "a.yaml")
    (tmp_path / "state" / "audit" / "00000001.jsonl").mkdir(parents=True)
    result = limits("diff", "1", "1", "--config", a)

    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "00000001.jsonl" in result.output


def test_a_wrong_config_is_refused_with_its_line(tmp_path: Path) -> None:
    """A pipeline sees what `penstock check` would say."""
    a = write(tmp_path, "a.yaml")
    b = write(tmp_path, "b.yaml", share=7)
    result = limits("diff", a, b)

    assert result.exit_code == 1
    assert f"{b}:" in result.output


def waiting(state: Path, *digests: str) -> None:
    does = difference(snapshot(publication(1, 1000)), snapshot(publication(1, 100)))
    with waiting_file(state).changing() as kept:
        kept[:] = [Waiting(digest, f"cause of {digest}", 1_800_000_000, 0.5, does) for digest in digests]


def test_what_waits_is_shown_and_approved(tmp_path: Path) -> None:
    """`pending` says what it would do and how to let it through; `approve` keeps who did, and until when."""
    config, state = write(tmp_path, "a.yaml"), tmp_path / "state"
    waiting(state, "aa11")

    shown = limits("pending", "--config", config)
    assert "cause of aa11" in shown.output
    assert "-90 %" in shown.output
    assert "penstock limits approve aa11" in shown.output

    assert limits("approve", "--for", "2h", "--config", config).exit_code == 0
    (approval,) = ApprovalFile(state).valid(0)
    assert approval.digest == "aa11"
    assert approval.by
    assert approval.until - approval.at == 7200
    assert approval.fall == pytest.approx(0.9)


def test_who_approves_is_the_os_user_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that anybody can set names nobody."""
    config, state = write(tmp_path, "a.yaml"), tmp_path / "state"
    waiting(state, "aa11")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody-else")

    assert limits("approve", "--config", config).exit_code == 0
    (approval,) = ApprovalFile(state).valid(0)
    assert approval.by == pwd.getpwuid(os.getuid()).pw_name


def test_a_user_without_a_name_approves_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run under a uid that no passwd entry knows."""
    config, state = write(tmp_path, "a.yaml"), tmp_path / "state"
    waiting(state, "aa11")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)

    assert limits("approve", "--config", config).exit_code == 0
    assert [approval.by for approval in ApprovalFile(state).valid(0)] == ["uid 4000000"]


def test_of_several_that_wait_the_digest_says_which(tmp_path: Path) -> None:
    """Nothing is approved by guessing, and nothing that does not wait."""
    config, state = write(tmp_path, "a.yaml"), tmp_path / "state"
    waiting(state, "aa11", "bb22")

    assert limits("approve", "--config", config).exit_code == 1
    wrong = limits("approve", "cc33", "--config", config)
    assert wrong.exit_code == 1
    assert "aa11 (cause of aa11), bb22" in wrong.output
    assert ApprovalFile(state).valid(0) == ()
    for _ in range(2):
        assert limits("approve", "bb22", "--config", config).exit_code == 0
    assert [approval.digest for approval in ApprovalFile(state).valid(0)] == ["bb22"]


@pytest.mark.parametrize("valid_for", ["0h", "800h", "soon"])
def test_an_approval_has_an_end(tmp_path: Path, valid_for: str) -> None:
    """It holds for some time, a month at most."""
    config, state = write(tmp_path, "a.yaml"), tmp_path / "state"
    waiting(state, "aa11")

    assert limits("approve", "--for", valid_for, "--config", config).exit_code == 1
    assert ApprovalFile(state).valid(0) == ()


def test_whoever_sets_a_limit_hears_that_it_may_wait(tmp_path: Path) -> None:
    """An operator in an emergency is told of the second command."""
    keep(tmp_path / "state", 1000)
    options = ("set", "output_tokens", 1, "--tier", "pro", "--for", "1h", "--reason", "abuse", "--config")

    assert "limits pending" in limits(*options, write(tmp_path, "a.yaml", more="approval: {falls_above: 0.5}")).output
    assert "limits pending" not in limits(*options, write(tmp_path, "b.yaml")).output


def test_nothing_that_waits_is_said_so(tmp_path: Path) -> None:
    """An empty list is an answer."""
    config = write(tmp_path, "a.yaml")

    assert "no change waits" in limits("pending", "--config", config).output
    assert json.loads(limits("pending", "--json", "--config", config).stdout) == []
    assert limits("approve", "--config", config).exit_code == 1


def test_history_shows_the_newest_epochs_first(tmp_path: Path) -> None:
    """When, why, and what each did; as many as asked for."""
    config = write(tmp_path, "a.yaml")
    keep(tmp_path / "state", 1000, 100, 900)

    shown = limits("history", "--limit", "2", "--config", config).output
    assert shown.index("epoch 3") < shown.index("epoch 2")
    assert "epoch 1" not in shown
    assert "cause 2" in shown
    assert "-90 %" in shown

    documents = json.loads(limits("history", "--json", "--config", config).stdout)
    assert [(each["epoch"], each["before"], each["cause"]) for each in documents] == [
        (3, 2, "cause 3"),
        (2, 1, "cause 2"),
        (1, 0, "cause 1"),
    ]
    assert documents[1]["largest_fall"] == pytest.approx(0.9)


def test_history_of_one_tier(tmp_path: Path) -> None:
    """Only the epochs that changed it, and of those only what did."""
    config, state = write(tmp_path, "a.yaml"), tmp_path / "state"
    keep(state, 1000, 500)
    other = msgspec.structs.replace(publication(3, 500), tiers=publication(3, 500).tiers[:1])
    kept = difference(snapshot(publication(2, 500)), snapshot(other))
    AuditLog(state).append(Entry(3, "", "free is gone", 2, kept, snapshot(other)))
    AuditLog(state).append(Entry(4, "", "nothing", 3, Difference(), snapshot(other)))

    documents = json.loads(limits("history", "--tier", "pro", "--json", "--config", config).stdout)

    assert [each["epoch"] for each in documents] == [2, 1]
    assert all(limit["who"] == "pro" for each in documents for limit in each["limits"])


def test_an_epoch_can_be_explained_again(tmp_path: Path) -> None:
    """The log keeps the explanations too."""
    config = write(tmp_path, "a.yaml")
    keep(tmp_path / "state", 1000, 100)

    assert "why 1" in limits("explain", "--epoch", "1", "--config", config).output
    assert "why 2" in limits("explain", "--config", config).output
