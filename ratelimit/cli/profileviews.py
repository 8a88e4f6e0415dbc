"""How ``penstock profiles`` says what it found: tables for people, plain records for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving.capacity import Slo, WorkloadMix
from serving.comparison import Compared
from serving.curves import Throughput
from serving.fit import residual
from serving.gpus import find_gpu, find_model
from serving.points import MeasuredPoint
from serving.profile import Fit, Profile
from serving.profileplot import ESTIMATED_MARK
from serving.roofline import BatchBounds

ESTIMATED_NOTE = (
    f"{ESTIMATED_MARK} estimated from data sheets and published results, not measured; "
    "`penstock measure` on the hardware itself replaces it"
)
_PROVENANCE_STYLE = {"measured": "green", "published": "cyan", "estimated": "yellow"}
_COEFFICIENTS = (
    ("base_s", 1e3, "ms", "an empty step: the weights are read once"),
    ("prompt_token_s", 1e6, "µs", "for each uncached prompt token in the step"),
    ("sequence_s", 1e6, "µs", "for each sequence in the step"),
    ("kv_token_s", 1e9, "ns", "for each token of the KV cache that is read"),
)


def summary(profile: Profile) -> dict[str, Any]:
    """One profile of the list, for scripts: coefficients in seconds, errors as shares."""
    fit = profile.fit
    return {
        "name": profile.name,
        "model": profile.model,
        "gpu": profile.gpu,
        "gpus_per_replica": profile.gpus_per_replica,
        "provenance": profile.provenance.kind,
        "engine": f"{profile.provenance.engine} {profile.provenance.engine_version}",
        "dtype": profile.provenance.dtype,
        "date": profile.provenance.date,
        "step_time": profile.step_time,
        "points": len(fit.points) if fit else 0,
        "residual_median": fit.residual_median if fit else None,
        "residual_max": fit.residual_max if fit else None,
        "loo_error_median": fit.loo_error_median if fit else None,
        "model_form": fit.model_form if fit else None,
    }


def profile_table(profiles: Sequence[Profile]) -> Table:
    """The list: one row a profile, estimates marked."""
    table = Table()
    for column in ("profile", "model", "GPUs", "provenance", "engine", "date"):
        table.add_column(column, no_wrap=column == "profile")
    for column in ("c0 ms", "c_p µs", "c_s µs", "c_k ns", "line off by", "unseen mix", "form"):
        table.add_column(column, justify="right", no_wrap=True)
    for profile in profiles:
        table.add_row(*map(escape, _identity(profile)[:3]), _provenance(profile.provenance.kind), *_known(profile))
    return table


def print_profile(console: Console, profile: Profile, missing_facts: str | None) -> None:
    """Everything the profile says, for people."""
    console.print(f"[bold]{escape(profile.name)}[/bold]  {_provenance(profile.provenance.kind)}", highlight=False)
    for table in (_facts_table(profile, missing_facts), _coefficient_table(profile), _limit_table(profile)):
        console.print(table)
    if profile.fit is not None:
        console.print(_fit_text(profile.fit), markup=False, highlight=False)
        console.print(_point_table(profile, profile.fit))
    if profile.provenance.kind == "estimated":
        console.print(ESTIMATED_NOTE, style="yellow", markup=False, highlight=False)


def comparison_table(rows: Sequence[Compared], mix: WorkloadMix, slo: Slo) -> Table:
    """One row a profile: its knee by replica, by GPU and by watt."""
    table = Table(
        title=(
            f"{mix.name}: {mix.mean_input_tokens:,.0f} uncached input and {mix.mean_output_tokens:,.0f} output tokens "
            f"a request in the mean; p{slo.percentile:g} TTFT ≤ {slo.ttft_s * 1e3:g} ms, TPOT ≤ {slo.tpot_s * 1e3:g} ms"
        ),
        caption="tokens/J: output tokens per joule of the GPUs alone at their rated power, host and cooling left out",
    )
    for column in ("profile", "GPUs", "provenance"):
        table.add_column(column, no_wrap=True)
    for column in ("requests/s", "in tok/s", "out tok/s", "requests/s", "in tok/s", "out tok/s", "tokens/J", "ratio"):
        table.add_column(f"{'replica' if len(table.columns) < 6 else 'GPU'}\n{column}", justify="right", no_wrap=True)
    table.columns[-2].header, table.columns[-1].header = "GPU\ntokens/J", "GPU\nto first"
    for row in rows:
        mark = f"{ESTIMATED_MARK} " if row.estimated else ""
        table.add_row(
            escape(row.name),
            f"{row.gpus_per_replica} × {escape(row.gpu)}",
            _provenance(row.provenance),
            *_rates(row.per_replica, mark),
            *_rates(row.per_gpu, mark),
            f"{mark}{row.per_joule.output_tokens_per_s:.3g}" if row.per_joule else "-",
            f"{mark}{row.ratio:.2f}" if row.ratio is not None else "-",
        )
    return table


def _rates(rate: Throughput | None, mark: str) -> tuple[str, str, str]:
    if rate is None:
        return ("infeasible", "-", "-")
    return (
        f"{mark}{rate.requests_per_s:.3g}",
        f"{mark}{rate.input_tokens_per_s:,.0f}",
        f"{mark}{rate.output_tokens_per_s:,.0f}",
    )


def _provenance(kind: str) -> str:
    style = _PROVENANCE_STYLE.get(kind, "red")
    return f"[{style}]{kind}{f' {ESTIMATED_MARK}' if kind == 'estimated' else ''}[/{style}]"


def _identity(profile: Profile) -> tuple[str, str, str]:
    return profile.name, profile.model, f"{profile.gpus_per_replica} × {profile.gpu}"


def _known(profile: Profile) -> tuple[str, ...]:
    mark = f"{ESTIMATED_MARK} " if profile.provenance.kind == "estimated" else ""
    coefficients = (f"{mark}{getattr(profile.step_time, field) * unit:.3g}" for field, unit, _, _ in _COEFFICIENTS)
    fit = profile.fit
    return (
        escape(f"{profile.provenance.engine} {profile.provenance.engine_version} {profile.provenance.dtype}"),
        profile.provenance.date,
        *coefficients,
        f"{fit.residual_median:.1%} / {fit.residual_max:.1%}" if fit else "-",
        f"{fit.loo_error_median:.1%}" if fit and fit.loo_error_median is not None else "-",
        fit.model_form if fit else "roofline",
    )


def _facts_table(profile: Profile, missing_facts: str | None) -> Table:
    known = profile.provenance
    table = _plain_table()
    table.add_row("model", escape(profile.model))
    table.add_row("GPUs of a replica", escape(f"{profile.gpus_per_replica} × {profile.gpu}"))
    table.add_row("engine", escape(f"{known.engine} {known.engine_version}, {known.dtype}, {known.parallelism}"))
    table.add_row("date", escape(known.date))
    table.add_row("source", escape(known.source))
    for anchor in known.anchors:
        table.add_row("anchor", escape(anchor))
    for facts in (find_gpu(profile.gpu), find_model(profile.model)):
        if facts is not None:
            table.add_row(f"facts of {facts.name}", escape(facts.source))
    if missing_facts:
        table.add_row("not checked", escape(missing_facts))
    return table


def _coefficient_table(profile: Profile) -> Table:
    mark = f"{ESTIMATED_MARK} " if profile.provenance.kind == "estimated" else ""
    table = Table(title="a step takes", title_justify="left")
    table.add_column("coefficient")
    table.add_column("value", justify="right")
    table.add_column("for")
    for field, unit, name, meaning in _COEFFICIENTS:
        table.add_row(field, f"{mark}{getattr(profile.step_time, field) * unit:.4g} {name}", meaning)
    return table


def _limit_table(profile: Profile) -> Table:
    limits = profile.limits
    table = Table(title="and its batch is bounded by", title_justify="left")
    for column in ("sequences", "tokens a step", "KV tokens", "context", "block"):
        table.add_column(column, justify="right")
    values = (limits.max_num_seqs, limits.max_num_batched_tokens, limits.kv_tokens, limits.max_model_len)
    table.add_row(*(f"{value:,}" for value in (*values, limits.block_size)))
    return table


def _fit_text(fit: Fit) -> str:
    errors = f"{fit.residual_median:.1%} in the median, {fit.residual_max:.1%} at most"
    told = [f"fit ({fit.model_form}): {len(fit.points)} points given back within {errors}"]
    if fit.loo_error_median is not None and fit.loo_error_max is not None:
        told.append(f"mixes left out: {fit.loo_error_median:.1%} in the median, {fit.loo_error_max:.1%} at most")
    if fit.two_rate_error_median is not None:
        told.append(f"two-rate envelope: {fit.two_rate_error_median:.1%}")
    if fit.context is not None:
        told.append(f"measured contexts: {fit.context.least_tokens:,.0f} to {fit.context.most_tokens:,.0f} tokens")
    return "; ".join(told)


def _point_table(profile: Profile, fit: Fit) -> Table:
    line = "" if profile.surface is None else "; a surface of measured factors was laid through them"
    table = Table(title=f"points{line}", title_justify="left")
    table.add_column("mix")
    columns = (
        "load",
        "s",
        "requests",
        "input",
        "output",
        "out tok/s",
        "TTFT p50",
        "p95",
        "TPOT p50",
        "p95",
        "residual",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for point in fit.points:
        table.add_row(*_point_row(profile, point))
    return table


def _point_row(profile: Profile, point: MeasuredPoint) -> tuple[str, ...]:
    limits = profile.limits
    batch = BatchBounds(limits.max_num_seqs, limits.max_num_batched_tokens, limits.kv_tokens)
    load = "-"
    if point.concurrency is not None:
        load = f"{point.concurrency:g} at once"
    elif point.offered_per_s is not None:
        load = f"{point.offered_per_s:g}/s"
    return (
        escape(point.mix),
        load,
        f"{point.duration_s:.0f}",
        f"{point.requests:,}",
        f"{point.input_tokens:,}",
        f"{point.output_tokens:,}",
        f"{point.output_tokens / point.duration_s:,.0f}",
        *(_time(getattr(point, field)) for field in ("ttft_p50_s", "ttft_p95_s", "tpot_p50_s", "tpot_p95_s")),
        f"{residual(profile.step_time, point, batch, profile.surface):+.1%}",
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _plain_table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table
