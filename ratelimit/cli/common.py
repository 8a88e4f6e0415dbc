"""What the commands share: where the config is, how they speak, and how they fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from ratelimit.config import Config, ConfigError, load_config

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The config file.", show_default=True)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DEFAULT_CONFIG = Path("penstock.yaml")

#: People read standard error; standard output carries only what was asked for.
stderr = Console(stderr=True)


@contextmanager
def failing_clearly(*errors: type[Exception]) -> Iterator[None]:
    """Turn these errors into their message on standard error and exit status 1."""
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            stderr.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except errors as error:
        stderr.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def read_config(path: Path) -> Config:
    """The config, or its problems on standard error and exit status 1."""
    with failing_clearly():
        return load_config(path)


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Send the log to standard error, one line an event."""
    handler = RichHandler(console=stderr, show_path=False, omit_repeated_times=False)
    logging.basicConfig(level=level, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
