"""Accuracy under overload: how much of what a key may have it gets, and never more, however its callers ask.

``python -m tests.bench.accuracy [--json FILE] [--seconds 180] [--per-minute 1000]`` has 60 callers at once share one
key with a limit of output tokens, for every way to ask (``max_tokens`` set, unset, far too large; streaming and not;
holds as learned and at the maximum), and the same with LiteLLM's limiter. Callers obey ``Retry-After``, to the
millisecond where it is told, without jitter, and ask again as soon as they are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import msgspec
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from ratelimit.policy import Holds
from ratelimit.publication import Publication
from tests.bench.litellm import VERSION, KeyLimits, LitellmProxy, LitellmUnavailableError
from tests.bench.paced import PacedUpstream
from tests.bench.servers import bench_redis
from tests.support.gateway import MAX_MODEL_LEN, MODEL, GatewayProcess, gateway_settings, make_key, publication, publish
from tests.support.stack import metric
from tests.support.waiting import eventually_async

CALLERS = 60
TABLE_WIDTH = 140
#: ``max_tokens`` where callers set it: none of the answers is cut short.
SET = 96
FAR_TOO_LARGE = MAX_MODEL_LEN - 96
#: What the official clients wait where they are told nothing: doubled from the first to the longest.
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0
_AMPLE_RATE = (60_000_000, 1_000_000)
#: An answer that takes longer than this is an error.
ANSWER_TIMEOUT_S = 30.0


class Variant(msgspec.Struct, frozen=True):
    """One way to ask, and the policy's way to hold."""

    max_tokens: int | None
    stream: bool
    holds: Holds = "learned"

    @property
    def asked(self) -> str:
        """The way to ask."""
        how = "unset" if self.max_tokens is None else "set" if self.max_tokens == SET else "far too large"
        return f"max_tokens {how}, {'streaming' if self.stream else 'whole'}"

    @property
    def name(self) -> str:
        """How prompts, tiers and tables call it."""
        return f"{self.holds} holds, {self.asked}"


_HOLDS: tuple[Holds, ...] = ("learned", "maximum")
VARIANTS = tuple(
    Variant(max_tokens, stream, holds)
    for holds, max_tokens, stream in product(_HOLDS, (SET, None, FAR_TOO_LARGE), (False, True))
)


class Outcome(msgspec.Struct, frozen=True):
    """What one key got. Times in seconds, everything else in output tokens or requests.

    ``served`` counts every answer to a request that was sent in time, to its end; ``allowed`` is burst + rate × time.
    ``overrun`` is what the gateway says was used beyond the holds.
    """

    variant: str
    limit_per_minute: int
    burst: int
    seconds: float
    served: int
    allowed: float
    answers: int
    refusals: int
    refusals_without_time: int
    longest_wait_told_s: float
    errors: int
    overrun: int | None = None

    @property
    def share(self) -> float:
        """Served of what is allowed."""
        return self.served / self.allowed


class _Tally:
    """What the callers of one key have seen."""

    def __init__(self) -> None:
        self.answers = self.refusals = self.refusals_without_time = self.errors = 0
        self.longest_wait_told_s = 0.0

    def refused(self, told_s: float | None) -> None:
        self.refusals += 1
        if told_s is None:
            self.refusals_without_time += 1
        else:
            self.longest_wait_told_s = max(self.longest_wait_told_s, told_s)


def told_wait_s(headers: httpx.Headers) -> float | None:
    """The wait that an answer tells; None where it tells none that can be used."""
    for name, per_s in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(ValueError):
            return float(headers.get(name, "")) / per_s
    return None


async def _ask(client: httpx.AsyncClient, request: dict[str, Any], tally: _Tally) -> tuple[bool, float | None]:
    """Whether it was served, and if not, the wait that was told."""
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        await response.aread()
    if response.status_code == 200:
        tally.answers += 1
        return True, None
    told_s = told_wait_s(response.headers)
    if response.status_code == 429:
        tally.refused(told_s)
    else:
        tally.errors += 1
    return False, told_s


async def _call(client: httpx.AsyncClient, request: dict[str, Any], ends_s: float, tally: _Tally) -> None:
    """One caller, who asks until ``ends_s``."""
    backoff_s = FIRST_BACKOFF_S
    while perf_counter() < ends_s:
        try:
            served, told_s = await _ask(client, request, tally)
        except httpx.TransportError:
            tally.errors += 1
            served, told_s = False, None
        if served:
            backoff_s = FIRST_BACKOFF_S
            continue
        wait_s = backoff_s if told_s is None else told_s
        backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        await asyncio.sleep(max(0.0, min(wait_s, ends_s - perf_counter())))


