"""Every (model, GPU, engine, serve command) of a benchmark file, fitted or with why it is not. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from serving.benchrows import BenchRow, RefusedRow, ServedAs, points_of, read_rows
from serving.fit import FitError, FitResult, fit_profile
from serving.gpus import MODELS, GpuFacts, ModelFacts, WeightDtype, find_gpu, find_model
from serving.leftout import LEAST_MIXES
from serving.profile import ModelForm
from serving.roofline import BatchBounds, Roofline, roofline_of, typical_roofline, weight_dtype
from serving.rowchecks import beyond_peak, row_problem
from serving.solve import MissingSolverError

Status = Literal["fitted", "estimated", "refused"]

_PARALLEL = {
    "tensor": re.compile(r"--?(?:tp|tp[-_]size|tensor[-_]parallel[-_]size)[ =](\d+)"),
    "pipeline": re.compile(r"--?(?:pp|pp[-_]size|pipeline[-_]parallel[-_]size)[ =](\d+)"),
    "data": re.compile(r"--?(?:dp|dp[-_]size|data[-_]parallel[-_]size)[ =](\d+)"),
}
_MAX_NUM_SEQS = re.compile(r"--max[-_](?:num[-_]seqs|running[-_]requests|batch[-_]size)[ =](\d+)")
_MAX_NUM_BATCHED_TOKENS = re.compile(r"--(?:max[-_]num[-_](?:batched[-_])?tokens|chunked[-_]prefill[-_]size)[ =](\d+)")
_MAX_MODEL_LEN = re.compile(r"--(?:max[-_]model[-_]len|max[-_]seq[-_]len|context[-_]length)[ =](\d+)")
#: Under SGLang's attention in data parallel the tensor-parallel GPUs are the same ones.
_SHARED_DATA_PARALLEL = "--enable-dp-attention"


_NONE_LEFT_OUT = f"no mix can be left out of fewer than {LEAST_MIXES} that loaded the server"


class GroupReport(msgspec.Struct, frozen=True):
    """One group's fit, in the fields that scripts read, or why there is none.

    ``points`` are the usable rows, ``refused`` says what was wrong with the others, by line. Errors are sizes of
    relative errors of token rates; None where no mix could be left out.
    """

    model: str
    gpu: str
    engine: str
    serve_command: str
    points: int
    steady_points: int
    mixes: int
    model_form: ModelForm | None
    loo_error_median: float | None
    loo_error_max: float | None
    two_rate_error_median: float | None
    status: Status
    reason: str
    provenance: str | None = None
    residual_median: float | None = None
    residual_max: float | None = None
    refused: tuple[str, ...] = ()


class ServerFacts(NamedTuple):
    """What the data sheets and the serve command tell of a group's servers."""

    gpu: GpuFacts | None
    gpus: int
    model: ModelFacts | None
    dtype: WeightDtype


def fit_groups(lines: Iterable[str]) -> list[GroupReport]:
    """A report for each group of the file, in the order of their first rows.

    Raises ``BenchFileError``, and ``MissingSolverError`` where SciPy is not installed.
    """
    rows, malformed = read_rows(lines)
    groups: dict[ServedAs, tuple[list[BenchRow], list[RefusedRow]]] = {}
    places = [(row.line, row.served) for row in rows] + [(row.line, row.served) for row in malformed]
    for _, served in sorted(places):
        groups.setdefault(served, ([], []))
    for row in rows:
        groups[row.served][0].append(row)
    for refused in malformed:
        groups[refused.served][1].append(refused)
    return [fit_group(served, found, refused) for served, (found, refused) in groups.items()]


def fit_group(served: ServedAs, rows: Sequence[BenchRow], malformed: Sequence[RefusedRow] = ()) -> GroupReport:
    """The fit of one group's rows, those that contradict themselves left out."""
    facts = server_facts(served, rows)
    usable, refused = sorted_out(rows, facts)
    problems = tuple(
        f"line {each.line}: {each.problem}" for each in sorted([*malformed, *refused], key=lambda r: r.line)
    )
    points = points_of(usable)
    if not points:
        return _without_fit(served, 0, 0, f"no usable row of {len(problems)}: {problems[0]}", problems)
    mixes = len({point.mix for point in points})
    try:
        result = fit_profile(points, server_roofline(served, facts))
    except MissingSolverError:
        raise
    except FitError as error:
        return _without_fit(served, len(points), mixes, str(error), problems)
    return _report(served, result, len(points), mixes, problems)


