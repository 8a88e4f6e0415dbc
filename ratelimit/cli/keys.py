"""``penstock keys``: API keys are shown once, when they are made; only their digests are kept."""

from __future__ import annotations

from datetime import UTC, datetime
from time import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratelimit.cli.common import DEFAULT_CONFIG, ConfigOption, JsonOption, failing_clearly, read_config, stderr
from ratelimit.config import Config
from ratelimit.duration import parse_duration
from ratelimit.keys import ApiKeyError, KeyFile, KeyRecord, KeyStatus, status
from ratelimit.keyuse import last_uses
from ratelimit.statefile import StateFileError

app = typer.Typer(help="API keys: create, list, rotate, revoke.", no_args_is_help=True)

KeyIdArgument = Annotated[str, typer.Argument(help="The key's id, as `penstock keys list` shows it.")]


class _Row(msgspec.Struct):
    """One secret, as it is listed; times are seconds since 1970. ``last_used_at`` is the key's, by any secret."""

    id: str
    org: str
    tier: str
    name: str
    status: KeyStatus
    created_at: float
    expires_at: float | None
    last_used_at: int | None


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
    _show(secret, record, as_json)


@app.command()
def rotate(
    key_id: KeyIdArgument,
    overlap: Annotated[str, typer.Option(help="How long the old secret stays valid, as 24h; 0 to end it now.")] = "24h",
    expires: Annotated[
        str | None, typer.Option(help="How long the new one is valid; as long as the old, if unset.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Give a key a new secret and print it, this once; its id, limits and use stay."""
    state_dir = read_config(config).state_dir
    with failing_clearly(ValueError, StateFileError):
        overlap_s = 0.0 if overlap == "0" else parse_duration(overlap)
        valid_s = None if expires is None else parse_duration(expires)
        secret, record = KeyFile(state_dir).rotate(key_id, overlap_s, valid_s)
    _show(secret, record, as_json)


@app.command("list")
def list_keys(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """List the keys, one row for each secret of a key; never the secrets themselves."""
    state_dir = read_config(config).state_dir
    with failing_clearly(StateFileError):
        records, uses = KeyFile(state_dir).records(), last_uses(state_dir)
    rows = [_row(record, uses.get(record.id)) for record in records]
    if as_json:
        typer.echo(msgspec.json.encode(rows).decode())
        return
    table = Table()
    table.add_column("id", no_wrap=True)  # it is copied from here
    for heading in ("org", "tier", "name", "status", "created", "expires", "last used"):
        table.add_column(heading)
    for row in rows:
        times = (_minute(row.created_at), _minute(row.expires_at), _minute(row.last_used_at))
        table.add_row(*map(escape, (row.id, row.org, row.tier, row.name, row.status)), *times)
    Console().print(table)


@app.command()
def revoke(
    key_id: KeyIdArgument,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Revoke a key with all its secrets; every gateway refuses it within 2 s."""
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


def _row(record: KeyRecord, last_used_at: int | None) -> _Row:
    return _Row(
        id=record.id,
        org=record.org,
        tier=record.tier,
        name=record.name,
        status=status(record, time()),
        created_at=record.created_at,
        expires_at=record.expires_at,
        last_used_at=last_used_at,
    )


def _show(secret: str, record: KeyRecord, as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.encode({"key": secret, "id": record.id, "tier": record.tier}).decode())
        return
    typer.echo(secret)
    stderr.print(f"{record.id}: keep the key now, it cannot be shown again", markup=False)


def _minute(epoch_s: float | None) -> str:
    return "never" if epoch_s is None else datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d %H:%M")
