"""``penstock limits``: see why a limit is what it is, and override it in an emergency."""

from __future__ import annotations

from time import time
from typing import Annotated, get_args

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from ratelimit.audit import AuditLog
from ratelimit.cli.common import DEFAULT_CONFIG, ConfigOption, JsonOption, failing_clearly, read_config, stderr
from ratelimit.cli.governing import approve, diff, history, pending
from ratelimit.config import Config
from ratelimit.duration import parse_duration
from ratelimit.explain import timestamp
from ratelimit.keys import KeyFile, KeyRecord
from ratelimit.limitrules import limits_for, rule_text
from ratelimit.overrides import Override, OverrideError, OverrideFile, freezing, setting
from ratelimit.publication import LimitName, Publication, TierLimits
from ratelimit.publisher import read_published
from ratelimit.statefile import StateFileError

app = typer.Typer(
    help="The published limits: explain, compare, approve, and override in an emergency.", no_args_is_help=True
)
for command in (diff, pending, approve, history):
    app.command()(command)

TierOption = Annotated[str, typer.Option(help="The tier whose keys are meant.")]
ModelOption = Annotated[str | None, typer.Option(help="One model; every model if unset.")]
ForOption = Annotated[str, typer.Option("--for", help="How long it holds, as 2h or 30m.")]
ReasonOption = Annotated[str, typer.Option(help="Why; it is shown wherever the limit is explained.")]


