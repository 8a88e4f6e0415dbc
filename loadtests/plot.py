"""The picture: what was offered, admitted and throttled over time, the capacity steps, and the prediction beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from serving.plotstyle import GRID, INK, MUTED, STYLE

mpl.use("Agg")

_ADMITTED, _THROTTLED, _CAPACITY = "#2a9d8f", "#f4a261", "#264653"
_PAUSE_S = 6.0


class Band(msgspec.Struct, frozen=True):
    """One load as drawn: rates in tokens/s per bin of ``bin_s``, warm-up first."""

    title: str
    bin_s: float
    warm_up_s: float
    offered: tuple[float, ...]
    admitted: tuple[float, ...]
    throttled: tuple[float, ...]
    predicted_throttled: tuple[float, ...]
    capacity_tokens_per_s: float
    throttled_share: float
    predicted_share: float

    @property
    def length_s(self) -> float:
        """How long the load lasted."""
        return self.bin_s * len(self.offered)


def draw(bands: Sequence[Band], caption: str, path: Path) -> None:
    """Write the picture as PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 7.2), dpi=150, layout="constrained")
        rates, shares = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        start_s = 0.0
        ticks: list[tuple[float, str]] = []
        for band in bands:
            _draw_band(rates, shares, band, start_s)
            ticks += [(start_s + t, f"{t:.0f}") for t in _marks(band)]
            start_s += band.length_s + _PAUSE_S
        _dress(rates, shares, max(max(band.offered) for band in bands), start_s - _PAUSE_S)
        shares.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
        figure.suptitle("Added capacity removes throttling", x=0.012, ha="left", fontsize=17, fontweight="bold")
        figure.supxlabel(caption, x=0.012, ha="left", fontsize=9.5, color=MUTED)
        figure.savefig(path)


def _draw_band(rates: Axes, shares: Axes, band: Band, start_s: float) -> None:
    edges = [start_s + k * band.bin_s for k in range(len(band.offered) + 1)]
    answered = [admitted + refused for admitted, refused in zip(band.admitted, band.throttled, strict=True)]
    foretold = [offered - refused for offered, refused in zip(band.offered, band.predicted_throttled, strict=True)]
    rates.stairs(band.admitted, edges, fill=True, color=_ADMITTED, alpha=0.9, label="admitted")
    rates.stairs(answered, edges, baseline=band.admitted, fill=True, color=_THROTTLED, alpha=0.9, label="throttled")
    rates.stairs(band.offered, edges, baseline=None, color=INK, linewidth=1.0, label="offered")
    rates.stairs(foretold, edges, baseline=None, color="white", linewidth=2.6)
    rates.stairs(
        foretold, edges, baseline=None, color=INK, linewidth=1.3, linestyle=(0, (3, 2)), label="admitted, predicted"
    )
    rates.hlines(
        band.capacity_tokens_per_s, edges[0], edges[-1], color=_CAPACITY, linewidth=3.2, label="fleet's capacity"
    )
    shares.stairs(_share(band.throttled, band.offered), edges, fill=True, color=_THROTTLED, alpha=0.9)
    shares.stairs(
        _share(band.predicted_throttled, band.offered),
        edges,
        baseline=None,
        color=INK,
        linewidth=1.3,
        linestyle=(0, (3, 2)),
    )
    for axes in (rates, shares):
        axes.axvspan(edges[0], edges[0] + band.warm_up_s, color="white", alpha=0.55, linewidth=0, zorder=3)
    _annotate(rates, band, (edges[0] + edges[-1]) / 2)


def _annotate(rates: Axes, band: Band, middle_s: float) -> None:
    placed = {"xycoords": ("data", "axes fraction"), "ha": "center"}
    rates.annotate(band.title, (middle_s, 1.10), fontsize=12.5, fontweight="bold", **placed)  # type: ignore[arg-type]  # annotate's keywords are untyped
    seen = f"throttled {band.throttled_share:.1%}, predicted {band.predicted_share:.1%}"
    rates.annotate(seen, (middle_s, 1.04), fontsize=10, color=MUTED, **placed)  # type: ignore[arg-type]  # as above


def _dress(rates: Axes, shares: Axes, highest: float, end_s: float) -> None:
    rates.set_ylim(0, highest * 1.06)
    rates.set_ylabel("input + output tokens/s")
    rates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    handles, labels = rates.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    rates.legend(once.values(), once.keys(), loc="upper left", ncols=len(once), frameon=False, fontsize=10)
    shares.set_ylim(0, 1)
    shares.set_ylabel("share throttled")
    shares.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    shares.set_xlim(0, end_s)
    shares.set_xlabel("seconds since the load started; pale: warm-up, not measured; pauses to add replicas left out")
    for axes in (rates, shares):
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)


def _share(part: Sequence[float], whole: Sequence[float]) -> list[float]:
    return [some / all_ if all_ else 0.0 for some, all_ in zip(part, whole, strict=True)]


def _marks(band: Band) -> list[float]:
    return [t for t in range(0, int(band.length_s) + 1, 20) if t < band.length_s]
