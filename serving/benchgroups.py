"""Every (model, GPU, engine, serve command) of a benchmark file, fitted or with why it is not. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from serving.benchrows import BenchRow, RefusedRow, ServedAs, points_of, read_rows
from serving.fit import FitError, FitResult, fit_profile
from serving.gpus import GpuFacts, KvDtype, ModelFacts, WeightDtype, find_gpu, find_model
from serving.leftout import LEAST_MIXES
from serving.profile import ModelForm
from serving.roofline import BatchBounds, Roofline, roofline_of, typical_roofline
from serving.rowchecks import beyond_peak, row_problem
from serving.servecommand import ServeCommand, UnknownDtypeError, dtype_told_by, parse_command
from serving.solve import MissingSolverError

Status = Literal["fitted", "estimated", "refused"]

#: How a checkpoint on the server's own disk is told from a repository.
_PATH_STARTS = ("/", "./", "../", "~")
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
    """What the data sheets and the serve command tell of a group's servers.

    ``model`` is None also where its weights are of a type of unknown size: no bound would hold of them.
    """

    gpu: GpuFacts | None
    gpus: int
    model: ModelFacts | None
    dtype: WeightDtype
    kv_dtype: KvDtype


class Group(NamedTuple):
    """The rows of one group that can be used, and the others with what is wrong with them, by line."""

    served: ServedAs
    rows: tuple[BenchRow, ...]
    refused: tuple[RefusedRow, ...]
    facts: ServerFacts


def fit_groups(lines: Iterable[str]) -> list[GroupReport]:
    """A report for each group of the file, in the order of their first rows.

    Raises ``BenchFileError``, and ``MissingSolverError`` where SciPy is not installed.
    """
    return [fit_group(group) for group in groups_of(lines)]


def groups_of(lines: Iterable[str]) -> list[Group]:
    """The groups of the file, in the order of their first rows. Raises ``BenchFileError``."""
    rows, malformed = read_rows(lines)
    groups: dict[ServedAs, tuple[list[BenchRow], list[RefusedRow]]] = {}
    places = [(row.line, row.served) for row in rows] + [(row.line, row.served) for row in malformed]
    for _, served in sorted(places):
        groups.setdefault(served, ([], []))
    for row in rows:
        groups[row.served][0].append(row)
    for refused in malformed:
        groups[refused.served][1].append(refused)
    found = []
    for served, (own, bad) in groups.items():
        facts = server_facts(served, own)
        usable, contradictory = sorted_out(own, facts)
        every = sorted([*bad, *contradictory], key=lambda refused: refused.line)
        found.append(Group(served, tuple(usable), tuple(every), facts))
    return found


def fit_group(group: Group) -> GroupReport:
    """The fit of one group's usable rows."""
    served = group.served
    problems = tuple(f"line {each.line}: {each.problem}" for each in group.refused)
    points = points_of(group.rows)
    if not points:
        return _without_fit(served, 0, 0, f"no usable row of {len(problems)}: {problems[0]}", problems)
    mixes = len({point.mix for point in points})
    try:
        result = fit_profile(points, server_roofline(served, group.facts))
    except MissingSolverError:
        raise
    except FitError as error:
        return _without_fit(served, len(points), mixes, str(error), problems)
    return _report(served, result, len(points), mixes, problems)


def server_facts(served: ServedAs, rows: Sequence[BenchRow] = (), stated_dtype: str = "") -> ServerFacts:
    """The facts of the group's GPU and model, how many GPUs its command takes, and its weights' precision.

    Where the command names no number of GPUs it is one; it is never more than the hardware column has.
    ``stated_dtype`` goes before what command and names tell.
    """
    command = parse_command(served.serve_command)
    present = [int(found.group(1)) for row in rows if (found := re.match(r"(\d+) [×x] ", row.text["hardware"]))]
    gpus, model = min([command.gpus, *present]), served_model(served.model, command)
    dtype: WeightDtype = "bf16" if model is None else model.weight_dtype
    try:
        dtype = dtype_told_by(stated_dtype) or command.weight_dtype or dtype_told_by(served.model) or dtype
    except UnknownDtypeError:
        model = None
    return ServerFacts(find_gpu(served.gpu), gpus, model, dtype, command.kv_dtype)


def misnamed(served: ServedAs) -> str:
    """Empty, or what to say where the model's column and the serve command name two known models: the command ran."""
    checkpoint = parse_command(served.serve_command).checkpoint
    told, ran = find_model(served.model), find_model(checkpoint)
    if told is None or ran is None or told == ran:
        return ""
    return f"the model column says {told.name}, but the serve command runs {ran.name}: taken as {ran.name}"


def served_model(name: str, command: ServeCommand) -> ModelFacts | None:
    """The facts of the checkpoint that the command names, or else of the model's own name.

    A checkpoint of another repository has no facts, whatever the model is called: it may be a distilled or a tuned one.
    A path that tells no known model tells none at all.
    """
    checkpoint = command.checkpoint
    found = find_model(checkpoint) if checkpoint else None
    if found is None and (not checkpoint or checkpoint.startswith(_PATH_STARTS)):
        return find_model(name)
    return found


def server_roofline(served: ServedAs, facts: ServerFacts) -> Roofline:
    """The bounds of the group's coefficients, with the limits of batches that its command sets."""
    if facts.gpu is None or facts.model is None:
        roofline = typical_roofline(facts.gpu, facts.gpus)
    else:
        roofline = roofline_of(facts.gpu, facts.gpus, facts.model, facts.dtype, facts.kv_dtype)
    command, batch = parse_command(served.serve_command), roofline.batch
    batch = BatchBounds(
        max_num_seqs=command.max_num_seqs or batch.max_num_seqs,
        max_num_batched_tokens=command.max_num_batched_tokens or batch.max_num_batched_tokens,
        # Engines refuse to start without room for one whole context, and these have started.
        kv_tokens=max(batch.kv_tokens, context_of(served, facts) or 1),
    )
    return msgspec.structs.replace(roofline, batch=batch)


def context_of(served: ServedAs, facts: ServerFacts) -> int | None:
    """The longest context that the server takes: as its command says, or else the model's own; None if unknown."""
    stated = parse_command(served.serve_command).max_model_len
    return stated or (facts.model.max_model_len if facts.model else None)


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
    none_left_out = "" if fit.loo_error_median is not None else _NONE_LEFT_OUT
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
        reason="; ".join(filter(None, (result.reason, none_left_out, misnamed(served)))),
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
        reason="; ".join(filter(None, (reason, misnamed(served)))),
        refused=problems,
    )
