"""Runs one load in a Locust process of its own, under a guard, and watches its records grow."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

import loadtests
from loadtests.results import Fate, LoadRun
from loadtests.wire import PLAN_VARIABLE, Plan, read_run, write_plan
from serving.engine.guard import GuardedProcess

_PACKAGE = Path(loadtests.__file__).parent
#: Locust's own start, and the writing of its summary.
_STARTUP_S = 60.0
_POLL_S = 0.25


class LoadError(RuntimeError):
    """The load did not run to its end; says why."""


class _FateLine(msgspec.Struct):
    fate: Fate | None = None


async def run_load(plan: Plan, workdir: Path, on_progress: Callable[[Counter[Fate]], None]) -> LoadRun:
    """Send the plan's requests and return what became of them.

    ``on_progress`` is told the answers so far, by fate, a few times a second. Raises ``LoadError``. The plan, which
    holds secrets, is deleted as soon as Locust is done with it.
    """
    plan_path = workdir / "plan.json"
    records_path = Path(plan.records_path)
    _prepare(plan, plan_path)
    process = GuardedProcess.start(_argv(), log_path=workdir / "locust.log", env=_environment(plan_path))
    try:
        await _watch(process, plan, _Tail(records_path), on_progress)
    finally:
        await process.stop()
        plan_path.unlink(missing_ok=True)
    if process.poll() != 0:
        raise LoadError(f"Locust ended with status {process.poll()}:\n{process.log_tail()}")
    return _read(records_path, len(plan.calls), process.log_tail())


def _prepare(plan: Plan, plan_path: Path) -> None:
    Path(plan.records_path).unlink(missing_ok=True)
    write_plan(plan, plan_path)


def _read(records_path: Path, calls: int, log_tail: str) -> LoadRun:
    try:
        return read_run(records_path.read_bytes().splitlines(), calls)
    except (OSError, ValueError) as error:
        raise LoadError(f"Locust's records are not whole: {error}\n{log_tail}") from error


async def _watch(
    process: GuardedProcess, plan: Plan, tail: _Tail, on_progress: Callable[[Counter[Fate]], None]
) -> None:
    last_s = plan.calls[-1].time_s if plan.calls else 0.0
    deadline = asyncio.get_running_loop().time() + _STARTUP_S + last_s + plan.patience_s
    while process.poll() is None:
        if asyncio.get_running_loop().time() > deadline:
            raise LoadError(f"Locust is still running {_STARTUP_S:.0f} s after its load:\n{process.log_tail()}")
        await asyncio.sleep(_POLL_S)
        on_progress(tail.fates())
    on_progress(tail.fates())


class _Tail:
    """Counts the fates in a growing file of records, reading each line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._fates: Counter[Fate] = Counter()

    def fates(self) -> Counter[Fate]:
        if not self._path.exists():
            return self._fates
        with self._path.open("rb") as records:
            records.seek(self._offset)
            for line in records:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                fate = msgspec.json.decode(line, type=_FateLine).fate
                if fate is not None:
                    self._fates[fate] += 1
        return self._fates


def _argv() -> list[str]:
    options = "--headless --users 1 --spawn-rate 1 --only-summary --loglevel WARNING --stop-timeout 5"
    return [sys.executable, "-m", "locust", "--locustfile", str(_PACKAGE / "locustfile.py"), *options.split()]


def _environment(plan_path: Path) -> dict[str, str]:
    search = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    return {**os.environ, PLAN_VARIABLE: str(plan_path), "PYTHONPATH": search}
