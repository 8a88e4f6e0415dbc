"""What one decision of the limiter costs on one Redis primary, beside ``INCRBY`` and LiteLLM's limiter, in one run.

``python -m tests.bench.limiter [--json FILE] [--requests 100000] [--seconds 5]``. Rates need an idle machine with two
cores, one for Redis and one for whoever asks it; Redis's CPU per command and the ratios hold on a busier one too.

``redis-benchmark`` is taken from PATH (Debian: ``redis-tools``) or from ``--redis-benchmark``. It cannot send a NUL
byte, and MessagePack's zero is one. So what follows the first NUL of an argument goes into the script's first line,
and a filler of the same length is sent: as many bytes on the wire, one concatenation more than in service. The request
id is drawn for each call, in the reservation's key and in the call each by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import psutil
import redis
import uvloop
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from ratelimit.link import open_link
from ratelimit.meter import Charge, Role
from ratelimit.store import RedisCommands, Store, StoreUnavailableError, script
from tests.bench.gateway import AMPLE, CONNECTIONS, bench_upstream, cpu_s, measure_whole
from tests.bench.litellm import VERSION, KeyLimits, LitellmProxy, LitellmUnavailableError
from tests.bench.servers import RedisBenchmark, RedisServer, bench_redis
from tests.support.gateway import GatewayProcess, gateway_settings, make_key, publication, publish
from tests.support.waiting import eventually_async

TARGET_PER_S = 25_000
CONCURRENCY = 50
TABLE_WIDTH = 110
CELL = "bench"
EPOCH = 7
LEASE_MS = 600_000
#: 24 digits, in msgpack as in Redis: a string of fixed length.
RANDOM_ID = "__rand_int__" * 2
#: Nobody is refused: more than any run uses, a minute and at once.
RATE, CAPACITY = 60_000_000, 100_000_000
Command: TypeAlias = tuple[bytes | str | int, ...]

_KEY, _ORG = "k:k_1a2b3c4d", "o:acme"
#: A key that may not borrow, with its org's tokens: three scopes.
SIX_BUCKETS = (
    Charge(f"{_KEY}:requests", 1, CAPACITY, RATE),
    Charge(f"{_KEY}:input_tokens", 100, CAPACITY, RATE),
    Charge(f"{_KEY}:output_tokens", 300, CAPACITY, RATE),
    Charge(f"{_KEY}:concurrency", 1, CAPACITY, 0),
    Charge(f"{_ORG}:output_tokens", 300, CAPACITY, RATE),
    Charge("pool:work", 50_000, 1000 * CAPACITY, 1000 * RATE, 1000, Role.COUNTED),
)
#: A key that may borrow, as derived limits are: two scopes.
BORROWING = (
    Charge(f"{_KEY}:requests", 1, CAPACITY, RATE),
    Charge(f"{_KEY}:input_tokens", 100, CAPACITY, RATE, role=Role.ASSURED),
    Charge(f"{_KEY}:output_tokens", 300, CAPACITY, RATE, role=Role.ASSURED),
    Charge(f"{_KEY}:concurrency", 1, CAPACITY, 0),
    Charge(f"{_KEY}:input_tokens.ceiling", 100, CAPACITY, RATE, role=Role.CEILING),
    Charge(f"{_KEY}:output_tokens.ceiling", 300, CAPACITY, RATE, role=Role.CEILING),
    Charge("pool:work", 50_000, 1000 * CAPACITY, 1000 * RATE, 1000, Role.POOL),
)
#: What a usage record weighs, and what is kept for one in case nobody settles.
RECORD, MEMO = b"x" * 200, b"x" * 60


class Row(msgspec.Struct, frozen=True):
    """One kind of call: how many a second, and the CPU that the Redis process spent on one, input and output too."""

    what: str
    per_s: float
    redis_cpu_us: float

    @property
    def redis_bound_per_s(self) -> float:
        """What one core for Redis would allow."""
        return 1e6 / self.redis_cpu_us


class _Recorder:
    """A client that sends nothing and remembers what it was to send."""

    parts: Command = ()

    async def command(self, key: str, *parts: bytes | str | int) -> object:
        del key
        self.parts = parts
        raise OSError("nothing is sent")


async def command_of(call: Callable[[Store], Awaitable[object]]) -> Command:
    """The EVALSHA that a call of the store sends."""
    recorder = _Recorder()
    with suppress(StoreUnavailableError):
        await call(Store(recorder, CELL, timeout_s=60))
    return recorder.parts


def sendable(command: Command, text: str) -> tuple[Command, str]:
    """What follows the digest of an EVALSHA, without NUL bytes, and the script that puts back what was cut."""
    keys = int(command[2])
    prologue, parts, fillers = [], list[bytes | str | int](), []
    for index, part in enumerate(command[3:]):
        head, nul, tail = part.partition(b"\0") if isinstance(part, bytes) else (part, b"", b"")
        parts.append(head)
        if nul:
            literal = "".join(f"\\{byte:03d}" for byte in nul + tail)
            prologue.append(f'ARGV[{index - keys + 1}] = ARGV[{index - keys + 1}] .. "{literal}"\n')
            fillers.append(b"x" * (1 + len(tail)))
    taken_out = [f"ARGV[{len(parts) - keys + 1 + index}] = nil\n" for index in range(len(fillers))]
    return (keys, *parts, *fillers), "".join((*prologue, *reversed(taken_out), text))


def with_id(command: Command, request_id: str) -> Command:
    """The command for this request."""
    secret = RANDOM_ID.encode()
    return tuple(
        part.replace(secret, request_id.encode()) if isinstance(part, bytes) else
        part.replace(RANDOM_ID, request_id) if isinstance(part, str) else part
        for part in command
    )  # fmt: skip


class Meter:
    """Times loads of one Redis, by the wall and by its process's CPU."""

    def __init__(self, server: RedisServer, client: redis.Redis) -> None:
        self._client = client
        self._process = psutil.Process(server.pid)
        self.begin()

    def begin(self, emptied: bool = True) -> None:
        """A new load begins, on an empty Redis or on what the last one left."""
        if emptied:
            self._client.flushall()
        self._client.config_resetstat()
        self._cpu_before_s = cpu_s(self._process)

    def row(self, what: str, per_s: float, command: str = "evalsha") -> Row:
        """A row of what ran since ``begin``. Raises RuntimeError where Redis refused some of it."""
        used_s = cpu_s(self._process) - self._cpu_before_s
        counted: Any = self._client.info("commandstats")
        stats = counted[f"cmdstat_{command}"]
        if stats.get("failed_calls"):
            raise RuntimeError(f"{stats['failed_calls']} calls of {command} failed: {what}")
        return Row(what, per_s, 1e6 * used_s / stats["calls"])


