from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ratelimit.cli import app
from serving.capacity import EngineLimits, Slo
from serving.endpoint import Endpoint
from serving.enginefacts import Stated, settled_facts
from serving.journal import Journal
from serving.measure import MeasureSettings, MeasureTarget, journal_settings
from serving.profile import load_profile
from serving.run_verdict import PointSettings
from tests.support.fake_engine import FakeEngine
from tests.support.measured import sweep_of

pytestmark = pytest.mark.slow

runner = CliRunner()

LIMITS = EngineLimits(32, 2048, 640 * 16, 512)
SETTINGS = MeasureSettings(Slo(1.0, 0.03), PointSettings(), search_points=5)
OPTIONS = ("--tpot-ms", "30", "--search-points", "5")
STATED = ("--gpu", "FAKE", "--dtype", "bf16", "--max-num-seqs", "32", "--max-num-batched-tokens", "2048")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A fake engine that tells no more than it must."""
    with FakeEngine().in_thread() as where:
        yield where


def interrupted(url: str, out: Path) -> None:
    """All runs of a measurement with these options are in the journal; the profile is not written."""
    stated = Stated("FAKE", None, "bf16", None, 32, 2048)

    async def settings() -> dict[str, str]:
        async with Endpoint(url, None, 20) as endpoint:
            facts = settled_facts(await endpoint.report(), stated)
        return journal_settings(MeasureTarget(url, "fake", SETTINGS, stated), facts)

    with Journal(out.with_name(out.name + ".journal.jsonl"), asyncio.run(settings())) as journal:
        for record in sweep_of(LIMITS, SETTINGS):
            journal.add(record)


def test_it_goes_on_and_writes_the_profile(url: str, tmp_path: Path) -> None:
    """The same command takes the journal up, shows runs and knees with intervals, and prints them as JSON."""
    out = tmp_path / "fake.json"
    interrupted(url, out)

    result = runner.invoke(app, ["measure", url, "--out", str(out), *OPTIONS, *STATED, "--json"])

    assert result.exit_code == 0, result.output
    assert load_profile(str(out)).name == "fake"
    report = json.loads(result.stdout)
    assert len(report["knees"]) == 4
    assert all(point["output_per_s"]["low"] <= point["output_per_s"]["high"] for point in report["points"])
    for said in (
        "going on after",
        "at most",
        "knee: chat/16",
        "95 % intervals",
        "a step takes",
        "steady points back within",
    ):
        assert said in result.stderr


def test_a_path_that_cannot_be_written_is_refused_before_the_sweep(url: str, tmp_path: Path) -> None:
    """A directory, or a file in a folder that is not there, costs no measurement."""
    for out, why in ((tmp_path, "is a directory"), (tmp_path / "none" / "fake.json", "No such file")):
        result = runner.invoke(app, ["measure", url, "--out", str(out), *OPTIONS, *STATED])

        assert result.exit_code == 1
        assert why in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_at_the_end_loses_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where the runs are, and the same command then goes on from them."""
    out = tmp_path / "fake.json"
    interrupted(url, out)

    def full(path: Path, _text: bytes) -> int:
        raise OSError(ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        failed = runner.invoke(app, ["measure", url, "--out", str(out), *OPTIONS, *STATED])
    assert failed.exit_code == 1
    assert "No space left on device; every run is kept in" in failed.output

    result = runner.invoke(app, ["measure", url, "--out", str(out), *OPTIONS, *STATED])
    assert result.exit_code == 0, result.output
    assert "going on after" in result.stderr
    assert load_profile(str(out)).name == "fake"


def test_what_the_engine_does_not_tell_is_asked_for(url: str, tmp_path: Path) -> None:
    """The option is named, and neither profile nor journal appears."""
    result = runner.invoke(app, ["measure", url, "--out", str(tmp_path / "fake.json")])

    assert result.exit_code == 1
    assert "state --gpu" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ttft-ms", "0"), "TTFT bound"),
        (("--point-s", "20", "--most-point-s", "10"), "--most-point-s"),
        (("--tolerance", "2"), "tolerance"),
        (("--warm-up-s", "nan"), "--warm-up-s is nan"),
        (("--lag-ms", "nan"), "--lag-ms comes to nan"),
    ],
)
def test_senseless_options_are_refused(url: str, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    """With what would be right."""
    result = runner.invoke(app, ["measure", url, "--out", str(tmp_path / "fake.json"), *STATED, *options])

    assert result.exit_code == 1
    assert message in result.output
