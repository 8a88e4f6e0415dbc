"""The command ``penstock``."""

from __future__ import annotations

import typer

from ratelimit.cli import check, keys, limits, measure, serve, up

app = typer.Typer(
    name="penstock",
    help="Rate limits for LLM inference, derived from measured GPU throughput.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(check.check)
app.command()(up.up)
app.command()(serve.gateway)
app.command()(serve.controller)
app.command()(measure.measure)
app.add_typer(keys.app, name="keys")
app.add_typer(limits.app, name="limits")


def main() -> None:
    """Run the command line."""
    app()
