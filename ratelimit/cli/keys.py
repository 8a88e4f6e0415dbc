"""``penstock keys``: API keys are shown once, when they are made; only their digests are kept."""

from __future__ import annotations

from datetime import UTC, datetime
from time import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from ratelimit.cli.common import DEFAULT_CONFIG, ConfigOption, JsonOption, failing_clearly, read_config, stderr
from ratelimit.config import Config
from ratelimit.duration import parse_duration
from ratelimit.keys import ApiKeyError, KeyFile, status
from ratelimit.statefile import StateFileError

app = typer.Typer(help="API keys: create, list, revoke.", no_args_is_help=True)


@app.command()
def create(
    org: Annotated[str, typer.Option(help="The org the key belongs to.")],
    tier: Annotated[str, typer.Option(help="The tier whose limits it has.")],
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Annotated[str | None, typer.Option(help="How long it is valid, as 90d or 2h; for ever if unset.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once."""
    settings = read_config(config)
    _check_known(settings, org, tier)
    with failing_clearly(ValueError, StateFileError):
        valid_s = None if expires is None else parse_duration(expires)
        secret, record = KeyFile(settings.state_dir).create(org=org, tier=tier, name=name, valid_s=valid_s)
    if as_json:
        typer.echo(msgspec.json.encode({"key": secret, "id": record.id, "tier": record.tier}).decode())
        return
    typer.echo(secret)
    stderr.print(f"{record.id}: keep the key now, it cannot be shown again", markup=False)


@app.command("list")
def list_keys(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """List the keys; never the secrets."""
    with failing_clearly(StateFileError):
        records = KeyFile(read_config(config).state_dir).records()
    if as_json:
        rows = [
            {"id": r.id, "org": r.org, "tier": r.tier, "name": r.name, "status": status(r, time())} for r in records
        ]
        typer.echo(msgspec.json.encode(rows).decode())
        return
    table = Table("id", "org", "tier", "name", "status", "created", "expires")
    for record in records:
        table.add_row(
            record.id,
            record.org,
            record.tier,
            record.name,
            status(record, time()),
            _day(record.created_at),
            _day(record.expires_at),
        )
    Console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `penstock keys list` shows it.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Revoke a key; every gateway refuses it within 2 s."""
    with failing_clearly(StateFileError, ApiKeyError):
        KeyFile(read_config(config).state_dir).revoke(key_id)
    stderr.print(f"{key_id} is revoked", markup=False)


def _check_known(config: Config, org: str, tier: str) -> None:
    for kind, name, known in (
        ("org", org, [entry.name for entry in config.orgs]),
        ("tier", tier, [entry.name for entry in config.tiers]),
    ):
        if name not in known:
            stderr.print(f"no {kind} {name!r} in the config; there are {', '.join(known) or 'none'}", style="red")
            raise typer.Exit(1)


def _day(epoch_s: float | None) -> str:
    return "never" if epoch_s is None else datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d %H:%M")
