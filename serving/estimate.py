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

from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from serving.benchprofiles import bench_profiles, rounded
from serving.benchrows import BenchRow
from serving.capacity import (
    EngineLimits,
    ReplicaGroup,
    RequestShape,
    StepTimeModel,
    WorkloadMix,
    closed_form_requests_per_s,
)
from serving.curves import WITHOUT_BOUNDS
from serving.gpus import GPUS, MODELS, GpuFacts, WeightDtype
from serving.profile import Profile, Provenance, dump_profile
from serving.published import (
    BENCH_FILE,
    MLPERF_FILE,
    PublishedRow,
    bench_lines,
    bench_rows,
    mean_shape,
    published_rows,
    run_text,
)
from serving.roofline import all_reduces_s, kv_cache_bytes

ESTIMATED_ON = "2026-11-21"

#: Share of the data sheet's bandwidth that streaming weights and reading keys and values reach.
BANDWIDTH_EFFICIENCY = 0.75
#: Scheduling, launching and sampling of one step, and the share of each sequence in it. Both are lower than what
#: ``roofline`` draws a fit to: MLPerf's harness calls the engine without an API server, whose detokenizing and sending
#: that prior holds, and what an anchor loses beyond these goes into its compute efficiency.
STEP_OVERHEAD_S = 0.5e-3
SEQUENCE_OVERHEAD_S = 4e-6

#: Mean request of the anchors' benchmarks. Outputs: the 128 at which MLPerf cuts summaries, which the reference's
#: 611 characters a summary say is where most end; and 294.45, from the reference of llama2-70b. Inputs: assumed.
ANCHOR_SHAPES = {
    "llama3.1-8b": RequestShape(780, 128),
    "llama2-70b-99": RequestShape(300, 294),
}


class MlperfAnchor(NamedTuple):
    """One MLPerf result: its id, the benchmark's model, and the GPU type of that row."""

    result_id: str
    model: str
    gpu: str


class BenchAnchor(msgspec.Struct, frozen=True):
    """Benchmark runs of a model on the deployment's GPU: those of this serve command, all started by one burst."""

    model: str
    engine: str
    engine_version: str
    serve_command: str


class Deployment(msgspec.Struct, frozen=True):
    """What a profile is made for, and the published result that anchors it.

    ``anchor`` is one MLPerf result, or the benchmark runs whose median efficiency is taken. ``note`` says where anchor
    and deployment differ.
    """

    gpu: str
    model: str
    tensor_parallel: int
    dtype: WeightDtype
    anchor: MlperfAnchor | BenchAnchor
    note: str = ""

    @property
    def name(self) -> str:
        """The profile's name."""
        return f"{self.gpu.lower()}-{self.model}"

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, in FP8 beside quantized weights and in BF16 beside those in BF16.

        So the anchors keep them (vLLM: ``--kv-cache-dtype fp8``); a published run keeps them in BF16 unless its
        command says otherwise, which is why ``roofline`` asks the command.
        """
        return MODELS[self.model].kv_bytes_per_token("bf16" if self.dtype == "bf16" else "fp8")


_LLAMA_2 = "Llama 2 70B has the same layers and widths."
#: The dense BF16 model of the A100 pages that leaves one GPU room for a batch.
_QWEN_ON_A100 = BenchAnchor("qwen3-14b", "vLLM", "0.11.0", "vllm serve Qwen/Qwen3-14B")

DEPLOYMENTS = (
    Deployment("H100", "llama-3.1-8b", 1, "fp8", MlperfAnchor("5.1-0083", "llama3.1-8b", "H100")),
    Deployment(
        "H200",
        "llama-3.1-8b",
        1,
        "fp8",
        MlperfAnchor("5.1-0079", "llama3.1-8b", "H200"),
        "The median of three SXM rows.",
    ),
    Deployment("B200", "llama-3.1-8b", 1, "fp4", MlperfAnchor("5.1-0069", "llama3.1-8b", "B200")),
    Deployment(
        "GB200",
        "llama-3.1-8b",
        1,
        "fp4",
        MlperfAnchor("5.1-0069", "llama3.1-8b", "B200"),
        "No GB200 row: B200's efficiency.",
    ),
    Deployment("H100", "llama-3.1-70b", 4, "fp8", MlperfAnchor("5.1-0015", "llama2-70b-99", "H100"), _LLAMA_2),
    Deployment("H200", "llama-3.1-70b", 2, "fp8", MlperfAnchor("5.1-0075", "llama2-70b-99", "H200"), _LLAMA_2),
    Deployment("B200", "llama-3.1-70b", 2, "fp4", MlperfAnchor("5.1-0069", "llama2-70b-99", "B200"), _LLAMA_2),
    Deployment("GB200", "llama-3.1-70b", 2, "fp4", MlperfAnchor("5.1-0070", "llama2-70b-99", "GB200"), _LLAMA_2),
    Deployment("A100", "llama-3.1-8b", 1, "bf16", _QWEN_ON_A100, "No A100 row of this model: Qwen3-14B's efficiency."),
    Deployment("A100", "llama-3.1-70b", 4, "bf16", _QWEN_ON_A100, "No A100 row of this model: Qwen3-14B's efficiency."),
)


def anchor_row(anchor: MlperfAnchor, rows: list[PublishedRow], scenario: str = "Offline") -> PublishedRow:
    """The row that is the anchor. Raises ``LookupError`` where it is not among the rows."""
    wanted = (*anchor, scenario)
    for row in rows:
        if (row.result_id, row.model, row.gpu, row.scenario) == wanted:
            return row
    raise LookupError(f"no {scenario} row {tuple(anchor)} in {MLPERF_FILE}")


def roofline(deployment: Deployment, gpu: GpuFacts, compute_efficiency: float) -> StepTimeModel:
    """The deployment's step-time model on that GPU, at that share of its peak arithmetic."""
    model, gpus = MODELS[deployment.model], deployment.tensor_parallel
    bytes_per_s = gpu.memory_bytes_per_s * gpus * BANDWIDTH_EFFICIENCY
    token_s = 2 * model.active_parameters / (gpu.flops_at(deployment.dtype) * gpus * compute_efficiency)
    return StepTimeModel(
        base_s=model.weight_bytes(deployment.dtype) / bytes_per_s + STEP_OVERHEAD_S + all_reduces_s(model, gpus),
        prompt_token_s=token_s,
        sequence_s=token_s + SEQUENCE_OVERHEAD_S,
        kv_token_s=deployment.kv_bytes_per_token / bytes_per_s,
    )