@app.command()
def explain(
    key_or_tier: Annotated[str | None, typer.Argument(help="A key's id or a tier; every tier if unset.")] = None,
    epoch: Annotated[int | None, typer.Option(help="An epoch of the audit log instead of what is published.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Print each limit with every factor it was derived from."""
    settings = read_config(config)
    with failing_clearly(StateFileError, OSError):
        published = (
            _published(settings) if epoch is None else AuditLog(settings.state_dir).epoch(epoch).published.publication
        )
        key = _key_named(settings, published, key_or_tier)
    tier = key_or_tier if key is None else key.tier
    chosen = [_of_key(limits, published, key) for limits in published.tiers if tier in (None, limits.tier)]
    rules = () if key else [rule for rule in published.rules if tier is None or tier in (rule.tiers or (tier,))]
    if as_json:
        document = {
            "epoch": published.epoch,
            "published_at": published.published_at,
            "tiers": chosen,
            "rules": rules,
            "warnings": published.warnings,
        }
        typer.echo(msgspec.json.encode(document).decode())
        return
    console = Console()
    console.print(f"epoch {published.epoch}, published {published.published_at}: {escape(published.reason)}")
    for warning in published.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for limits in chosen:
        _print(console, limits)
    for rule in rules:
        console.print(f"\n{rule_text(rule)}", markup=False, highlight=False, soft_wrap=True)


@app.command("set")
def set_limit(
    limit: Annotated[str, typer.Argument(help="requests, input_tokens, output_tokens or concurrency.")],
    value: Annotated[int, typer.Argument(help="Per minute and key; for concurrency, requests in flight.")],
    tier: TierOption,
    hold_for: ForOption,
    reason: ReasonOption,
    model: ModelOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Set one limit of a tier's keys, whatever is derived, for a while."""
    if limit not in get_args(LimitName):
        stderr.print(f"no limit {limit!r}; there are {', '.join(get_args(LimitName))}", style="red", markup=False)
        raise typer.Exit(1)
    settings = read_config(config)
    with failing_clearly(ValueError, OverrideError, StateFileError):
        _check_tier(_published(settings), tier)
        until = time() + parse_duration(hold_for)
        _keep(settings, setting(tier, limit, value, until, reason, model))  # type: ignore[arg-type]  # checked above


@app.command()
def freeze(
    tier: TierOption,
    hold_for: ForOption,
    reason: ReasonOption,
    model: ModelOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Keep a tier's limits as they are now, whatever happens to the fleet, for a while."""
    settings = read_config(config)
    with failing_clearly(ValueError, OverrideError, StateFileError):
        _keep(settings, freezing(_published(settings), tier, time() + parse_duration(hold_for), reason, model))


@app.command()
def clear(
    override_id: Annotated[str, typer.Argument(help="The override's id, as `penstock limits overrides` shows it.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """End an override before its time."""
    with failing_clearly(OverrideError, StateFileError):
        ended = OverrideFile(read_config(config).state_dir).remove(override_id, time())
    stderr.print(f"{ended.id} has ended", markup=False)


@app.command()
def overrides(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """List the overrides in force."""
    with failing_clearly(StateFileError):
        active = OverrideFile(read_config(config).state_dir).active(time())
    for override in active:
        what = f"{override.limit} = {override.per_minute}" if override.limit else "frozen"
        typer.echo(f"{override.id}  {override.tier}  {what}  until {timestamp(override.until)}  {override.reason}")


def _keep(config: Config, override: Override) -> None:
    OverrideFile(config.state_dir).add(override, time())
    stderr.print(f"{override.id} holds until {timestamp(override.until)}", markup=False)
    if config.approval.falls_above is not None:
        allowed = f"{100 * config.approval.falls_above:g} %"
        said = f"if a limit falls by more than {allowed} it waits: see `penstock limits pending`, and `limits approve`"
        stderr.print(said, markup=False, highlight=False)


def _published(config: Config) -> Publication:
    published = read_published(config.state_dir)
    if published is None:
        raise StateFileError(f"nothing has been published in {config.state_dir} yet; start `penstock up` first")
    return published


def _key_named(config: Config, published: Publication, key_or_tier: str | None) -> KeyRecord | None:
    """The key that is meant; None where it is a tier, or nothing. Raises ``StateFileError``."""
    if key_or_tier is None or key_or_tier in {limits.tier for limits in published.tiers}:
        return None
    for record in KeyFile(config.state_dir).records():
        if record.id == key_or_tier:
            return record
    raise StateFileError(f"{key_or_tier!r} is neither a key's id nor a tier; tiers are {_tiers(published)}")


def _check_tier(published: Publication, tier: str) -> None:
    if tier not in {limits.tier for limits in published.tiers}:
        raise StateFileError(f"there is no tier {tier!r}; tiers are {_tiers(published)}")


def _tiers(published: Publication) -> str:
    return ", ".join(sorted({limits.tier for limits in published.tiers}))


def _of_key(limits: TierLimits, published: Publication, key: KeyRecord | None) -> TierLimits:
    """A tier's limits, with the operator's where one key is meant."""
    if key is None:
        return limits
    own = limits_for(limits.limits, published.rules, key.id, key.org, key.tier, limits.model)
    shadow = limits.shadow or key.id in published.shadow_keys
    return msgspec.structs.replace(limits, limits=own, shadow=shadow)


def _print(console: Console, limits: TierLimits) -> None:
    console.print(f"\n[bold]{escape(limits.tier)}[/] on {escape(limits.model)}, {limits.active_keys} active key(s)")
    console.print(f"  {_borrowing(limits)}", highlight=False)
    if limits.shadow:
        console.print("  shadow: decided and counted, nobody is refused")
    if not limits.limits:
        why = limits.note or "unlimited by policy: it borrows, and the pool alone bounds it"
        style = "red" if limits.note else None
        console.print(f"  {why}", style=style, markup=False, highlight=False, soft_wrap=True)
    for limit in limits.limits:
        value = f"{limit.per_minute:,}/min" if limit.per_minute else f"{limit.burst:,}"
        value += f", up to {limit.ceiling_per_minute:,}/min while idle" if limit.ceiling_per_minute else ""
        value += f" in a window of {limit.window}" if limit.window != "minute" else ""
        value += f" per {limit.per}" if limit.per != "key" else ""
        console.print(f"  [bold]{limit.name}[/] {value}")
        console.print("\n".join(f"    {line}" for line in limit.explanation.splitlines()), markup=False, soft_wrap=True)


def _borrowing(limits: TierLimits) -> str:
    if not limits.borrow_up_to:
        return "never borrows: its ceiling is its share"
    return (
        f"borrows what others leave idle (priority {limits.priority}), while the pool's bucket is at most "
        f"{limits.borrow_up_to / 1000:g} full with it"
    )
