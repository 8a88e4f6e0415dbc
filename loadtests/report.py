"""The report: a table for the screen, and ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from loadtests.claims import Claim, StepResult


class EngineFacts(msgspec.Struct, frozen=True):
    """What served the load."""

    name: str
    version: str
    device: str
    slowdown: float


class ReportedStep(msgspec.Struct, frozen=True):
    """One step's entry in ``report.json``. The prediction is null where no limits were enforced."""

    replicas: int
    offered_rps: float
    offered_tokens_per_s: float
    throttled_share: float
    throttled_request_share: float
    predicted_throttled_share: float | None
    goodput_tokens_per_s: float
    capacity_tokens_per_s: float
    slo_met_share: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    tpot_p50_ms: float
    errors: int
    schedule_lag_p99_ms: float


class Report(msgspec.Struct, frozen=True):
    """The document ``report.json``."""

    engine: EngineFacts
    steps: tuple[ReportedStep, ...]
    control: ReportedStep
    limiter_off: ReportedStep
    claims: tuple[Claim, ...]


def build_report(
    engine: EngineFacts,
    steps: Sequence[StepResult],
    control: StepResult,
    limiter_off: StepResult,
    claims: Sequence[Claim],
) -> Report:
    """The report of a whole run."""
    return Report(
        engine, tuple(reported(step) for step in steps), reported(control), reported(limiter_off), tuple(claims)
    )


def reported(step: StepResult) -> ReportedStep:
    """A step's figures as the report gives them, rounded to what they can carry."""
    values = {
        **msgspec.structs.asdict(step.figures),
        "replicas": step.replicas,
        "capacity_tokens_per_s": step.capacity_tokens_per_s,
        "predicted_throttled_share": None if step.prediction is None else step.prediction.throttled_share,
    }
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
    return msgspec.convert({name: rounded[name] for name in ReportedStep.__struct_fields__}, ReportedStep)


def dump_report(report: Report) -> bytes:
    """Indented JSON, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def screen(steps: Sequence[StepResult], claims: Sequence[Claim], caption: str) -> Group:
    """The steps as a table, and the claims below it."""
    table = Table(
        title="Added capacity removes throttling",
        caption=caption,
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 1, 0),
        collapse_padding=True,
    )
    table.add_column("load")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        table.add_row(step.title.replace(", ", ",\n"), *_cells(step))
    judged = Table.grid(padding=(0, 2, 0, 0))
    judged.add_column(no_wrap=True)
    judged.add_column(no_wrap=True)
    for claim in claims:
        mark = Text("holds", style="green") if claim.holds else Text("FAILS", style="bold red")
        judged.add_row(mark, claim.name, Text(claim.detail, style="dim"))
    return Group(table, "", judged)


_HEADINGS = (
    "offered\ntok/s",
    "throttled\n(requests)",
    "predicted",
    "goodput\n(capacity)",
    "SLO met",
    "TTFT p50\n(p95) ms",
    "TPOT p50\n(p95) ms",
    "errors",
    "lag p99\nms",
)


def _cells(step: StepResult) -> list[str]:
    figures = step.figures
    return [
        f"{figures.offered_tokens_per_s:,.0f}",
        f"{figures.throttled_share:.1%}\n({figures.throttled_request_share:.1%})",
        "none" if step.prediction is None else f"{step.prediction.throttled_share:.1%}",
        f"{figures.goodput_tokens_per_s:,.0f}\n({step.capacity_tokens_per_s:,.0f})",
        f"{figures.slo_met_share:.1%}",
        f"{figures.ttft_p50_ms:,.0f}\n({figures.ttft_p95_ms:,.0f})",
        f"{figures.tpot_p50_ms:,.0f}\n({figures.tpot_p95_ms:,.0f})",
        str(figures.errors),
        f"{figures.schedule_lag_p99_ms:.1f}",
    ]