def server_facts(served: ServedAs, rows: Sequence[BenchRow] = ()) -> ServerFacts:
    """The facts of the group's GPU and model, how many GPUs its command takes, and its weights' precision.

    Where the command names no number of GPUs it is one; it is never more than the hardware column has.
    """
    command = served.serve_command
    gpus = 1
    for kind, pattern in _PARALLEL.items():
        found = pattern.search(command)
        if found and not (kind == "data" and _SHARED_DATA_PARALLEL in command):
            gpus *= max(1, int(found.group(1)))
    present = [int(found.group(1)) for row in rows if (found := re.match(r"(\d+) [×x] ", row.text["hardware"]))]
    model = _model_facts(served)
    dtype = weight_dtype(command, model) if model is not None else "bf16"
    return ServerFacts(find_gpu(served.gpu), min([gpus, *present]), model, dtype)


def server_roofline(served: ServedAs, facts: ServerFacts) -> Roofline:
    """The bounds of the group's coefficients, with the limits of batches that its command sets."""
    if facts.gpu is None or facts.model is None:
        roofline = typical_roofline(facts.gpu, facts.gpus)
    else:
        roofline = roofline_of(facts.gpu, facts.gpus, facts.model, facts.dtype)
    batch = _with_one_context(roofline.batch, served, facts)
    sequences, tokens = (p.search(served.serve_command) for p in (_MAX_NUM_SEQS, _MAX_NUM_BATCHED_TOKENS))
    if sequences:
        batch = msgspec.structs.replace(batch, max_num_seqs=max(1, int(sequences.group(1))))
    if tokens:
        batch = msgspec.structs.replace(batch, max_num_batched_tokens=max(1, int(tokens.group(1))))
    return msgspec.structs.replace(roofline, batch=batch)


def _with_one_context(batch: BatchBounds, served: ServedAs, facts: ServerFacts) -> BatchBounds:
    """Room for one whole context at least: engines refuse to start with less, and these have started."""
    stated = _MAX_MODEL_LEN.search(served.serve_command)
    context = int(stated.group(1)) if stated else facts.model.max_model_len if facts.model else 1
    return msgspec.structs.replace(batch, kv_tokens=max(batch.kv_tokens, context))


def _model_facts(served: ServedAs) -> ModelFacts | None:
    """By the model's own name, or by the longest known name that its serve command contains."""
    found = find_model(served.model)
    if found is not None:
        return found
    named = [name for name in MODELS if name in served.serve_command.lower()]
    return MODELS[max(named, key=len)] if named else None


def sorted_out(rows: Sequence[BenchRow], facts: ServerFacts) -> tuple[list[BenchRow], list[RefusedRow]]:
    """The rows that contradict neither themselves nor the facts, and the others, each with what is wrong."""
    usable: list[BenchRow] = []
    refused: list[RefusedRow] = []
    seen: dict[tuple[float | None, ...], int] = {}
    for row in rows:
        problem = row_problem(row)
        if problem is None and facts.gpu is not None and facts.model is not None:
            problem = beyond_peak(row, facts.gpu, facts.gpus, facts.model, facts.dtype)
        if problem is None and row.run in seen:
            problem = f"the same run as line {seen[row.run]}: told twice, it would count twice"
        if problem is None:
            seen[row.run] = row.line
            usable.append(row)
        else:
            refused.append(RefusedRow(row.line, row.served, problem))
    return usable, refused


def _report(served: ServedAs, result: FitResult, points: int, mixes: int, problems: tuple[str, ...]) -> GroupReport:
    fit = result.fit
    return GroupReport(
        *served,
        points=points,
        steady_points=len(result.steady),
        mixes=mixes,
        model_form=result.form,
        loo_error_median=fit.loo_error_median,
        loo_error_max=fit.loo_error_max,
        two_rate_error_median=fit.two_rate_error_median,
        status="fitted" if result.provenance == "measured" else "estimated",
        reason=result.reason if fit.loo_error_median is not None else f"{result.reason}; {_NONE_LEFT_OUT}",
        provenance=result.provenance,
        residual_median=fit.residual_median,
        residual_max=fit.residual_max,
        refused=problems,
    )


def _without_fit(served: ServedAs, points: int, mixes: int, reason: str, problems: tuple[str, ...]) -> GroupReport:
    return GroupReport(
        *served,
        points=points,
        steady_points=0,
        mixes=mixes,
        model_form=None,
        loo_error_median=None,
        loo_error_max=None,
        two_rate_error_median=None,
        status="refused",
        reason=reason,
        refused=problems,
    )
