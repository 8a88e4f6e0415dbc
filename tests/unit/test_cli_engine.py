"""`penstock engine`: what it would start, and why it would not."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ratelimit.cli import app
from serving.engine.command import EngineSpec, engine_argv
from serving.engine.launch import EngineError, become_engine
from serving.profile import load_profile

GPU = ("--device", "gpu", "--profile", "h200-llama-3.1-70b", "--model", "m", "--model-path", "org/m")


def test_show_prints_the_arguments_that_the_supervisor_gives() -> None:
    """One a line, bounds and parallelism of the profile among them, and what follows -- at the end."""
    shown = CliRunner().invoke(
        app, ["engine", *GPU, "--host", "0.0.0.0", "--port", "8001", "--show", "--", "--seed", "1"]
    )
    profile = load_profile("h200-llama-3.1-70b")
    spec = EngineSpec("gpu", "m", 8001, host="0.0.0.0", profile=profile, model_path="org/m", extra_args=("--seed", "1"))
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines() == engine_argv(spec, None)[3:]
    assert shown.stdout.splitlines()[-4:] == ["--tensor-parallel-size", "2", "--seed", "1"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--profile", "h300-none", "--model", "m"), "no shipped profile"),
        ((*GPU, "--slowdown", "2"), "only a virtual GPU"),
        (("--profile", "h100-llama-3.1-8b", "--model", "m", "--slowdown", "0"), "must be a positive number"),
        (("--profile", "h100-llama-3.1-8b", "--model", "m", "--device", "tpu"), "tpu"),
    ],
)
def test_what_cannot_start_is_refused_with_its_reason(arguments: tuple[str, ...], complaint: str) -> None:
    """A message on standard error and a status that is not 0, before anything is started."""
    refused = CliRunner().invoke(app, ["engine", *arguments])
    assert refused.exit_code != 0
    assert complaint in refused.stderr


def test_a_folder_that_cannot_be_written_is_an_error_of_the_engine(tmp_path: Path) -> None:
    """On a read-only root the message names the folder that it wanted."""
    (tmp_path / "file").touch()
    spec = EngineSpec("virtual", "m", 65_432, profile=load_profile("h100-llama-3.1-8b"))
    with pytest.raises(EngineError, match=r"cannot start engine .*file"):
        become_engine(spec, tmp_path / "file" / "engines")