async def admit_command(charges: Sequence[Charge]) -> Command:
    """An admission whose request id is ``RANDOM_ID``."""
    return await command_of(lambda store: store.admit(RANDOM_ID, charges, EPOCH, LEASE_MS, MEMO))


async def with_redis_benchmark(tool: RedisBenchmark, meter: Meter, client: redis.Redis, requests: int) -> list[Row]:
    """``INCRBY`` and both admissions, under the tool."""
    meter.begin()
    rows = [meter.row("INCRBY", tool.rate(("INCRBY", "counter", 1), 2 * requests), "incrby")]
    for what, charges in (("admit, 6 buckets", SIX_BUCKETS), ("admit, 7 buckets, borrowing", BORROWING)):
        call, text = sendable(await admit_command(charges), script("admit").text)
        digest = str(client.script_load(text))
        meter.begin()
        per_s = tool.rate(("EVALSHA", digest, *call), requests)
        rows.append(meter.row(what, per_s))
    return rows


async def _rate(call: Callable[[int], Awaitable[object]], calls: int, concurrency: int) -> float:
    """Calls a second: so many at once, numbered."""
    numbers = iter(range(calls))

    async def one_after_the_other() -> None:
        for number in numbers:
            await call(number)

    started_s = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
    return calls / (time.perf_counter() - started_s)


async def through_redis_py(server: RedisServer, meter: Meter, requests: int) -> list[Row]:
    """``INCRBY`` and the admission, one awaited command each."""
    template = await admit_command(SIX_BUCKETS)
    async with Redis.from_url(server.url, max_connections=CONCURRENCY) as client:
        await client.script_load(script("admit").text)
        meter.begin()
        counting = await _rate(lambda _: client.incrby("counter", 1), requests, CONCURRENCY)
        rows = [meter.row("redis-py: INCRBY", counting, "incrby")]
        meter.begin()
        commands = [with_id(template, f"{number:024}") for number in range(requests)]
        through = RedisCommands(client)
        admitting = await _rate(lambda number: through.command(CELL, *commands[number]), requests, CONCURRENCY)
        rows.append(meter.row("redis-py: admit, 6 buckets", admitting))
    return rows