def engine_limits(deployment: Deployment, gpu: GpuFacts) -> EngineLimits:
    """The limits vLLM sets by default, and the KV cache that the weights leave room for."""
    model, gpus = MODELS[deployment.model], deployment.tensor_parallel
    kv_bytes = kv_cache_bytes(gpu, gpus, model, deployment.dtype)
    if kv_bytes < deployment.kv_bytes_per_token * model.max_model_len:
        raise ValueError(f"{model.name} leaves {gpus} × {gpu.name} no room for one full context")
    return EngineLimits(
        max_num_seqs=gpu.max_num_seqs,
        max_num_batched_tokens=gpu.max_num_batched_tokens,
        kv_tokens=int(kv_bytes / deployment.kv_bytes_per_token),
        max_model_len=model.max_model_len,
    )


def best_output_tokens_per_s(step_time: StepTimeModel, limits: EngineLimits, shape: RequestShape) -> float:
    """Output rate with no latency bound at all, as in MLPerf's Offline scenario."""
    group = ReplicaGroup(1, step_time, limits, WITHOUT_BOUNDS)
    return closed_form_requests_per_s(group, WorkloadMix("anchor", (shape,))) * shape.output_tokens


def compute_efficiency(deployment: Deployment, row: PublishedRow) -> float:
    """The share of its peak arithmetic at which the anchor's GPU would give the published rate. Raises as below."""
    shape = ANCHOR_SHAPES[row.model]
    published_s = shape.output_tokens / (row.output_tokens_per_s * deployment.tensor_parallel)
    return _efficiency(deployment, GPUS[row.gpu], shape, published_s, row.result_id)


def anchor_runs(anchor: BenchAnchor, gpu: str, rows: list[BenchRow]) -> list[BenchRow]:
    """The runs that anchor an estimate. Raises ``LookupError`` where there are none."""
    wanted = (anchor.model, gpu.lower(), anchor.serve_command)
    found = [row for row in rows if (row.served.model, row.served.gpu, row.served.serve_command) == wanted]
    if not found:
        raise LookupError(f"no run of {anchor.serve_command!r} on {gpu} in {BENCH_FILE}")
    return found


def run_efficiencies(anchor: BenchAnchor, gpu: str, runs: list[BenchRow]) -> list[float]:
    """The share of its peak arithmetic that each run implies, in ascending order. Raises ``ValueError`` as below."""
    measured = Deployment(gpu, anchor.model, 1, "bf16", anchor)
    return sorted(
        _efficiency(
            measured, GPUS[gpu], mean_shape(run), run.number("duration_s") / run.number("requests"), run_text(run)
        )
        for run in runs
    )