class Overload(msgspec.Struct, frozen=True):
    """How hard a key is asked, its limit of output tokens, and what one token takes the engine."""

    per_minute: int
    burst: int
    seconds: float
    callers: int = CALLERS
    token_s: float = 0.02

    @property
    def allowed(self) -> float:
        """Burst + rate × time."""
        return self.burst + self.per_minute / 60 * self.seconds

    async def of(self, variant: Variant, url: str, secret: str, upstream: PacedUpstream) -> Outcome:
        """Callers ask at once until the time is over; what they got, once the last answer has ended."""
        request: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": variant.name}]}
        if variant.max_tokens is not None:
            request["max_tokens"] = variant.max_tokens
        if variant.stream:
            request["stream"] = True
        limits = httpx.Limits(max_connections=self.callers)
        headers = {"authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=ANSWER_TIMEOUT_S) as client:
            tally = _Tally()
            ends_s = perf_counter() + self.seconds
            await asyncio.gather(*(_call(client, request, ends_s, tally) for _ in range(self.callers)))
        return Outcome(
            variant=variant.name,
            limit_per_minute=self.per_minute,
            burst=self.burst,
            seconds=self.seconds,
            served=upstream.generated[variant.name],
            allowed=self.allowed,
            answers=tally.answers,
            refusals=tally.refusals,
            refusals_without_time=tally.refusals_without_time,
            longest_wait_told_s=tally.longest_wait_told_s,
            errors=tally.errors,
        )


def publication_for(overload: Overload, variants: Sequence[Variant], upstream_url: str) -> Publication:
    """A tier for each variant, so that the gateway's metrics tell them apart."""
    published = publication([upstream_url], output_tokens=(overload.per_minute, overload.burst), requests=_AMPLE_RATE)
    tier = published.tiers[0]
    tiers = tuple(msgspec.structs.replace(tier, tier=variant.name, holds=variant.holds) for variant in variants)
    return msgspec.structs.replace(published, tiers=tiers)


async def overload_gateway(overload: Overload, variants: Sequence[Variant], redis_url: str) -> list[Outcome]:
    """Every variant at once, each on a key of its own, through a gateway process of ours."""
    keys = [make_key(tier=variant.name) for variant in variants]
    async with PacedUpstream(overload.token_s) as upstream, Redis.from_url(redis_url) as redis:
        await publish(redis, publication_for(overload, variants, upstream.url), *(record for _, record in keys))
        with GatewayProcess(gateway_settings(redis_url)) as gateway:
            await eventually_async(partial(asyncio.to_thread, gateway.epoch), 10, "the limits' arrival")
            asked = (
                overload.of(variant, gateway.url, secret, upstream)
                for variant, (secret, _) in zip(variants, keys, strict=True)
            )
            outcomes = await asyncio.gather(*asked)
            exposition = await asyncio.to_thread(gateway.metrics)
    return [msgspec.structs.replace(each, overrun=overrun_of(exposition, each.variant)) for each in outcomes]


def overrun_of(exposition: str, tier: str) -> int:
    """Output tokens used beyond the holds of this tier, as the gateway's metrics say."""
    return int(metric(exposition, "penstock_overrun_tokens_total", tier=tier, kind="output"))


async def overload_litellm(overload: Overload, variants: Sequence[Variant]) -> list[Outcome]:
    """The same through LiteLLM's proxy, whose keys all have the limit. Raises LitellmUnavailableError."""
    limits = KeyLimits(requests_per_minute=_AMPLE_RATE[0], tokens_per_minute=overload.per_minute)
    async with PacedUpstream(overload.token_s) as upstream:
        with bench_redis() as server, LitellmProxy(upstream.url, server.port, limits) as litellm:
            asked = (
                overload.of(variant, litellm.url, f"sk-{index}", upstream) for index, variant in enumerate(variants)
            )
            outcomes = await asyncio.gather(*asked)
    return [
        msgspec.structs.replace(each, variant=variant.asked) for each, variant in zip(outcomes, variants, strict=True)
    ]


class Report(msgspec.Struct):
    """One run, by limiter. ``notes`` say what is missing, and why."""

    callers: int
    outcomes: dict[str, list[Outcome]]
    notes: list[str]


async def run(per_minute: int, seconds: float) -> Report:
    """Every variant through our gateway, then those that are LiteLLM's to tell apart through its proxy."""
    report = Report(CALLERS, {}, [])
    with bench_redis() as server:
        ours = Overload(per_minute, per_minute, seconds)
        report.outcomes["Penstock"] = await overload_gateway(ours, VARIANTS, server.url)
    # Its windows of a minute open with the first request: the whole minute's tokens at once are no burst beyond them.
    theirs = Overload(per_minute, 0, seconds)
    try:
        variants = [variant for variant in VARIANTS if variant.holds == "learned"]
        report.outcomes[f"LiteLLM {VERSION}"] = await overload_litellm(theirs, variants)
    except LitellmUnavailableError as error:
        report.notes.append(str(error))
    return report


def show(report: Report) -> None:
    """Print the tables."""
    console = Console(width=TABLE_WIDTH)
    for limiter, outcomes in report.outcomes.items():
        first = outcomes[0]
        limit = f"{first.limit_per_minute:,} output tokens a minute, burst {first.burst:,}"
        table = Table(title=f"{limiter}: {limit}, {report.callers} callers a key, {first.seconds:.0f} s")
        for column in ("", "served", "allowed", "share", "answers", "refused", "no time told", "longest told"):
            table.add_column(column, justify="right" if column else "left")
        table.add_column("errors", justify="right")
        table.add_column("overrun", justify="right")
        for each in outcomes:
            counts = (each.answers, each.refusals, each.refusals_without_time)
            table.add_row(
                each.variant,
                f"{each.served:,}",
                f"{each.allowed:,.0f}",
                f"{each.share:.1%}",
                *(f"{number:,}" for number in counts),
                f"{each.longest_wait_told_s:.1f} s",
                str(each.errors),
                "" if each.overrun is None else f"{each.overrun:,}",
            )
        console.print(table)
    console.print(*report.notes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--per-minute", type=int, default=1_000, help="output tokens of each key")
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments.per_minute, arguments.seconds))
    show(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
