from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

import serving
from serving.capacity import Slo, WorkloadMix
from serving.estimate import (
    ANCHOR_SHAPES,
    DEPLOYMENTS,
    Deployment,
    anchor_row,
    best_output_tokens_per_s,
    compute_efficiency,
    engine_limits,
    estimate,
    published_rows,
)
from serving.gpus import GPUS, MODELS
from serving.profile import dump_profile, load_profile
from serving.stepsim import knee

ROWS = published_rows()
ANCHORED = [d for d in DEPLOYMENTS if d.anchor[2] == d.gpu]

#: MLPerf's Server bounds (99 % of requests), inference_policies for v5.1.
SERVER_SLO = {"llama3.1-8b": Slo(2.0, 0.1, 99.0), "llama2-70b-99": Slo(2.0, 0.2, 99.0)}

every_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d.name)
every_anchored = pytest.mark.parametrize("deployment", ANCHORED, ids=lambda d: d.name)


@every_deployment
def test_the_committed_file_is_what_the_code_generates(deployment: Deployment) -> None:
    """Nobody edits an estimate by hand: ``python -m serving.estimate`` gives the same bytes."""
    committed = Path(serving.__file__).parent / "profiles" / f"{deployment.name}.json"

    assert committed.read_bytes() == dump_profile(estimate(deployment, ROWS))


@every_deployment
def test_an_estimate_says_so_and_names_its_anchor(deployment: Deployment) -> None:
    """The provenance is never taken for a measurement, and leads to the row."""
    provenance = load_profile(deployment.name).provenance

    assert provenance.kind == "estimated"
    assert provenance.source.startswith("Not measured.")
    assert deployment.anchor[0] in provenance.anchors[0]


@every_anchored
def test_the_estimate_reproduces_its_anchor(deployment: Deployment) -> None:
    """On the anchor's workload the profile's best output rate is the published Offline rate, to rounding."""
    profile, row = load_profile(deployment.name), anchor_row(deployment, ROWS)

    rate = best_output_tokens_per_s(profile.step_time, profile.limits, ANCHOR_SHAPES[row.model])

    assert rate / profile.gpus_per_replica == pytest.approx(row.output_tokens_per_s, rel=1e-3)


@every_anchored
def test_the_simulated_knee_comes_near_the_result_left_out(deployment: Deployment) -> None:
    """The Server row was not used; under its SLO the simulator's knee lands within 15 % of it."""
    profile, row = load_profile(deployment.name), anchor_row(deployment, ROWS, "Server")
    shape = ANCHOR_SHAPES[row.model]

    found = knee(profile.step_time, profile.limits, WorkloadMix("anchor", (shape,)), SERVER_SLO[row.model])

    simulated = found.requests_per_s * shape.output_tokens / profile.gpus_per_replica
    assert simulated == pytest.approx(row.output_tokens_per_s, rel=0.15)


@every_anchored
def test_the_implied_efficiency_is_physical(deployment: Deployment) -> None:
    """No anchor asks for more arithmetic than the data sheet has, nor for implausibly little."""
    assert 0.2 < compute_efficiency(deployment, anchor_row(deployment, ROWS)) < 0.9


def test_a_rate_beyond_the_peak_is_refused() -> None:
    """A row that the assumptions cannot explain is an error, not a profile."""
    row = anchor_row(DEPLOYMENTS[0], ROWS)
    impossible = replace(row, output_tokens_per_s=14_000.0)

    with pytest.raises(ValueError, match="of the peak arithmetic"):
        compute_efficiency(DEPLOYMENTS[0], impossible)


def test_a_missing_row_is_named() -> None:
    """The message says which result is not in the file."""
    with pytest.raises(LookupError, match=r"no Offline row \('5\.1-0083'"):
        anchor_row(DEPLOYMENTS[0], [])


def test_weights_that_leave_no_room_are_refused() -> None:
    """A 70B model in FP8 on one H100 does not fit, and the message says on what."""
    with pytest.raises(ValueError, match=r"llama-3\.1-70b leaves 1 × H100 no room"):
        engine_limits(Deployment("H100", "llama-3.1-70b", 1, "fp8", DEPLOYMENTS[0].anchor), GPUS["H100"])


def test_keys_and_values_of_a_token_by_hand() -> None:
    """Llama 3.1 8B keeps 2 × 32 layers × 8 heads × 128 elements of one byte."""
    assert MODELS["llama-3.1-8b"].kv_bytes_per_token == 65_536