def _efficiency(deployment: Deployment, gpu: GpuFacts, shape: RequestShape, published_s: float, row: str) -> float:
    """The share at which a request takes ``published_s`` of a replica.

    What of it does not depend on the arithmetic is known from the roofline at full efficiency; the rest is the
    arithmetic. Raises ``ValueError`` for a share above 1: then the assumptions contradict the result.
    """
    peak, limits = roofline(deployment, gpu, 1.0), engine_limits(deployment, gpu)
    arithmetic_s = peak.prompt_token_s * (shape.input_tokens + shape.output_tokens)
    other_s = shape.output_tokens / best_output_tokens_per_s(peak, limits, shape) - arithmetic_s
    efficiency = arithmetic_s / (published_s - other_s)
    if not 0 < efficiency <= 1:
        raise ValueError(f"{deployment.name}: {row} needs {efficiency:.0%} of the peak arithmetic")
    return efficiency


def estimate(deployment: Deployment, rows: list[PublishedRow], runs: list[BenchRow]) -> Profile:
    """The estimated profile of one deployment."""
    gpu = GPUS[deployment.gpu]
    efficiency, provenance = _anchored(deployment, rows, runs)
    exact = roofline(deployment, gpu, efficiency)
    return Profile(
        name=deployment.name,
        model=deployment.model,
        gpu=deployment.gpu,
        gpus_per_replica=deployment.tensor_parallel,
        step_time=StepTimeModel(*(rounded(getattr(exact, name)) for name in StepTimeModel.__struct_fields__)),
        limits=engine_limits(deployment, gpu),
        provenance=provenance,
    )


def _anchored(deployment: Deployment, rows: list[PublishedRow], runs: list[BenchRow]) -> tuple[float, Provenance]:
    """The efficiency that the deployment's anchor implies, and where that is from."""
    if isinstance(deployment.anchor, BenchAnchor):
        own = anchor_runs(deployment.anchor, deployment.gpu, runs)
        efficiencies = run_efficiencies(deployment.anchor, deployment.gpu, own)
        how = (
            f"the median of what {len(own)} published runs of {deployment.anchor.model} imply "
            f"({efficiencies[0]:.0%} to {efficiencies[-1]:.0%})."
        )
        engine, version = deployment.anchor.engine, deployment.anchor.engine_version
        return median(efficiencies), _provenance(
            deployment, engine, version, median(efficiencies), how, tuple(run_text(run) for run in own)
        )
    row = anchor_row(deployment.anchor, rows)
    efficiency = compute_efficiency(deployment, row)
    engine, _, version = row.software.split(",")[0].partition(" ")
    how = "at which it gives the anchor's output tokens/s per GPU."
    return efficiency, _provenance(deployment, engine, version, efficiency, how, (_anchor_text(row),))


def _provenance(
    deployment: Deployment, engine: str, version: str, efficiency: float, how: str, anchors: tuple[str, ...]
) -> Provenance:
    source = GPUS[deployment.gpu].source
    return Provenance(
        kind="estimated",
        date=ESTIMATED_ON,
        engine=engine,
        engine_version=version,
        dtype=deployment.dtype,
        parallelism=f"tp{deployment.tensor_parallel}",
        source=(
            f"Not measured. Roofline from the {source}; arithmetic at {efficiency:.0%} of peak, {how} "
            f"{deployment.note}".strip()
        ),
        anchors=anchors,
    )


def _anchor_text(row: PublishedRow) -> str:
    return (
        f"MLPerf Inference {row.mlperf_round} {row.result_id} ({row.submitter}, {row.gpu}, {row.model}, "
        f"{row.scenario}, {row.weight_dtype}, {row.software}): {row.output_tokens_per_s:g} output tokens/s per GPU"
    )


def generated_profiles() -> list[Profile]:
    """Every profile that comes with Penstock and is computed: the estimates, and the fits of published runs."""
    rows, runs = published_rows(), bench_rows()
    return [*(estimate(deployment, rows, runs) for deployment in DEPLOYMENTS), *bench_profiles(bench_lines())]


def main() -> None:
    """Write them into this package."""
    for profile in generated_profiles():
        path = Path(__file__).parent / "profiles" / f"{profile.name}.json"
        path.write_bytes(dump_profile(profile))


if __name__ == "__main__":
    main()
