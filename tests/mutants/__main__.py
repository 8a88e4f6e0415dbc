"""Break each rule once, in a copy of the tree, and see which test fails: ``python -m tests.mutants [WORDS]``.

With words, only the mutants whose rule or file has one of them. Exits with 1 if a mutant survives or is out of date.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.mutants import lua_rules, profile, python_rules
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("ratelimit", "serving", "tests", "pyproject.toml")
TIMEOUT_S = 300
AT_ONCE = 2
#: pytest's exit status when tests ran and one failed.
FAILED = 1


class Outcome(NamedTuple):
    """What became of a mutant: killed, and by what; or why not."""

    killed: bool
    text: str
    took_s: float


def mutants() -> tuple[Mutant, ...]:
    """All of them."""
    return (*python_rules.MUTANTS, *lua_rules.MUTANTS)


def tried(mutant: Mutant) -> Outcome:
    """Break the rule in a copy of the tree, and run its test there."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pn-mutant-") as folder:
        tree = Path(folder)
        for name in COPIED:
            _copy(ROOT / name, tree / name)
        file = tree / mutant.file
        try:
            file.write_text(mutant.broken(file.read_text("utf-8")), "utf-8")
        except ValueError as error:
            return Outcome(False, f"out of date: {error}", 0.0)
        killed, text = _run(tree, mutant.test)
    return Outcome(killed, text, time.monotonic() - began_s)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _run(tree: Path, test: str) -> tuple[bool, str]:
    argv = [sys.executable, "-m", "pytest", "-x", "--quiet", "--no-header", "-p", "no:cacheprovider"]
    argv += ["-p", profile.__name__, f"--hypothesis-profile={profile.NAME}", test]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            argv, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no verdict within {TIMEOUT_S} s: {test}"
    if done.returncode == FAILED:
        return True, test.rpartition("::")[2]
    verdict = "survived" if done.returncode == 0 else f"pytest ended with {done.returncode}"
    return False, f"{verdict}: {test}"


def main(words: Sequence[str]) -> int:
    """Try them, and print what became of each."""
    chosen = [m for m in mutants() if not words or any(word in f"{m.rule} {m.file}" for word in words)]
    table = Table("broken rule", "in", "killed by", "s")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(tried, chosen))
    for mutant, outcome in zip(chosen, outcomes, strict=True):
        style = None if outcome.killed else "bold red"
        table.add_row(mutant.rule, mutant.file, outcome.text, f"{outcome.took_s:.0f}", style=style)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    killed = sum(outcome.killed for outcome in outcomes)
    console.print(f"{killed} of {len(chosen)} mutants were killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
