"""An SLO that no load can meet is found before anything waits for replicas that supply nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from ratelimit.config import load_config
from ratelimit.feasibility import feasibility_problems
from serving.profile import dump_profile, load_profile

ROOT = Path(__file__).parents[2]
CONFIG = """\
pools:
  - model: tiny-llama
    slo: {{ttft_ms: {ttft_ms}, tpot_ms: {tpot_ms}}}
    mix: {{name: chat, scale: 0.5}}
    engines: [{{device: cpu, profile: {profile}, port: 8100}}]
tiers: [{{name: pro, share: 0.6}}]
orgs: [{{name: acme}}]
"""


def feasibility(folder: Path, ttft_ms: float, tpot_ms: float) -> list[str]:
    """What is infeasible of a small pool with this SLO, which the quick checks accept."""
    path = folder / "penstock.yaml"
    linear = folder / "cpu-tiny-llama.json"  # without its surface, whose shortest steps are shorter than the model's
    linear.write_bytes(dump_profile(replace(load_profile("cpu-tiny-llama"), surface=None)))
    path.write_text(CONFIG.format(ttft_ms=ttft_ms, tpot_ms=tpot_ms, profile=linear))
    return feasibility_problems(load_config(path))


#: A step that serves anything at all takes longer.
HARDLY_MORE_THAN_AN_EMPTY_STEP_MS = 1001 * load_profile("cpu-tiny-llama").step_time.base_s


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "missed"),
    [(HARDLY_MORE_THAN_AN_EMPTY_STEP_MS, 50, "TTFT"), (1000, HARDLY_MORE_THAN_AN_EMPTY_STEP_MS, "TPOT")],
)
def test_an_slo_that_no_load_meets_is_named(tmp_path: Path, ttft_ms: float, tpot_ms: float, missed: str) -> None:
    """The problem says which pool, which profile, which bound is missed, and what would help."""
    (problem,) = feasibility(tmp_path, ttft_ms, tpot_ms)
    assert problem.startswith("pools[0].slo: tiny-llama on cpu-tiny-llama can never meet it: ")
    assert missed in problem
    assert problem.endswith("raise the bound, lower mix.scale, or use a faster profile")


def test_the_loosest_slo_is_feasible(tmp_path: Path) -> None:
    """The largest bounds that a config may state are computed with, not overflowed."""
    assert feasibility(tmp_path, 3_600_000, 60_000) == []


def test_the_example_is_feasible() -> None:
    """The config that the README starts from can keep its promise."""
    assert feasibility_problems(load_config(ROOT / "penstock.yaml")) == []
