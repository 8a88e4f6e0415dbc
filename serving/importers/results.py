"""What an import gives: runs and anchors, what each is of, and which runs were refused. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from serving.benchrows import are_one_mix
from serving.points import MeasuredPoint

#: So many refusals are quoted where nothing else is left of a file.
_QUOTED_REFUSALS = 3


class ImporterError(ValueError):
    """A file that cannot be imported; the message says what is wrong with it and how to mend it."""


class RunRefusedError(ValueError):
    """One run of a file that cannot be used, while others may be; the message says why and how to mend it."""


class Subject(msgspec.Struct, frozen=True):
    """What was measured, as far as the file says; empty where it does not."""

    model: str = ""
    gpu: str = ""
    engine: str = ""
    engine_version: str = ""
    serve_command: str = ""


class Run(msgspec.Struct, frozen=True):
    """One run, and what it is of."""

    subject: Subject
    point: MeasuredPoint


class Anchor(msgspec.Struct, frozen=True):
    """A published rate without latencies or steps: it checks or anchors a profile, and no step time follows from it."""

    gpu: str
    model: str
    output_tokens_per_s_per_gpu: float
    text: str


class Refusal(msgspec.Struct, frozen=True):
    """A run of the file that was left out, and why."""

    where: str
    reason: str


class Imported(msgspec.Struct, frozen=True):
    """All of one file. ``date`` is ISO, empty where the file has none; ``file`` is its name without folders.

    ``origin`` is ``measured`` for what a tool wrote, ``published`` for tables of others' results.
    """

    file: str
    tool: str
    tool_version: str
    date: str
    origin: Literal["measured", "published"]
    runs: tuple[Run, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    refused: tuple[Refusal, ...] = ()


def nothing_left(file: str, refused: Iterable[Refusal]) -> ImporterError:
    """The error of a file all of whose runs were refused."""
    reasons = [f"{refusal.where}: {refusal.reason}" for refusal in refused]
    quoted = "; ".join(reasons[:_QUOTED_REFUSALS])
    more = f"; and {len(reasons) - _QUOTED_REFUSALS} more" if len(reasons) > _QUOTED_REFUSALS else ""
    return ImporterError(f"{file}: no run of it can be used. {quoted or 'it holds none'}{more}")


def with_common_mixes(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same runs, in their order, with those of about the same mean lengths under the same mix name."""
    named: list[tuple[float, float]] = []
    result = []
    for run in runs:
        own = run.point.mean_input_tokens, run.point.mean_output_tokens
        lengths = next((known for known in named if are_one_mix(known, own)), None)
        if lengths is None:
            named.append(lengths := own)
        point = msgspec.structs.replace(run.point, mix=mix_name(*lengths))
        result.append(msgspec.structs.replace(run, point=point))
    return tuple(result)


def mix_name(input_tokens: float, output_tokens: float) -> str:
    """A workload called by its mean lengths."""
    return f"{input_tokens:.0f} in, {output_tokens:.0f} out"
