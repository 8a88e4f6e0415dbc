"""The figures of ``tests.bench.fidelity`` as tables, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from serving.plotstyle import COLOURS, GRID, INK, MUTED, picture
from tests.bench.fidelity_forms import FormResult
from tests.bench.fidelity_knee import RATES, KneeResult
from tests.bench.fidelity_measure import LevelResult
from tests.bench.fidelity_replay import PROFILE, Case
from tests.bench.fidelity_virtual import BOUNDS, Figure, VirtualResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "output_per_s": "output tokens/s",
    "tpot_mean_s": "TPOT mean",
    "tpot_p50_s": "TPOT p50",
    "tpot_p95_s": "TPOT p95",
    "ttft_mean_s": "TTFT mean",
    "ttft_p50_s": "TTFT p50",
    "ttft_p95_s": "TTFT p95",
}


def print_virtual(result: VirtualResult | None, console: Console) -> None:
    """A row for each figure, a pair of columns for each load; nothing where there is no result."""
    if result is None:
        return
    table = Table("", *(f"{load.share:.0%} of knee, {load.requests} requests" for load in result.loads))
    table.title = f"Virtual GPU ÷ its profile's prediction; {_of(result.case)}"
    for row in zip(*(load.figures for load in result.loads), strict=True):
        bound = f" (±{row[0].bound:.0%})" if row[0].bound else ""
        table.add_row(_NAMES[row[0].name] + bound, *map(_figure_text, row))
    table.add_row("sent late, p99", *(f"{load.lag_p99_s * 1e3:.1f} ms" for load in result.loads))
    table.add_row("cores taken by vLLM", *(f"{load.engine_cores:.2f}" for load in result.loads))
    console.print(table)


def print_knees(results: Sequence[KneeResult], console: Console) -> None:
    """A row for each mix."""
    table = Table("mix", "device", "requests", "simulated", "virtual GPU", "difference", "loads seen / simulated")
    table.title = "Knee of one schedule, requests/s: step simulator and virtual GPU (±10 %)"
    for result in results:
        loads = ", ".join(f"{r.share:.0%}: {r.virtual_load:.2f}/{r.simulated_load:.2f}" for r in result.rates)
        beyond = " (extrapolated)" if result.is_beyond else ""
        table.add_row(
            f"{result.case.mix}, short of {result.case.short_of}",
            _of(result.case),
            str(result.requests),
            f"{result.simulated_per_s:.2f}",
            f"{result.virtual_per_s:.2f}{beyond}",
            _marked(f"{result.error:+.1%}", result.holds),
            loads,
        )
    console.print(table)


def print_forms(results: Sequence[FormResult], console: Console) -> None:
    """A row for each case, by regime."""
    table = Table("regime", "mix", "SLO", "limits", "knee/s", "closed form/s", "above the knee", "w/(1−c0/T*) alone")
    table.title = f"Closed forms and simulated knees; {PROFILE} at full speed, nothing measured"
    for r in results:
        limits = ", ".join(f"{name} {value:,}" for name, value in r.limits.items()) or "its own"
        table.add_row(
            r.regime,
            r.mix,
            f"{r.slo.ttft_s:g} s, {r.slo.tpot_s * 1e3:g} ms",
            limits,
            f"{r.knee_per_s:.2f} ({r.missed})",
            f"{r.closed_per_s:.2f} ({r.scarcest})",
            f"{r.closed_over_knee:+.1%}",
            f"{r.tpot_alone_over_knee:+.1%}",
        )
    console.print(table)


def print_measure(results: Sequence[LevelResult], console: Console) -> None:
    """A row for each load and figure."""
    table = Table("in flight", "figure", "penstock measure", "vllm bench serve", "difference", "rounds")
    table.title = "The tiny model on the CPU: medians of interleaved rounds (±10 %)"
    for result in results:
        for figure in result.figures:
            unit, scale = ("", 1.0) if figure.name == "output_per_s" else (" ms", 1e3)
            table.add_row(
                str(result.concurrency),
                _NAMES[figure.name],
                f"{figure.ours * scale:,.2f}{unit}",
                f"{figure.bench * scale:,.2f}{unit}",
                _marked(f"{figure.error:+.1%}", figure.holds),
                f"{len(result.ours)}",
            )
    console.print(table)


def draw(virtual: VirtualResult | None, knees: Sequence[KneeResult], path: Path) -> None:
    """Left: how far the virtual GPU is from its prediction, by load. Right: the SLO's load around the knee, by mix.

    Raises ``PlotError`` as ``picture`` does.
    """
    with picture(path, height_in=5.0) as figure:
        left, right = figure.subplots(1, 2)
        if virtual is not None:
            _draw_errors(left, virtual)
        _draw_loads(right, knees)
        figure.suptitle("Real vLLM on virtual GPUs, and what the step simulator says of the same requests", color=INK)


def _draw_errors(axes: Axes, result: VirtualResult) -> None:
    for number, (name, bound) in enumerate(BOUNDS.items()):
        colour = COLOURS[number]
        errors = [next(f.error for f in load.figures if f.name == name) * 100 for load in result.loads]
        places = [load.share * 100 + (number - 1.5) * 4 for load in result.loads]
        axes.vlines(places, -bound * 100, bound * 100, color=colour, alpha=0.25, linewidth=7)
        axes.plot(places, errors, "o", color=colour, label=f"{_NAMES[name]} (bound ±{bound:.0%})")
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_xticks([load.share * 100 for load in result.loads])
    axes.set_xlabel("load, % of the simulated knee")
    axes.set_ylabel("virtual GPU over prediction, %")
    axes.set_title(f"{result.case.mix}, slowed {result.case.slowdown:g} times", fontsize=10.5, color=MUTED)
    axes.set_ylim(-12, 24)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def _draw_loads(axes: Axes, results: Sequence[KneeResult]) -> None:
    for colour, result in zip(COLOURS, results, strict=False):
        rates = [rate.share * 100 for rate in result.rates]
        axes.plot(rates, [rate.simulated_load for rate in result.rates], "--", color=colour)
        axes.plot(
            rates,
            [rate.virtual_load for rate in result.rates],
            "o-",
            color=colour,
            label=f"{result.case.mix} ({result.case.short_of}): knee {result.error:+.1%}",
        )
    axes.axhline(1, color=MUTED, linewidth=1)
    axes.grid(color=GRID)
    axes.set_yscale("log")
    axes.set_ylim(0.2, 6)
    axes.set_yticks([0.25, 0.5, 1, 2, 4], labels=["0.25", "0.5", "1", "2", "4"], minor=False)
    axes.minorticks_off()
    axes.set_xticks([rate * 100 for rate in RATES])
    axes.set_xlabel("rate, % of the simulated knee of the schedule")
    axes.set_ylabel("p95 over its bound, the worse of TTFT and TPOT")
    axes.set_title("virtual GPU (dots), simulator (dashed); 1 is the knee", fontsize=10.5, color=MUTED)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def _figure_text(figure: Figure) -> str:
    unit, scale = ("", 1.0) if figure.name == "output_per_s" else (" ms", 1e3)
    text = f"{figure.virtual * scale:.1f} / {figure.predicted * scale:.1f}{unit}  "
    return text + _marked(f"{figure.error:+.1%}", figure.holds)


def _marked(text: str, holds: bool) -> str:
    return text if holds else f"[bold red]{text}[/]"


def _of(case: Case) -> str:
    limits = "".join(f", {name} {value:,}" for name, value in case.limits.items())
    return f"{PROFILE} slowed {case.slowdown:g}×, lengths ×{case.scale:g}{limits}"
