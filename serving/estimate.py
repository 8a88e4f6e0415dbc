"""Estimated profiles: a roofline from data sheets, with the compute efficiency that a published result implies.

    python -m serving.estimate            regenerates the shipped ones

Every one of them is an **estimate**. The coefficients are

    base            weights ÷ (bandwidth × its efficiency) + overhead of a step (+ all-reduces of a split model)
    prompt token    2 × parameters ÷ (FLOP/s × compute efficiency)
    sequence        the same for the token it emits, + overhead of a sequence
    KV token        keys and values ÷ (bandwidth × its efficiency)

and the compute efficiency, alone, is solved for: with it, the best throughput on the anchor's workload is the anchor's
Offline result. The anchor's Server result is left out, and serves as a check (``tests/unit/test_estimate.py``).

What is assumed rather than known is in the constants below, each with its reason. An anchor cannot tell whether the
proportions are right: a mix unlike the anchor's may be further off than the check is. ``penstock measure`` on the
hardware itself replaces an estimate.
"""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

import msgspec

from serving.capacity import (
    EngineLimits,
    ReplicaGroup,
    RequestShape,
    Slo,
    StepTimeModel,
    WorkloadMix,
    closed_form_requests_per_s,
)
from serving.gpus import GPUS, MODELS, GpuFacts, WeightDtype
from serving.profile import Profile, Provenance, dump_profile

ESTIMATED_ON = "2026-11-21"
ANCHOR_FILE = "mlperf_rows.csv"

#: Share of the data sheet's bandwidth that streaming weights and reading keys and values reach.
BANDWIDTH_EFFICIENCY = 0.75
#: Scheduling, launching and sampling of one step, and the share of each sequence in it.
STEP_OVERHEAD_S = 0.5e-3
SEQUENCE_OVERHEAD_S = 4e-6
#: One all-reduce over NVLink; two for each layer of a split model.
ALL_REDUCE_S = 10e-6
#: What vLLM takes of a GPU's memory by default, and what activations and CUDA graphs take of that.
MEMORY_UTILIZATION = 0.9
ACTIVATION_BYTES = 4e9
MAX_NUM_SEQS = 1024

#: Mean request of the anchors' benchmarks. Outputs: the 128 at which MLPerf cuts summaries, which the reference's
#: 611 characters a summary say is where most end; and 294.45, from the reference of llama2-70b. Inputs: assumed.
ANCHOR_SHAPES = {
    "llama3.1-8b": RequestShape(780, 128),
    "llama2-70b-99": RequestShape(300, 294),
}


class PublishedRow(msgspec.Struct, frozen=True):
    """One MLPerf result, per GPU."""

    result_id: str
    gpu: str
    model: str
    scenario: str
    output_tokens_per_s: float
    weight_dtype: str
    software: str
    submitter: str
    mlperf_round: str


class Deployment(msgspec.Struct, frozen=True):
    """What a profile is made for, and the published result that anchors it.

    ``anchor`` is (result id, MLPerf model, GPU type of that row). ``note`` says where anchor and deployment differ.
    """

    gpu: str
    model: str
    tensor_parallel: int
    dtype: WeightDtype
    anchor: tuple[str, str, str]
    note: str = ""

    @property
    def name(self) -> str:
        """The profile's name."""
        return f"{self.gpu.lower()}-{self.model}"


_LLAMA_2 = "Llama 2 70B has the same layers and widths."

DEPLOYMENTS = (
    Deployment("H100", "llama-3.1-8b", 1, "fp8", ("5.1-0083", "llama3.1-8b", "H100")),
    Deployment("H200", "llama-3.1-8b", 1, "fp8", ("5.1-0079", "llama3.1-8b", "H200"), "The median of three SXM rows."),
    Deployment("B200", "llama-3.1-8b", 1, "fp4", ("5.1-0069", "llama3.1-8b", "B200")),
    Deployment(
        "GB200", "llama-3.1-8b", 1, "fp4", ("5.1-0069", "llama3.1-8b", "B200"), "No GB200 row: B200's efficiency."
    ),
    Deployment("H100", "llama-3.1-70b", 4, "fp8", ("5.1-0015", "llama2-70b-99", "H100"), _LLAMA_2),
    Deployment("H200", "llama-3.1-70b", 2, "fp8", ("5.1-0075", "llama2-70b-99", "H200"), _LLAMA_2),
    Deployment("B200", "llama-3.1-70b", 2, "fp4", ("5.1-0069", "llama2-70b-99", "B200"), _LLAMA_2),
    Deployment("GB200", "llama-3.1-70b", 2, "fp4", ("5.1-0070", "llama2-70b-99", "GB200"), _LLAMA_2),
)


def published_rows() -> list[PublishedRow]:
    """The MLPerf rows that come with Penstock."""
    text = (files("serving") / "profiles" / ANCHOR_FILE).read_text(encoding="utf-8")
    return [
        PublishedRow(
            result_id=row["result_id"],
            gpu=row["gpu"],
            model=row["model"],
            scenario=row["scenario"],
            output_tokens_per_s=float(row["output_tok_s_per_gpu"]),
            weight_dtype=row["weight_dtype"],
            software=row["software"],
            submitter=row["submitter"],
            mlperf_round=row["round"],
        )
        for row in csv.DictReader(text.splitlines())
    ]


def anchor_row(deployment: Deployment, rows: list[PublishedRow], scenario: str = "Offline") -> PublishedRow:
    """The row that anchors the deployment. Raises ``LookupError`` where it is not among the rows."""
    wanted = (*deployment.anchor, scenario)
    for row in rows:
        if (row.result_id, row.model, row.gpu, row.scenario) == wanted:
            return row
    raise LookupError(f"{deployment.name}: no {scenario} row {deployment.anchor} in {ANCHOR_FILE}")


