from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
from msgspec.structs import replace

import serving
from serving.capacity import Slo, WorkloadMix
from serving.estimate import (
    ANCHOR_SHAPES,
    DEPLOYMENTS,
    BenchAnchor,
    Deployment,
    MlperfAnchor,
    anchor_row,
    anchor_runs,
    best_output_tokens_per_s,
    compute_efficiency,
    engine_limits,
    generated_profiles,
    roofline,
    run_efficiencies,
)
from serving.gpus import GPUS, MODELS
from serving.profile import Profile, dump_profile, load_profile, shipped_profiles
from serving.published import bench_rows, mean_shape, published_rows
from serving.stepsim import knee

ROWS, RUNS = published_rows(), bench_rows()
MLPERF = [(d, d.anchor) for d in DEPLOYMENTS if isinstance(d.anchor, MlperfAnchor)]
ANCHORED = [(d, anchor) for d, anchor in MLPERF if anchor.gpu == d.gpu]
A100 = [(d, d.anchor) for d in DEPLOYMENTS if isinstance(d.anchor, BenchAnchor)]

#: MLPerf's Server bounds (99 % of requests), inference_policies for v5.1.
SERVER_SLO = {"llama3.1-8b": Slo(2.0, 0.1, 99.0), "llama2-70b-99": Slo(2.0, 0.2, 99.0)}

every_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d.name)
every_anchored = pytest.mark.parametrize(("deployment", "anchor"), ANCHORED, ids=[d.name for d, _ in ANCHORED])
every_a100 = pytest.mark.parametrize(("deployment", "anchor"), A100, ids=[d.name for d, _ in A100])


@pytest.mark.parametrize("profile", generated_profiles(), ids=lambda p: p.name)
def test_the_committed_file_is_what_the_code_generates(profile: Profile) -> None:
    """Nobody edits a computed profile by hand: ``python -m serving.estimate`` gives the same bytes."""
    committed = Path(serving.__file__).parent / "profiles" / f"{profile.name}.json"

    assert committed.read_bytes() == dump_profile(profile)


def test_every_shipped_profile_is_computed_or_of_our_own_runs() -> None:
    """What the command does not write rests on runs of this project's own, which it holds."""
    computed = {profile.name for profile in generated_profiles()}

    for name in set(shipped_profiles()) - computed:
        fit = load_profile(name).fit
        assert fit is not None
        assert fit.points


@every_deployment
def test_an_estimate_says_so_and_names_its_anchor(deployment: Deployment) -> None:
    """The provenance is never taken for a measurement, and leads to the row."""
    provenance = load_profile(deployment.name).provenance

    assert provenance.kind == "estimated"
    assert provenance.source.startswith("Not measured.")
    assert provenance.anchors


@every_anchored
def test_the_estimate_reproduces_its_anchor(deployment: Deployment, anchor: MlperfAnchor) -> None:
    """On the anchor's workload the profile's best output rate is the published Offline rate, to rounding."""
    profile, row = load_profile(deployment.name), anchor_row(anchor, ROWS)

    rate = best_output_tokens_per_s(profile.step_time, profile.limits, ANCHOR_SHAPES[row.model])

    assert rate / profile.gpus_per_replica == pytest.approx(row.output_tokens_per_s, rel=1e-3)


@pytest.mark.slow
@every_anchored
def test_the_simulated_knee_comes_near_the_result_left_out(deployment: Deployment, anchor: MlperfAnchor) -> None:
    """The Server row was not used; under its SLO the simulator's knee lands within 15 % of it."""
    profile, row = load_profile(deployment.name), anchor_row(anchor, ROWS, "Server")
    shape = ANCHOR_SHAPES[row.model]

    found = knee(profile.step_time, profile.limits, WorkloadMix("anchor", (shape,)), SERVER_SLO[row.model])

    simulated = found.requests_per_s * shape.output_tokens / profile.gpus_per_replica
    assert simulated == pytest.approx(row.output_tokens_per_s, rel=0.15)


