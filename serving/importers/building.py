"""From imported runs to a profile, with everything that it stands on in its provenance. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import floor

import msgspec

from serving.benchgroups import ServerFacts, context_of, server_facts, server_roofline
from serving.benchrows import ServedAs
from serving.capacity import EngineLimits
from serving.fit import FitResult, fit_profile
from serving.importers.results import Anchor, Imported, ImporterError, Run, Subject, with_common_mixes
from serving.plausible import contradictions
from serving.profile import Profile, Provenance, ProvenanceKind
from serving.roofline import BatchBounds, Roofline
from serving.servecommand import parse_command

#: MLPerf names a model with the accuracy that it had to reach.
_ACCURACY = re.compile(r"-99(\.9)?$")
_UNKNOWN = "unknown"


class Stated(msgspec.Struct, frozen=True):
    """What the user says of the replica that was measured; empty, or None, where the files or data sheets are to tell.

    ``only`` chooses the runs whose model, GPU, engine, version or serve command say each of these texts. ``date`` is
    when they were imported, for files without one of their own.
    """

    name: str
    date: str
    only: tuple[str, ...] = ()
    model: str = ""
    gpu: str = ""
    gpus: int | None = None
    dtype: str = ""
    parallelism: str = ""
    engine: str = ""
    engine_version: str = ""
    kv_tokens: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


def profile_of(files: Sequence[Imported], stated: Stated) -> Profile:
    """The profile of the one subject that the files' runs are of; a run that stands in two files counts once.

    Raises ``ImporterError`` for anchors alone, for runs of several subjects, for what nobody states and no data sheet
    tells, and for what cannot be true; ``FitError`` for points that determine no model.
    """
    runs = _chosen(files, stated)
    subject = _one_subject([run.subject for run in runs])
    subject = Subject(
        model=stated.model or subject.model,
        gpu=stated.gpu or subject.gpu,
        engine=stated.engine or subject.engine or _UNKNOWN,
        engine_version=stated.engine_version or subject.engine_version or _UNKNOWN,
        serve_command=subject.serve_command,
    )
    for option, value in (("--model", subject.model), ("--gpu", subject.gpu)):
        if not value:
            raise ImporterError(f"the files do not say it; give {option}")
    served, facts = _server(subject, stated)
    limits, roofline = _bounds(served, facts, stated)
    result = fit_profile([run.point for run in runs], roofline)
    profile = Profile(
        name=stated.name,
        model=subject.model,
        gpu=facts.gpu.name if facts.gpu else subject.gpu,
        gpus_per_replica=facts.gpus,
        step_time=result.model,
        limits=limits,
        provenance=_provenance(files, runs, subject, stated, result, facts),
        fit=result.fit,
        surface=result.surface,
    )
    problems = contradictions(profile)
    if problems:
        raise ImporterError(f"the profile would contradict itself: {'; '.join(problems)}")
    return profile


def _chosen(files: Sequence[Imported], stated: Stated) -> tuple[Run, ...]:
    everything = [run for imported in files for run in imported.runs]
    if not everything:
        raise ImporterError(
            "there are only published output rates, without latencies and steps, from which no step time follows; add "
            "runs of a benchmark on that GPU, and these rows become the profile's anchors"
        )
    found = _only(everything, stated.only)
    if not found:
        raise ImporterError(
            f"no run's model, GPU, engine, version and serve command say {' and '.join(map(repr, stated.only))}; "
            f"give another --only"
        )
    once = {msgspec.structs.replace(run.point, source="", mix=""): run for run in reversed(found)}
    return with_common_mixes(reversed(once.values()))


def _only(runs: Sequence[Run], wanted: Sequence[str]) -> Sequence[Run]:
    """Those whose subjects say each of these; where one says exactly that, only such: commands contain each other."""
    for text in wanted:
        exact = [run for run in runs if text.lower() in _texts(run.subject)]
        runs = exact or [run for run in runs if any(text.lower() in own for own in _texts(run.subject))]
    return runs


def _texts(subject: Subject) -> tuple[str, ...]:
    return tuple(getattr(subject, field).lower() for field in Subject.__struct_fields__)


def _one_subject(subjects: Iterable[Subject]) -> Subject:
    """What they are all of, field by field. Raises ``ImporterError`` where two state unlike ones."""
    merged = {}
    for field in Subject.__struct_fields__:
        values = sorted({value for subject in subjects if (value := getattr(subject, field))})
        if len(values) > 1:
            listed = ", ".join(map(repr, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
            raise ImporterError(
                f"a profile is of one model on one GPU type, served in one way, but {field} is {listed}; choose with "
                f"--only TEXT, or give fewer files"
            )
        merged[field] = values[0] if values else ""
    return Subject(**merged)


def _server(subject: Subject, stated: Stated) -> tuple[ServedAs, ServerFacts]:
    """What the serve command and the data sheets tell of the server, where the user does not say otherwise."""
    served = ServedAs(subject.model, subject.gpu, subject.engine, subject.serve_command)
    facts = server_facts(served, stated_dtype=stated.dtype)
    return served, facts._replace(gpus=stated.gpus or facts.gpus)


def _bounds(served: ServedAs, facts: ServerFacts, stated: Stated) -> tuple[EngineLimits, Roofline]:
    """The engine's limits, as stated or else as data sheets and vLLM's defaults have them, and the fit's bounds."""
    context = stated.max_model_len or context_of(served, facts)
    kv_known = stated.kv_tokens is not None or (facts.gpu is not None and facts.model is not None)
    missing = [option for option, known in (("--kv-tokens", kv_known), ("--max-model-len", context)) if not known]
    if missing or context is None:
        raise ImporterError(
            f"benchmark files do not state the engine's limits, and there are no facts of {served.model} on "
            f"{served.gpu} to reckon them from; give {' and '.join(missing)}, as vLLM logs "
            f"them (GPU KV cache size, in tokens)"
        )
    roofline = server_roofline(served, facts)
    batch = BatchBounds(
        max_num_seqs=stated.max_num_seqs or roofline.batch.max_num_seqs,
        max_num_batched_tokens=stated.max_num_batched_tokens or roofline.batch.max_num_batched_tokens,
        kv_tokens=stated.kv_tokens or roofline.batch.kv_tokens,
    )
    limits = EngineLimits(
        max_num_seqs=floor(batch.max_num_seqs),
        max_num_batched_tokens=floor(batch.max_num_batched_tokens),
        kv_tokens=floor(batch.kv_tokens),
        max_model_len=context,
    )
    return limits, msgspec.structs.replace(roofline, batch=batch)


