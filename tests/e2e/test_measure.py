"""``penstock measure`` against real vLLM on a virtual GPU: the profile that comes back is the one it runs on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from serving.capacity import EngineLimits, StepTimeModel
from serving.engine.launch import Engine, start_engines
from serving.fit import residual
from serving.measure import fitting_mix
from serving.profile import load_profile
from tests.support.engines import profile_of, virtual_spec
from tests.support.stack import penstock

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

SLOWDOWN = 3.0
#: Contexts so short that vLLM's own work between steps is much of a request's life: a tenth is allowed for it.
STEP_TIME = StepTimeModel(0.004, 1e-5, 1e-4, 1e-7)
LIMITS = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "kv_tokens": 16384, "max_model_len": 256}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One slowed virtual GPU that tells everything about itself."""
    profile = msgspec.structs.replace(profile_of(**LIMITS), step_time=STEP_TIME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        (running,) = asyncio.run(
            start_engines([virtual_spec(profile, SLOWDOWN)], tmp_path_factory.mktemp("measured"), timeout_s=240)
        )
    yield running
    asyncio.run(running.stop())


def test_a_virtual_gpu_gives_its_profile_back(engine: Engine, tmp_path: Path) -> None:
    """Measured at a stated slowdown, the fitted steps predict its own points, and are its profile's steps slowed."""
    out = tmp_path / "measured.json"
    points = ("--point-s", "5", "--warm-up-s", "1", "--point-requests", "20", "--search-points", "4")
    slo = ("--ttft-ms", "1000", "--tpot-ms", "25", "--lag-ms", "500")
    stated = ("--gpu", "virtual", "--notes", f"virtual GPU, slowed {SLOWDOWN:g} times")
    done = penstock("measure", engine.url, "--out", out, *stated, *slo, *points, "--json", timeout_s=800)

    assert done.returncode == 0, done.stderr
    profile, report = load_profile(str(out)), json.loads(done.stdout)
    assert profile.fit is not None
    assert profile.fit.residual_median < 0.03
    assert profile.fit.residual_max < 0.10
    true = STEP_TIME.slowed(SLOWDOWN)
    assert max(abs(residual(true, point)) for point in profile.fit.points) < 0.10
    assert profile.step_time.base_s == pytest.approx(true.base_s, rel=0.10)
    assert profile.step_time.prompt_token_s == pytest.approx(true.prompt_token_s, rel=0.25)
    assert (profile.gpu, profile.limits.max_num_seqs, profile.provenance.parallelism) == ("virtual", 32, "tp1")
    assert "max_num_seqs=32 (/server_info)" in profile.provenance.source
    assert f"slowed {SLOWDOWN:g} times" in profile.provenance.source
    knees = {knee["mix"]: knee for knee in report["knees"]}
    chat = knees[fitting_mix("chat", EngineLimits(**LIMITS)).name]
    assert chat["crossing_per_s"]["low"] <= chat["crossing_per_s"]["high"]