@every_anchored
def test_the_implied_efficiency_is_physical(deployment: Deployment, anchor: MlperfAnchor) -> None:
    """No anchor asks for more arithmetic than the data sheet has, nor for implausibly little."""
    assert 0.2 < compute_efficiency(deployment, anchor_row(anchor, ROWS)) < 0.9


@every_anchored
def test_the_anchor_named_is_the_row_used(deployment: Deployment, anchor: MlperfAnchor) -> None:
    """The provenance leads to the very row."""
    assert anchor.result_id in load_profile(deployment.name).provenance.anchors[0]


@every_a100
def test_an_a100_estimate_lies_within_what_its_runs_imply(deployment: Deployment, anchor: BenchAnchor) -> None:
    """The efficiency is the median of what the runs imply, each of it physical, and every run is named."""
    runs = anchor_runs(anchor, "A100", RUNS)
    efficiencies = run_efficiencies(anchor, "A100", runs)
    model = MODELS[deployment.model]
    peak_s = 2 * model.parameters / (GPUS["A100"].flops["bf16"] * deployment.tensor_parallel)

    used = peak_s / load_profile(deployment.name).step_time.prompt_token_s

    assert len(runs) == 5
    assert 0.3 < efficiencies[0] < efficiencies[-1] < 0.8
    assert used == pytest.approx(median(efficiencies), rel=1e-3)
    for run, named in zip(runs, load_profile(deployment.name).provenance.anchors, strict=True):
        assert run.text["page"] in named
        assert run.text["section"] in named


def test_the_a100_runs_are_reproduced_to_a_third() -> None:
    """With the median efficiency, the roofline of the benchmarked model gives each of its runs back within a third."""
    _, anchor = A100[0]
    runs = anchor_runs(anchor, "A100", RUNS)
    measured = Deployment("A100", anchor.model, 1, "bf16", anchor)
    gpu, efficiency = GPUS["A100"], median(run_efficiencies(anchor, "A100", runs))
    step_time, limits = roofline(measured, gpu, efficiency), engine_limits(measured, gpu)

    for run in runs:
        rate = best_output_tokens_per_s(step_time, limits, mean_shape(run)) / mean_shape(run).output_tokens
        assert rate == pytest.approx(run.number("requests") / run.number("duration_s"), rel=1 / 3)


def test_missing_runs_are_named() -> None:
    """The message says which serve command has no run."""
    with pytest.raises(LookupError, match="no run of 'vllm serve Qwen/Qwen3-14B' on A100"):
        anchor_runs(A100[0][1], "A100", [])


def test_a_rate_beyond_the_peak_is_refused() -> None:
    """A row that the assumptions cannot explain is an error, not a profile."""
    deployment, anchor = ANCHORED[0]
    row = anchor_row(anchor, ROWS)
    impossible = replace(row, output_tokens_per_s=14_000.0)

    with pytest.raises(ValueError, match="of the peak arithmetic"):
        compute_efficiency(deployment, impossible)


def test_a_missing_row_is_named() -> None:
    """The message says which result is not in the file."""
    with pytest.raises(LookupError, match=r"no Offline row \('5\.1-0083'"):
        anchor_row(ANCHORED[0][1], [])


def test_weights_that_leave_no_room_are_refused() -> None:
    """A 70B model in FP8 on one H100 does not fit, and the message says on what."""
    with pytest.raises(ValueError, match=r"llama-3\.1-70b leaves 1 × H100 no room"):
        engine_limits(Deployment("H100", "llama-3.1-70b", 1, "fp8", DEPLOYMENTS[0].anchor), GPUS["H100"])


def test_keys_and_values_of_a_token_by_hand() -> None:
    """Llama 3.1 8B keeps 2 × 32 layers × 8 heads × 128 elements of one byte."""
    assert MODELS["llama-3.1-8b"].kv_bytes_per_token("fp8") == 65_536
