"""A plan's pictures: limits by tier, throttled share against demand, supply by GPU type. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ratelimit.planning.outcome import Outcome, Side
from serving.plotstyle import COLOURS, GPU_COLOURS, INK, dress, picture, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEFORE, _AFTER = "#adb5bd", "#2a9d8f"
_OTHER_GPU = "#6d597a"
#: A part of a bar is labelled if it is more than this of the longest bar.
_LEAST_TOLD = 0.08
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def draw_all(plan: Outcome, folder: Path) -> list[Path]:
    """Draw every picture into the folder, made if missing; their paths. Raises ``PlotError`` and ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (("limits", draw_limits), ("throttled", draw_throttled), ("supply", draw_supply)):
        path = folder / f"plan-{plan.name}-{name}.png"
        draw(plan, path)
        drawn.append(path)
    return drawn


def draw_limits(plan: Outcome, path: Path) -> None:
    """What all keys of each tier are assured together, and one key's limit at the bar."""
    with picture(path, 10.5, 5.8) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name, label in zip(panels, ("itpm", "otpm"), ("input", "output"), strict=True):
            _limit_bars(axes, plan, name)
            axes.set_title(f"{label} tokens a minute, of each key", loc="left", fontsize=12)
        if plan.before is not None:
            panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2, frameon=False)
        title(
            figure,
            f"Limits of each key: {plan.title}",
            _small_print(plan, "Assured tiers: what is assured; best effort: the most there is"),
        )


def _limit_bars(axes: Axes, plan: Outcome, name: str) -> None:
    found = _sides(plan)
    tiers = [tier.tier for tier in plan.after.tiers]
    height = 0.8 / len(found)
    least = _decade_below(plan, name)
    most = max((getattr(tier, name) or 0 for _, side, _ in found for tier in side.tiers), default=0)
    for position, (word, side, colour) in enumerate(found):
        limits = [getattr(tier, name) for tier in side.tiers]
        values = [float(limit or 0) for limit in limits]
        rows = [row + (position - (len(found) - 1) / 2) * height for row in range(len(tiers))]
        axes.barh(rows, values, height=height * 0.92, color=colour, label=word)
        for row, value, limit in zip(rows, values, limits, strict=True):
            # On an axis of powers of ten there is no place of 0.
            place, said = (value, _short(value)) if value else (least, "unlimited" if limit is None else "0")
            axes.annotate(said, (place, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)
    labels = [
        f"{tier.tier}\n{_short(tier.keys)} keys{'' if tier.assured else ', best effort'}" for tier in plan.after.tiers
    ]
    axes.set_yticks(range(len(tiers)), labels)
    axes.set_ylim(len(tiers) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(least, max(most, 10) * 12)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    dress(axes, "x")


def _decade_below(plan: Outcome, name: str) -> float:
    values = [float(getattr(tier, name) or 0) for _, side, _ in _sides(plan) for tier in side.tiers]
    least = min((value for value in values if value > 0), default=1.0)
    return float(10 ** (len(str(int(least))) - 2)) if least >= 1 else 0.1


def draw_throttled(plan: Outcome, path: Path) -> None:
    """The throttled share of each tier, were the demand a multiple of what it is."""
    found = _sides(plan)
    with picture(path, 10.5, 5.4) as figure:
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (word, side, _) in zip(panels, found, strict=True):
            _throttled_lines(axes, side)
            axes.set_title(word if plan.before is None else f"{word}: {_gpus(side)} GPUs", loc="left", fontsize=12)
            axes.set_xlabel("demand, as a multiple of the plan's peak")
        panels[0].set_ylabel("share of requests throttled")
        panels[-1].legend(loc="upper left", frameon=False)
        title(
            figure,
            f"Who is throttled: {plan.title}",
            _small_print(plan, "Fluid model of the limiter; refused callers do not come back"),
        )


def _throttled_lines(axes: Axes, side: Side) -> None:
    times = [point.times for point in side.sweep]
    for position, tier in enumerate(side.tiers):
        shares = [point.throttled_share.get(tier.tier, 0.0) for point in side.sweep]
        colour = COLOURS[position % len(COLOURS)]
        axes.plot(times, shares, color=colour, linewidth=2.2, marker="o", markersize=3, label=tier.tier, clip_on=False)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (3, 3)))
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    dress(axes)


def draw_supply(plan: Outcome, path: Path) -> None:
    """Output tokens a second at the knee, by GPU type, and how that is known."""
    found = _sides(plan)
    with picture(path, 10.5, 2.6 + 1.0 * len(found)) as figure:
        axes = figure.subplots()
        least_told = _LEAST_TOLD * max(_output_tokens_per_s(side) for _, side, _ in found)
        for row, (_, side, _) in enumerate(found):
            _supply_bar(axes, row, side, least_told)
        axes.set_yticks(range(len(found)), [f"{word}\n{_gpus(side)} GPUs" for word, side, _ in found])
        axes.set_ylim(len(found) - 0.45, -0.75)
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.set_xlabel("output tokens a second at the knee; the marks: usable, less what is kept spare")
        dress(axes, "x")
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        axes.legend(once.values(), once.keys(), loc="upper right", ncols=len(once), frameon=False)
        title(figure, f"Supply by GPU type: {plan.title}", _small_print(plan, plan.promise))


def _supply_bar(axes: Axes, row: int, side: Side, least_told: float) -> None:
    start = 0.0
    for gpu, found in side.supply.items():
        colour = GPU_COLOURS.get(gpu, _OTHER_GPU)
        width = found.output_tokens_per_s
        axes.barh(row, width, left=start, height=0.62, color=colour, label=gpu, edgecolor="white")
        if width > least_told:
            said = f"{_short(found.gpus)} {gpu}\n{_short(width)}"
            axes.annotate(said, (start + width / 2, row), ha="center", va="center", color="white", fontsize=9.5)
        start += width
    for mark in ([row - 0.46, row - 0.31], [row + 0.31, row + 0.46]):
        axes.plot([side.usable.output_tokens_per_s] * 2, mark, color=INK, linewidth=2.4)


def _output_tokens_per_s(side: Side) -> float:
    return sum(gpu.output_tokens_per_s for gpu in side.supply.values())


def _sides(plan: Outcome) -> Sequence[tuple[str, Side, str]]:
    now = ("now" if plan.before is None else "after", plan.after, _AFTER)
    return (now,) if plan.before is None else (("before", plan.before, _BEFORE), now)


def _gpus(side: Side) -> str:
    return f"{sum(found.gpus for found in side.supply.values()):,}"


def _small_print(plan: Outcome, first: str) -> str:
    kinds = sorted({gpu.provenance.text for _, side, _ in _sides(plan) for gpu in side.supply.values()})
    return f"{first}. Planned, not measured; profiles: {'; '.join(kinds)}. GPU mix and demand are assumptions."


def _short(value: float) -> str:
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:,.3g}{prefix}"
    return f"{value:,.3g}"