async def through_store(server: RedisServer, meter: Meter, requests: int) -> list[Row]:
    """A request's whole life through our store and our link."""
    link = open_link(server.url, connect_timeout_s=5)
    store = Store(link, CELL, timeout_s=30)
    used = [charge.costing(charge.cost // 2 + 1) for charge in SIX_BUCKETS if charge.rate]
    calls: tuple[tuple[str, Callable[[int], Awaitable[object]]], ...] = (
        ("admit", lambda number: store.admit(f"{number:024}", SIX_BUCKETS, EPOCH, LEASE_MS, MEMO)),
        ("extend", lambda number: store.extend(f"{number:024}", used, LEASE_MS)),
        ("settle", lambda number: store.settle(f"{number:024}", used, RECORD)),
    )
    try:
        for _, call in calls:  # so that Redis knows the scripts
            await call(requests)
        meter.begin()
        rows = []
        for what, call in calls:
            meter.begin(emptied=False)
            rows.append(meter.row(f"our store: {what}", await _rate(call, requests, CONCURRENCY)))
    finally:
        await link.aclose()
    return rows


class Proxied(msgspec.Struct, frozen=True):
    """What one proxy serves of the same upstream, limits on, answers not streamed. CPU is its process's."""

    requests_per_s: float
    cpu_per_request_us: float
    latency_p50_ms: float
    latency_p99_ms: float
    errors: int


class Report(msgspec.Struct):
    """One run. ``notes`` say what is missing, and why."""

    redis_version: str
    requests: int
    calls: list[Row]
    proxies: dict[str, Proxied]
    notes: list[str]


async def proxied(url: str, secret: str, process: psutil.Process, seconds: float) -> Proxied:
    """One proxy's figures."""
    whole, cpu_used_s = await measure_whole(url, secret, process, seconds)
    return Proxied(
        whole.answers / whole.elapsed_s,
        1e6 * cpu_used_s / max(1, whole.answers),
        whole.latency_ms(0.5),
        whole.latency_ms(0.99),
        whole.errors,
    )


async def beside_litellm(server: RedisServer, seconds: float, report: Report) -> None:
    """Our gateway, LiteLLM's proxy and the bare upstream, one after the other."""
    with bench_upstream(chunks=16) as (upstream_url, upstream):
        report.proxies["bare upstream"] = await proxied(upstream_url, "none", upstream, seconds)
        secret, record = make_key()
        async with Redis.from_url(server.url) as client:
            limits = publication([upstream_url], **AMPLE)  # type: ignore[arg-type]  # limits, and no other argument
            await publish(client, limits, record)
        with GatewayProcess(gateway_settings(server.url)) as gateway:
            await eventually_async(partial(asyncio.to_thread, gateway.epoch), 10, "the limits' arrival")
            process = psutil.Process(gateway.process.pid)
            report.proxies["Penstock"] = await proxied(gateway.url, secret, process, seconds)
        limit = KeyLimits(requests_per_minute=RATE, tokens_per_minute=10 * RATE)
        try:
            with LitellmProxy(upstream_url, server.port, limit) as litellm:
                process = psutil.Process(litellm.process.pid)
                report.proxies[f"LiteLLM {VERSION}"] = await proxied(litellm.url, "sk-any", process, seconds)
        except LitellmUnavailableError as error:
            report.notes.append(str(error))


async def run(tool: str | None, requests: int, seconds: float) -> Report:
    """Everything on one Redis."""
    with bench_redis() as server, redis.Redis(unix_socket_path=server.socket) as client:
        info: Any = client.info("server")
        report = Report(info["redis_version"], requests, [], {}, [])
        meter = Meter(server, client)
        if tool is None:
            report.notes.append("No redis-benchmark on PATH (Debian: redis-tools): its rows are left out.")
        else:
            report.calls += await with_redis_benchmark(RedisBenchmark(tool, server.socket), meter, client, requests)
        report.calls += await through_redis_py(server, meter, requests // 4)
        report.calls += await through_store(server, meter, requests // 4)
        client.flushall()
        await beside_litellm(server, seconds, report)
    return report


def show(report: Report) -> None:
    """Print the tables."""
    counting = next(row.per_s for row in report.calls if row.what.endswith("INCRBY"))
    table = Table(title=f"One Redis {report.redis_version} primary, {CONCURRENCY} callers at once")
    for column in ("", "calls/s", "beside the first INCRBY", "Redis's CPU", "one core for Redis"):
        table.add_column(column, justify="right" if column else "left")
    for row in report.calls:
        bound = f"{row.redis_bound_per_s:,.0f}/s"
        table.add_row(row.what, f"{row.per_s:,.0f}", f"{row.per_s / counting:.2f}", f"{row.redis_cpu_us:.1f} µs", bound)
    proxies = Table(title=f"The same upstream, {CONNECTIONS} connections, answers not streamed")
    for column in ("", "requests/s", "CPU per request", "p50", "p99", "errors"):
        proxies.add_column(column, justify="right" if column else "left")
    for name, found in report.proxies.items():
        cells = (f"{found.latency_p50_ms:.1f} ms", f"{found.latency_p99_ms:.1f} ms", str(found.errors))
        proxies.add_row(name, f"{found.requests_per_s:,.0f}", f"{found.cpu_per_request_us:,.0f} µs", *cells)
    Console(width=TABLE_WIDTH).print(table, proxies, *report.notes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--requests", type=int, default=100_000, help="of each load of redis-benchmark")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each proxy's measurement")
    parser.add_argument("--redis-benchmark", default=shutil.which("redis-benchmark"), help="its path")
    arguments = parser.parse_args()
    report = uvloop.run(run(arguments.redis_benchmark, arguments.requests, arguments.seconds))
    show(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
