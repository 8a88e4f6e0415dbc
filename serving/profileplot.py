"""Pictures of profiles: throughput per GPU against TPOT, a curve for each profile or each mix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from serving.capacity import Slo, WorkloadMix
from serving.curves import CurvePoint
from serving.plotstyle import COLOURS, GPU_COLOURS, INK, MUTED, dress, picture, thousands, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How far beyond the TPOT bound the axis goes.
_BEYOND_BOUND = 1.6
ESTIMATED_MARK = "≈"
_BESIDE: dict[str, Any] = {
    "loc": "center left",
    "bbox_to_anchor": (1.0, 0.5),
    "frameon": False,
    "fontsize": 10,
    "alignment": "left",
}


class Drawn(msgspec.Struct, frozen=True):
    """A curve as drawn: its rates over ``gpus`` GPUs, and the knee under the SLO in output tokens/s per GPU.

    ``estimated`` draws it dashed, and marks its name. ``seen`` are measured points, as (TPOT in s, output tokens/s per
    GPU).
    """

    label: str
    gpu: str
    gpus: int
    estimated: bool
    points: tuple[CurvePoint, ...]
    knee_tokens_per_s: float | None = None
    seen: tuple[tuple[float, float], ...] = ()


def draw_comparison(curves: Sequence[Drawn], headline: str, mix: WorkloadMix, slo: Slo, path: Path) -> None:
    """The profiles of ``curves`` on one mix, best first, with their knees under the SLO. Raises as ``picture``."""
    ordered = sorted(curves, key=lambda curve: -(curve.knee_tokens_per_s or 0))
    with picture(path) as figure:
        axes = figure.subplots()
        for curve, colour in zip(ordered, _colours(ordered), strict=True):
            _draw_curve(axes, curve, colour)
            if curve.knee_tokens_per_s is not None:
                axes.plot(slo.tpot_s * 1e3, curve.knee_tokens_per_s, "o", color=colour, markersize=7, zorder=4)
        axes.axvline(slo.tpot_s * 1e3, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        axes.set_xlim(0, slo.tpot_s * 1e3 * _BEYOND_BOUND)
        axes.set_ylim(0, _highest(ordered, slo.tpot_s * _BEYOND_BOUND) * 1.08)
        axes.annotate(
            f"TPOT bound {slo.tpot_s * 1e3:g} ms", (slo.tpot_s * 1e3, 0.97), (6, 0), textcoords="offset points",
            xycoords=("data", "axes fraction"), color=MUTED, fontsize=9.5,
        )  # fmt: skip
        _label(axes, f"p{slo.percentile:g} time per output token, ms", "output tokens/s per GPU")
        axes.legend(title=_legend_title(slo), **_BESIDE)
        title(figure, headline, _caption(ordered, mix, slo))


def draw_profile(
    curves: Sequence[Drawn], headline: str, caption: str, percentile: float, seen_label: str, path: Path
) -> None:
    """One profile, a curve for each mix, and what was seen of it, called ``seen_label``. Raises as ``picture``."""
    with picture(path) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        for curve, colour in zip(curves, COLOURS * (1 + len(curves) // len(COLOURS)), strict=False):
            _draw_curve(axes, curve, colour)
            if curve.seen:
                times_ms = [tpot_s * 1e3 for tpot_s, _ in curve.seen]
                axes.plot(times_ms, [rate for _, rate in curve.seen], "o", color=colour, markersize=6, zorder=4)
        if any(curve.seen for curve in curves):
            axes.plot([], [], "o", color=INK, label=seen_label)
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: PLC0415 - picture() imports it

        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(thousands))
        _label(axes, f"p{percentile:g} time per output token, ms (log)", "output tokens/s per GPU (log)")
        dress(axes, "both")
        axes.legend(**_BESIDE)
        title(figure, headline, caption)


def _draw_curve(axes: Axes, curve: Drawn, colour: str) -> None:
    times_ms = [point.tpot_s * 1e3 for point in curve.points]
    rates = [point.rate.output_tokens_per_s / curve.gpus for point in curve.points]
    style = (0, (5, 2)) if curve.estimated else "solid"
    axes.plot(times_ms, rates, color=colour, linewidth=2.2, linestyle=style, label=_name(curve), zorder=3)


def _name(curve: Drawn) -> str:
    if curve.knee_tokens_per_s is None:
        return f"{curve.label}{f' {ESTIMATED_MARK}' if curve.estimated else ''}"
    mark = f"{ESTIMATED_MARK} " if curve.estimated else ""
    return f"{curve.label}: {mark}{thousands(float(f'{curve.knee_tokens_per_s:.2g}'))} tok/s"


def _colours(curves: Sequence[Drawn]) -> list[str]:
    """Each GPU type's own colour, or, where two curves share one, a colour for each curve."""
    own = [GPU_COLOURS.get(curve.gpu) for curve in curves]
    known = [colour for colour in own if colour is not None]
    if len(set(known)) == len(curves):
        return known
    return [COLOURS[place % len(COLOURS)] for place in range(len(curves))]


def _highest(curves: Sequence[Drawn], tpot_s: float) -> float:
    rates = [p.rate.output_tokens_per_s / c.gpus for c in curves for p in c.points if p.tpot_s <= tpot_s]
    return max(rates, default=1.0)


def _label(axes: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415 - picture() imports it

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    dress(axes)


def _legend_title(slo: Slo) -> str:
    return f"at p{slo.percentile:g} TTFT ≤ {slo.ttft_s * 1e3:g} ms\nand TPOT ≤ {slo.tpot_s * 1e3:g} ms:"


def _caption(curves: Sequence[Drawn], mix: WorkloadMix, slo: Slo) -> str:
    estimated = f" {ESTIMATED_MARK}, dashed: estimated, not measured." if any(c.estimated for c in curves) else ""
    return (
        f"Mix {mix.name}: {mix.mean_input_tokens:,.0f} uncached input and {mix.mean_output_tokens:,.0f} output tokens "
        f"a request in the mean. Simulated step by step from each profile; a curve ends where p{slo.percentile:g} TTFT "
        f"exceeds {slo.ttft_s * 1e3:g} ms.{estimated}"
    )