def roofline(deployment: Deployment, gpu: GpuFacts, compute_efficiency: float) -> StepTimeModel:
    """The deployment's step-time model on that GPU, at that share of its peak arithmetic."""
    model, gpus = MODELS[deployment.model], deployment.tensor_parallel
    bytes_per_s = gpu.memory_bytes_per_s * gpus * BANDWIDTH_EFFICIENCY
    token_s = 2 * model.active_parameters / (gpu.flops_at(deployment.dtype) * gpus * compute_efficiency)
    all_reduces_s = 2 * model.layers * ALL_REDUCE_S if gpus > 1 else 0.0
    return StepTimeModel(
        base_s=model.weight_bytes(deployment.dtype) / bytes_per_s + STEP_OVERHEAD_S + all_reduces_s,
        prompt_token_s=token_s,
        sequence_s=token_s + SEQUENCE_OVERHEAD_S,
        kv_token_s=model.kv_bytes_per_token / bytes_per_s,
    )


def engine_limits(deployment: Deployment, gpu: GpuFacts) -> EngineLimits:
    """The limits vLLM sets by default, and the KV cache that the weights leave room for."""
    model, gpus = MODELS[deployment.model], deployment.tensor_parallel
    free_bytes = (gpu.memory_bytes * MEMORY_UTILIZATION - ACTIVATION_BYTES) * gpus
    kv_bytes = free_bytes - model.weight_bytes(deployment.dtype)
    if kv_bytes < model.kv_bytes_per_token * model.max_model_len:
        raise ValueError(f"{model.name} leaves {gpus} × {gpu.name} no room for one full context")
    return EngineLimits(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=gpu.max_num_batched_tokens,
        kv_tokens=int(kv_bytes / model.kv_bytes_per_token),
        max_model_len=model.max_model_len,
    )


def best_output_tokens_per_s(step_time: StepTimeModel, limits: EngineLimits, shape: RequestShape) -> float:
    """Output rate with no latency bound at all, as in MLPerf's Offline scenario."""
    group = ReplicaGroup(1, step_time, limits, Slo(float("inf"), float("inf")))
    return closed_form_requests_per_s(group, WorkloadMix("anchor", (shape,))) * shape.output_tokens


def compute_efficiency(deployment: Deployment, row: PublishedRow) -> float:
    """The share of its peak arithmetic at which the anchor's GPU would give the published rate.

    At that rate a request takes ``published_s`` of a replica. What of it does not depend on the arithmetic is known
    from the roofline at full efficiency; the rest is the arithmetic. Raises ``ValueError`` for a share above 1: then
    the assumptions contradict the result.
    """
    gpu, shape = GPUS[row.gpu], ANCHOR_SHAPES[row.model]
    peak, limits = roofline(deployment, gpu, 1.0), engine_limits(deployment, gpu)
    published_s = shape.output_tokens / (row.output_tokens_per_s * deployment.tensor_parallel)
    arithmetic_s = peak.prompt_token_s * (shape.input_tokens + shape.output_tokens)
    other_s = shape.output_tokens / best_output_tokens_per_s(peak, limits, shape) - arithmetic_s
    efficiency = arithmetic_s / (published_s - other_s)
    if not 0 < efficiency <= 1:
        raise ValueError(f"{deployment.name}: {row.result_id} needs {efficiency:.0%} of the peak arithmetic")
    return efficiency


def estimate(deployment: Deployment, rows: list[PublishedRow]) -> Profile:
    """The estimated profile of one deployment."""
    gpu, row = GPUS[deployment.gpu], anchor_row(deployment, rows)
    efficiency = compute_efficiency(deployment, row)
    exact = roofline(deployment, gpu, efficiency)
    return Profile(
        name=deployment.name,
        model=deployment.model,
        gpu=deployment.gpu,
        gpus_per_replica=deployment.tensor_parallel,
        step_time=StepTimeModel(*(_rounded(getattr(exact, name)) for name in StepTimeModel.__struct_fields__)),
        limits=engine_limits(deployment, gpu),
        provenance=_provenance(deployment, gpu, row, efficiency),
    )


def _provenance(deployment: Deployment, gpu: GpuFacts, row: PublishedRow, efficiency: float) -> Provenance:
    engine, _, version = row.software.split(",")[0].partition(" ")
    return Provenance(
        kind="estimated",
        date=ESTIMATED_ON,
        engine=engine,
        engine_version=version,
        dtype=deployment.dtype,
        parallelism=f"tp{deployment.tensor_parallel}",
        source=(
            f"Not measured. Roofline from the {gpu.source}; arithmetic at {efficiency:.0%} of peak, at which "
            f"it gives the anchor's output tokens/s per GPU. {deployment.note}".strip()
        ),
        anchors=(_anchor_text(row),),
    )


def _anchor_text(row: PublishedRow) -> str:
    return (
        f"MLPerf Inference {row.mlperf_round} {row.result_id} ({row.submitter}, {row.gpu}, {row.model}, "
        f"{row.scenario}, {row.weight_dtype}, {row.software}): {row.output_tokens_per_s:g} output tokens/s per GPU"
    )


def _rounded(value: float) -> float:
    """To five significant digits, so that the files do not differ by a platform's last bit."""
    return float(f"{value:.4e}")


def main() -> None:
    """Write every estimated profile into this package."""
    rows = published_rows()
    for deployment in DEPLOYMENTS:
        path = Path(__file__).parent / "profiles" / f"{deployment.name}.json"
        path.write_bytes(dump_profile(estimate(deployment, rows)))


if __name__ == "__main__":
    main()
