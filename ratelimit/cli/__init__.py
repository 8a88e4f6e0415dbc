"""The command ``penstock``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from ratelimit.cli.check import check
from ratelimit.cli.engine import engine
from ratelimit.cli.fit import fit
from ratelimit.cli.importing import import_
from ratelimit.cli.keys import app as keys_app
from ratelimit.cli.limits import app as limits_app
from ratelimit.cli.measure import measure
from ratelimit.cli.plan import plan
from ratelimit.cli.profiles import app as profiles_app
from ratelimit.cli.serve import controller, gateway
from ratelimit.cli.up import up
from ratelimit.cli.usage import app as usage_app

app = typer.Typer(
    name="penstock",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {version('penstock')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Rate limits for LLM inference, derived from measured GPU throughput."""


for command in (check, up, gateway, controller, engine, measure, fit, plan):
    app.command()(command)
app.command("import")(import_)
app.add_typer(keys_app, name="keys")
app.add_typer(limits_app, name="limits")
app.add_typer(profiles_app, name="profiles")
app.add_typer(usage_app, name="usage")


def main() -> None:
    """Run the command line."""
    app()
