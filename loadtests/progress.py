"""What the person in front of the screen sees while a scenario runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtests.claims import StepResult
from loadtests.results import Fate


class Narrator:
    """Tells the story on a console: stages as lines, loads as progress bars."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, stage: str) -> None:
        """A new stage."""
        self._console.print(f"[dim]▸[/] {stage}", highlight=False)

    def told(self, step: StepResult) -> None:
        """A load has ended: its gist in a line."""
        foretold = "" if step.prediction is None else f", predicted {step.prediction.throttled_share:.1%}"
        self._console.print(
            f"  [bold]{step.title}[/]: throttled {step.figures.throttled_share:.1%}{foretold}, "
            f"{step.figures.slo_met_share:.1%} within the SLO",
            highlight=False,
        )

    def show(self, renderable: RenderableType) -> None:
        """Print the table and the claims."""
        self._console.print(renderable)

    @contextmanager
    def load(self, title: str, requests: int) -> Iterator[Callable[[Counter[Fate]], None]]:
        """A bar for one load; yields what to call with the answers so far."""
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[fates]}"))
        with Progress(*columns, TimeElapsedColumn(), console=self._console) as progress:
            bar = progress.add_task(title, total=requests, fates="")

            def update(fates: Counter[Fate]) -> None:
                told = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
                progress.update(bar, completed=fates.total(), fates=told)

            yield update
