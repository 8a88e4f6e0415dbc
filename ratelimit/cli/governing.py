"""``penstock limits diff``, ``pending``, ``approve`` and ``history``: what a change would do, and what changes did."""

from __future__ import annotations

import os
import pwd
from itertools import islice
from pathlib import Path
from time import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratelimit.approval import APPROVAL_VALID_S, LONGEST_APPROVAL_S, ApprovalError
from ratelimit.audit import AuditLog, Entry
from ratelimit.cli.common import DEFAULT_CONFIG, ConfigOption, JsonOption, failing_clearly, read_config, stderr
from ratelimit.config import Config
from ratelimit.difference import (
    Amount,
    Difference,
    LimitChange,
    NoAmount,
    PoolSupply,
    Setting,
    Snapshot,
    bound_changed,
    difference,
    snapshot,
)
from ratelimit.duration import parse_duration
from ratelimit.explain import timestamp
from ratelimit.governor import ApprovalFile, outgrown, waiting_file
from ratelimit.offline import planned
from ratelimit.publisher import read_published
from ratelimit.statefile import StateFileError
from serving.profile import ProfileError

#: Exit status of ``diff`` where a limit falls further than is allowed without approval.
FALLS = 3
MOST_SHOWN = 1000

SideArgument = Annotated[str, typer.Argument(help='A config file, an epoch of the audit log, or "published".')]
FallsOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="The share a limit may fall by; approval.falls_above of the config if unset."),
]
KeysOption = Annotated[list[str] | None, typer.Option("--keys", help="Active keys of a tier, as pro=40; repeatable.")]
TierFilter = Annotated[str | None, typer.Option(help="Only what concerns one tier.")]


