"""``penstock check``: what is wrong with a config file, where, and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ratelimit.cli.common import read_config, stderr
from ratelimit.feasibility import feasibility_problems


def check(file: Annotated[Path, typer.Argument(help="The config file to check.")]) -> None:
    """Check a config file. Exit status 0 if `penstock up` would take it, 1 if not."""
    config = read_config(file)
    problems = feasibility_problems(config)
    if problems:
        for problem in problems:
            stderr.print(f"{file}: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    stderr.print(
        f"{file} is good: {len(config.pools)} pool(s), {len(config.tiers)} tier(s), {len(config.orgs)} org(s)",
        style="green",
        markup=False,
    )
