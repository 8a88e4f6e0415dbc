"""How ``penstock plan`` is shown to people: tables of supply, limits and what running takes, and every assumption."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratelimit.planning.outcome import Outcome, Side, TierOutcome
from ratelimit.planning.running import watts

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
#: Up to here a number is written out.
_WRITTEN_OUT = 10_000


def print_plan(console: Console, plan: Outcome) -> None:
    """Everything that a plan says."""
    console.print(f"[bold]{escape(plan.title)}[/]")
    console.print(f"{escape(plan.model)}, {plan.promise}", highlight=False)
    if plan.change:
        console.print(f"change: {escape(plan.change)}", highlight=False)
    for table in (_supply(plan), _limits(plan), _running(plan)):
        console.print(table)
    console.print(f"demand: {escape(plan.demand)}; limits are per key and minute, assured ones where a ceiling follows")
    for problem in _problems(plan):
        console.print(f"! {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print("\n[bold]assumptions[/]: change them in the plan's file, and every figure follows")
    for assumption in plan.assumptions:
        console.print(f"- {assumption}", markup=False, highlight=False, soft_wrap=True)


def sides(plan: Outcome) -> Iterator[tuple[str, Side]]:
    """The fleets compared, in the order of time, and what to call them."""
    if plan.before is not None:
        yield "before", plan.before
        yield "after", plan.after
    else:
        yield "now", plan.after


def short(value: float | None) -> str:
    """A number as people say it: 8,200, 36k, 1.8M."""
    if value is None:
        return "unlimited"
    for size, prefix in _PREFIXES:
        if abs(value) >= max(size, _WRITTEN_OUT):
            return f"{value / size:,.4g}{prefix}"
    return f"{value:,.4g}" if value != int(value) else f"{value:,.0f}"


def _supply(plan: Outcome) -> Table:
    table = Table(title="supply, by GPU type", title_justify="left")
    for heading in ("GPU", "fleet"):
        table.add_column(heading)
    for heading in ("GPUs", "replicas", "requests/s", "output tok/s", "tok/s a GPU"):
        table.add_column(heading, justify="right")
    table.add_column("provenance", overflow="fold")
    for word, side in sides(plan):
        for gpu, found in side.supply.items():
            figures = (found.gpus, found.replicas, found.requests_per_s, found.output_tokens_per_s)
            per_gpu = short(found.output_tokens_per_s_per_gpu)
            table.add_row(gpu, word, *map(short, figures), per_gpu, escape(found.provenance.text))
        usable = side.usable
        rates = (short(usable.requests_per_s), short(usable.output_tokens_per_s))
        gpus = short(sum(found.gpus for found in side.supply.values()))
        spare = f"less {usable.spare_domains} spare failure domain(s)" if usable.spare_domains else "all of it"
        table.add_row("[bold]usable[/]", word, gpus, "", *rates, "", spare, end_section=True)
    return table


def _limits(plan: Outcome) -> Table:
    table = Table(title="limits of each key, and who is throttled", title_justify="left")
    for heading in ("tier", "fleet"):
        table.add_column(heading)
    for heading in ("keys", "RPM", "ITPM (ceiling)", "OTPM (ceiling)", "in flight", "asked/s", "throttled", "at mean"):
        table.add_column(heading, justify="right")
    found = list(sides(plan))
    for position, _ in enumerate(plan.after.tiers):
        for word, side in found:
            table.add_row(*_tier_row(word, side.tiers[position]), end_section=word == found[-1][0])
    return table


def _tier_row(word: str, tier: TierOutcome) -> tuple[str, ...]:
    def rated(name: str, amount: int | None) -> str:
        ceiling = tier.ceilings.get(name)
        return short(amount) if ceiling is None else f"{short(amount)} ({short(ceiling)})"

    throttled = f"{tier.throttled_share:.1%}"
    return (
        escape(tier.tier),
        word,
        short(tier.keys),
        short(tier.rpm),
        rated("input_tokens", tier.itpm),
        rated("output_tokens", tier.otpm),
        short(tier.concurrency),
        short(tier.offered_requests_per_s),
        f"[red]{throttled}[/]" if tier.throttled_share > 0 else throttled,
        f"{tier.throttled_share_at_mean:.1%}",
    )


def _running(plan: Outcome) -> Table:
    found = [side for _, side in sides(plan)]
    table = Table("", *(word for word, _ in sides(plan)), title="what running it takes", title_justify="left")
    rows = {
        "cells, a Redis primary each": [f"{side.cells.cells:,}" for side in found],
        "GPUs for each primary": [short(round(side.cells.gpus_per_primary)) for side in found],
        "power, every GPU at its most": [watts(side.energy.site_w) for side in found],
        "output tokens a joule": [f"{side.energy.output_tokens_per_joule:.3g}" for side in found],
        "input + output tokens a joule": [f"{side.energy.tokens_per_joule:.3g}" for side in found],
    }
    for site in dict.fromkeys(each.site for side in found for each in side.energy.sites):
        rows[f"power of {escape(site)}, of its limit"] = [_site_power(side, site) for side in found]
    if any(side.energy.cost_per_hour is not None for side in found):
        rows[f"{plan.after.energy.currency} an hour"] = [_money(side.energy.cost_per_hour) for side in found]
        rows[f"{plan.after.energy.currency} a million output tokens"] = [
            _money(side.energy.cost_per_million_output_tokens) for side in found
        ]
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _site_power(side: Side, name: str) -> str:
    site = next((each for each in side.energy.sites if each.site == name), None)
    if site is None:
        return "not there"
    if site.limit_w is None or site.share_of_limit is None:
        return f"{watts(site.site_w)}, no limit known"
    return f"{watts(site.site_w)} of {watts(site.limit_w)} ({site.share_of_limit:.0%})"


def _money(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.4g}" if value < _WRITTEN_OUT else f"{value:,.0f}"


def _problems(plan: Outcome) -> list[str]:
    said = []
    for word, side in sides(plan):
        found = [*side.usable.problems, *(site.problem for site in side.energy.sites if site.problem)]
        found += [
            f"{gpu}: {each.idle_gpus:,} GPU(s) are left over, a replica takes {each.gpus_per_replica}"
            for gpu, each in side.supply.items()
            if each.idle_gpus
        ]
        said += [f"{word}: {problem}" for problem in found]
    return said