def diff(
    before: SideArgument,
    after: SideArgument,
    falls_above: FallsOption = None,
    keys: KeysOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show what a change of fleet or policy does to every limit, before it is published.

    Limits of a config file are derived as if all its replicas were healthy, for the keys and overrides of its state
    folder (or that of --config). Exit status 3 where a limit falls by more than approval.falls_above, 0 otherwise.
    """
    sides = _Sides(config, (before, after), _counts(keys or []))
    with failing_clearly(StateFileError, ProfileError, ValueError, OSError):
        found = difference(sides.snapshot(before), sides.snapshot(after))
        found = msgspec.structs.replace(found, settings=(*found.settings, *sides.bound_changed(before, after)))
        allowed = falls_above if falls_above is not None else sides.falls_above()
    falls = allowed is not None and found.largest_fall > allowed
    if as_json:
        typer.echo(msgspec.json.encode({"falls_above": allowed, "falls": falls} | _document(found)).decode())
    else:
        console = Console()
        print_difference(console, found)
        _print_verdict(console, found, allowed)
    if falls:
        raise typer.Exit(FALLS)


def pending(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show the changes that wait for approval, and what each would do."""
    with failing_clearly(StateFileError):
        waiting = waiting_file(read_config(config).state_dir).read()
    if as_json:
        documents = [
            {"digest": each.digest, "cause": each.cause, "since": each.since, "falls_above": each.falls_above}
            | {"approved_fall": each.approved_fall}
            | _document(each.does)
            for each in waiting
        ]
        typer.echo(msgspec.json.encode(documents).decode())
        return
    console = Console()
    if not waiting:
        console.print("no change waits for approval")
    for each in waiting:
        console.print(f"[bold]{each.digest}[/] waits since {timestamp(each.since)}: {escape(each.cause)}")
        if each.approved_fall is not None:
            console.print(f"  {outgrown(each.approved_fall)}", style="yellow")
        print_difference(console, each.does)
        console.print(f"`penstock limits approve {each.digest}` lets it through", markup=False)


def approve(
    digest: Annotated[str | None, typer.Argument(help="The change, as `limits pending` shows it.")] = None,
    valid_for: Annotated[str | None, typer.Option("--for", help="How long the approval holds, as 2h.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Let one waiting change through. The approval is for exactly what `limits pending` shows, and is used once."""
    settings = read_config(config)
    with failing_clearly(ApprovalError, StateFileError, ValueError):
        valid_s = parse_duration(valid_for) if valid_for else APPROVAL_VALID_S
        if not 0 < valid_s <= LONGEST_APPROVAL_S:
            raise ApprovalError(f"an approval holds for at most {LONGEST_APPROVAL_S / 86_400:g} days; give less")
        now_s = time()
        found = ApprovalFile(settings.state_dir).approve(digest, _os_user(), now_s, valid_s)
    until = timestamp(now_s + valid_s)
    said = f"{found.digest}, by which limits fall by up to {_percent(found.does.largest_fall)}, may take effect until"
    stderr.print(f"{said} {until}: {found.cause}", markup=False, soft_wrap=True)


def history(
    tier: TierFilter = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST_SHOWN, help="How many epochs, the newest first.")] = 20,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show the published epochs: when, what caused each, who approved it, and what it did."""
    log = AuditLog(read_config(config).state_dir)
    with failing_clearly(StateFileError, OSError):
        chosen = (_of_tier(entry, tier) for entry in log.entries())
        entries = list(islice((entry for entry in chosen if entry is not None), limit))
    if as_json:
        typer.echo(msgspec.json.encode([_entry_document(entry) for entry in entries]).decode())
        return
    console = Console()
    if not entries:
        console.print("no epoch has been kept" + (f" that concerns {escape(tier)}" if tier else ""))
    for entry in entries:
        console.print(f"\n[bold]epoch {entry.epoch}[/]  {entry.at}  {escape(entry.cause)}", soft_wrap=True)
        if entry.unsure:
            console.print("  may never have been in force: whoever published it died or was cut off", style="yellow")
        for approval in entry.approved:
            said = f"approved by {approval.by} at {timestamp(approval.at)} ({approval.digest})"
            console.print(f"  {said}", markup=False)
        if entry.before:
            print_difference(console, entry.does)
        else:
            console.print("  the first epoch that is known", style="dim")


def print_difference(console: Console, found: Difference) -> None:
    """Tables of all that differs."""
    if found == Difference():
        console.print("  no limit differs")
        return
    if found.limits:
        console.print(_limits_table(found.limits))
    if found.pools:
        console.print(_pools_table(found))
    for lost in found.lost_access:
        console.print(f"  {lost}", style="red", markup=False)
    for setting in found.settings:
        console.print(f"  {setting.what}: {setting.before} → {setting.after}", markup=False, highlight=False)
    for warning in found.warnings:
        console.print(f"  warning: {warning}", style="yellow", markup=False, highlight=False)


class _Sides:
    """What is compared, found by name, and the configs that were read on the way."""

    def __init__(self, config: Path, names: tuple[str, ...], keys: dict[str, int]) -> None:
        self._config = read_config(config) if config.exists() or config != DEFAULT_CONFIG else None
        self._compared = {name: read_config(Path(name)) for name in names if not _is_kept(name)}
        known = {tier.name for each in self._compared.values() for tier in each.tiers}
        if unknown := sorted(keys.keys() - known):
            tiers = ", ".join(sorted(known)) or "none, for no config file is compared"
            raise typer.BadParameter(f"--keys: there is no tier {', '.join(unknown)}; tiers are {tiers}")
        self._keys = keys

    def snapshot(self, name: str) -> Snapshot:
        """The limits that a name stands for. Raises ``StateFileError``, ``ProfileError`` and ``OSError``."""
        if name == "published":
            published = read_published(self._state_dir(name))
            if published is None:
                raise StateFileError(f"nothing has been published in {self._state_dir(name)} yet")
            return snapshot(published)
        if _is_kept(name):
            return AuditLog(self._state_dir(name)).epoch(int(name)).published
        settings = self._compared[name]
        with stderr.status("") as status:

            def found(what: str) -> None:
                status.update(f"{escape(name)}: {escape(what)}")

            return snapshot(planned(settings, self._state_of(settings), self._keys, time(), found))

    def falls_above(self) -> float | None:
        """The share of the config in force, so that a change cannot allow itself; else of those compared."""
        shares = [each.approval.falls_above for each in (self._config, *self._compared.values()) if each]
        return next((share for share in shares if share is not None), None)

    def bound_changed(self, before: str, after: str) -> tuple[Setting, ...]:
        """What becomes of approval.falls_above; what is published has that of the config in force."""
        sides = [self._compared.get(name, self._config) for name in (before, after)]
        bounds = [side.approval.falls_above for side in sides if side]
        return bound_changed(bounds[0], bounds[1]) if len(bounds) == len(sides) else ()

    def _state_dir(self, name: str) -> Path:
        if self._config is None:
            raise StateFileError(f"{name!r} is looked for in a state folder; say whose by --config")
        return self._config.state_dir

    def _state_of(self, settings: Config) -> Path | None:
        """The state folder whose keys and overrides a config is compared with; None where there is none."""
        folders = [settings.state_dir, *([self._config.state_dir] if self._config else [])]
        return next((folder for folder in folders if folder.is_dir()), None)


def _is_kept(name: str) -> bool:
    """Whether the name is of something published, and of no config file."""
    return name == "published" or (name.isascii() and name.isdigit())


def _os_user() -> str:
    """Who runs this, as the kernel says it: what the environment says may be set by anybody."""
    uid = os.getuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container that runs under a bare uid
        return f"uid {uid}"


def _counts(keys: list[str]) -> dict[str, int]:
    counts = {}
    for text in keys:
        tier, _, count = text.partition("=")
        if not tier or not (count.isascii() and count.isdigit()):
            raise typer.BadParameter(f"{text!r} is not TIER=COUNT; write one such as --keys pro=40")
        counts[tier] = int(count)
    return counts


def _of_tier(entry: Entry, tier: str | None) -> Entry | None:
    """The entry with what concerns a tier; None where nothing does."""
    if tier is None:
        return entry
    limits = tuple(change for change in entry.does.limits if change.who == tier and not change.is_rule)
    if not limits:
        return None
    return msgspec.structs.replace(entry, does=Difference(limits=limits))


def _entry_document(entry: Entry) -> dict[str, object]:
    document: dict[str, object] = {"epoch": entry.epoch, "at": entry.at, "cause": entry.cause, "before": entry.before}
    return document | {"approved": entry.approved, "unsure": entry.unsure} | _document(entry.does)


def _document(found: Difference) -> dict[str, object]:
    document: dict[str, object] = msgspec.to_builtins(found)
    document["largest_fall"] = found.largest_fall
    document["limits"] = [
        msgspec.to_builtins(change) | {"fall": change.fall, "change": change.change} for change in found.limits
    ]
    return document


def _print_verdict(console: Console, found: Difference, allowed: float | None) -> None:
    if allowed is None:
        console.print("approval.falls_above is not set: nothing would wait for approval", style="dim")
        return
    if found.largest_fall > allowed:
        loosened = [setting for setting in found.settings if setting.fall]
        count = len(found.falls_above(allowed)) + len(found.lost_access) + len(loosened)
        said = f"{count} fall(s) by more than {_percent(allowed)}: it would wait for approval, unless the fleet is why"
        console.print(said, style="bold red", highlight=False)
    else:
        console.print(f"no limit falls by more than {_percent(allowed)}", style="green", highlight=False)


def _limits_table(changes: tuple[LimitChange, ...]) -> Table:
    table = Table("tier", "model", "limit", "before", "after", "change", "who loses", box=None, pad_edge=False)
    for change in changes:
        style = "red" if change.fall else "green"
        limit = change.limit if change.window == "minute" else f"{change.limit} in a window of {change.window}"
        table.add_row(
            *map(escape, (change.who, change.model, f"{limit} per {change.per}")),
            *map(_amount, (change.before, change.after)),
            f"[{style}]{_relative(change)}[/]",
            escape(_losers(change)),
        )
    return table


def _losers(change: LimitChange) -> str:
    if not change.fall:
        return ""
    if change.is_rule:
        return change.who
    keys = change.keys_before
    if change.per == "tier" and keys != 1:
        return f"{keys} keys together"
    return f"its {keys} keys, each" if keys != 1 else "its key"


def _relative(change: LimitChange) -> str:
    if change.change is None:
        gone = change.after in ("nothing", "borrowed") and change.fall
        return "lost" if gone or change.after == "nothing" else "first bound" if change.fall else "new"
    return _percent(change.change, "+")


def _percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.3g} %"


def _amount(amount: Amount | NoAmount) -> str:
    if not isinstance(amount, Amount):
        return amount
    text = f"{amount.assured:,}" if amount.assured else "best effort"
    if amount.most != amount.assured:
        text = f"{text}, up to {amount.most:,}" if amount.assured else f"up to {amount.most:,}"
    return f"{text} (burst {amount.burst:,})" if amount.burst else text


def _pools_table(found: Difference) -> Table:
    table = Table("pool", "replicas", "requests/s", "input tokens/s", "output tokens/s", box=None, pad_edge=False)
    for pool in found.pools:
        before, after = pool.before or _NO_SUPPLY, pool.after or _NO_SUPPLY
        table.add_row(
            escape(pool.model),
            escape(f"{_replicas(before)} → {_replicas(after)}"),
            _arrow(before.requests_per_s, after.requests_per_s),
            _arrow(before.input_tokens_per_s, after.input_tokens_per_s),
            _arrow(before.output_tokens_per_s, after.output_tokens_per_s),
        )
    return table


_NO_SUPPLY = PoolSupply({}, 0.0, 0.0, 0.0, 0.0)


def _replicas(supply: PoolSupply) -> str:
    return " + ".join(f"{count} × {gpu}" for gpu, count in supply.replicas.items()) or "none"


def _arrow(before: float, after: float) -> str:
    change = f" ({_percent(after / before - 1, '+')})" if before else ""
    return f"{before:,.4g} → {after:,.4g}{change}"
