"""The look that all of Penstock's pictures share, and Matplotlib itself, which only some installations have.

Pictures are drawn on a ``Figure`` of their own with the Agg canvas: no global state, no window, no ``pyplot``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
#: A colour for each GPU type, the same in every picture; from pale to strong with its generation.
GPU_COLOURS = {"A100": "#8d99ae", "H100": "#457b9d", "H200": "#2a9d8f", "B200": "#e76f51", "GB200": "#9b2226"}
#: For whatever is no GPU type: colours that stay apart for colour-blind eyes.
COLOURS = ("#264653", "#2a9d8f", "#e9a03b", "#e76f51", "#6d597a", "#457b9d", "#9b2226", "#8d99ae")
_CAPTION_CHARACTERS_PER_IN = 13
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class PlotError(RuntimeError):
    """No picture can be drawn; the message says what is missing."""


@contextmanager
def picture(path: Path, width_in: float = 10.5, height_in: float = 6.2) -> Iterator[Figure]:
    """An empty figure in this style, written to ``path`` at the end; its suffix is the format (png, svg, pdf).

    Raises ``PlotError`` without Matplotlib or for a format that it cannot write, and ``OSError`` where the file cannot
    be written.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only the extra "plot" installs Matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - as above
        from matplotlib.figure import Figure  # noqa: PLC0415 - as above
    except ImportError as error:
        raise PlotError("pictures need Matplotlib: pip install 'penstock[plot]'") from error
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise PlotError(f"{path}: no picture format {path.suffix!r}; end the name in .png, .svg or .pdf")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width_in, height_in), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        # Without the date that Matplotlib writes, the same numbers give the same file.
        figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def title(figure: Figure, text: str, caption: str) -> None:
    """The headline of a picture, and the small print under it."""
    figure.suptitle(text, x=0.012, ha="left", fontsize=16, fontweight="bold")
    lines = fill(caption, width=int(figure.get_figwidth() * _CAPTION_CHARACTERS_PER_IN))
    figure.supxlabel(lines, x=0.012, ha="left", fontsize=9.5, color=MUTED)


def dress(axes: Axes, grid: str = "y") -> None:
    """A light grid behind the data, and no tick marks. ``grid`` is x, y or both."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]  # the stub wants a literal
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")


def thousands(value: float, _: object = None) -> str:
    """A tick's label: 12,000, or 0.5."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