def _provenance(
    files: Sequence[Imported],
    runs: Sequence[Run],
    subject: Subject,
    stated: Stated,
    result: FitResult,
    facts: ServerFacts,
) -> Provenance:
    subjects = {run.subject for run in runs}
    used = [each for each in files if any(run.subject in subjects for run in each.runs)]
    kind: ProvenanceKind = "published" if any(each.origin == "published" for each in used) else "measured"
    command = parse_command(subject.serve_command)
    assumed = [
        option
        for option, value in (
            ("KV tokens", stated.kv_tokens),
            ("context", stated.max_model_len or command.max_model_len),
            ("sequences", stated.max_num_seqs or command.max_num_seqs),
            ("tokens of a step", stated.max_num_batched_tokens or command.max_num_batched_tokens),
        )
        if value is None
    ]
    parts = (
        f"penstock import of {len(runs)} runs from {', '.join(map(_named, used))}",
        result.reason,
        f"{', '.join(assumed)}: not measured, from data sheets and vLLM's defaults" if assumed else "",
        f"served by `{subject.serve_command}`" if subject.serve_command else "",
    )
    return Provenance(
        kind="estimated" if result.provenance == "estimated" else kind,
        date=max((each.date for each in used if each.date), default=stated.date),
        engine=subject.engine,
        engine_version=subject.engine_version,
        dtype=stated.dtype or _UNKNOWN,
        parallelism=stated.parallelism or f"tp{facts.gpus}",
        source="; ".join(filter(None, parts)),
        anchors=tuple(anchor.text for imported in files for anchor in imported.anchors if _is_of(anchor, subject)),
    )


def _named(imported: Imported) -> str:
    tool = f"{imported.tool} {imported.tool_version}".strip()
    return f"{imported.file} ({', '.join(filter(None, (tool, imported.date)))})"


def _is_of(anchor: Anchor, subject: Subject) -> bool:
    gpu, model = _letters(anchor.gpu), _letters(_ACCURACY.sub("", anchor.model))
    return gpu == _letters(subject.gpu) and model in _letters(subject.model)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
