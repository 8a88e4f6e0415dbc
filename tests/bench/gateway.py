"""What the gateway costs, limiter on and real Redis, beside the bare upstream in the same run.

``python -m tests.bench.gateway [--json FILE] [--seconds 6] [--streams 200]`` prints a table in about a minute. CPU is
the process's own (user and system), so figures hold on a busy machine too; rates and latencies need an idle one.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from ratelimit.embedded_redis import connect, start_embedded_redis
from tests.bench.load import Asked, ask_for, open_streams
from tests.support.gateway import GatewayProcess, gateway_settings, make_key, publication, publish

CONNECTIONS = 32
CHUNKS_PER_S = 50.0
#: More than any run can use up.
AMPLE = {
    "requests": (60_000_000, 10_000_000),
    "input_tokens": (6_000_000_000, 100_000_000),
    "output_tokens": (6_000_000_000, 100_000_000),
    "concurrency": (0, 100_000),
}


class Figures(msgspec.Struct):
    """What one target took: the gateway, or the upstream asked directly. CPU is the target process's."""

    requests_per_s: float
    cpu_per_request_us: float
    latency_p50_ms: float
    latency_p99_ms: float
    cpu_per_chunk_us: float
    memory_per_stream_kib: float
    chunks_per_s: float
    errors: int


class Report(msgspec.Struct):
    """One run."""

    connections: int
    streams: int
    chunks_per_s_per_stream: float
    seconds: float
    gateway: Figures
    upstream: Figures


@contextmanager
def bench_upstream(chunks: int) -> Iterator[tuple[str, psutil.Process]]:
    """The canned upstream in a process of its own."""
    argv = [sys.executable, "-m", "tests.bench.upstream", str(chunks), str(CHUNKS_PER_S)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", psutil.Process(process.pid)
        finally:
            process.kill()


def cpu_s(process: psutil.Process) -> float:
    """User and system time so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure_whole(url: str, secret: str, process: psutil.Process, seconds: float) -> tuple[Asked, float]:
    """Answers that are not streamed, after a warm-up: what came back, and the process's CPU seconds for it."""
    await ask_for(url, secret, CONNECTIONS, min(1.0, seconds))
    before = cpu_s(process)
    whole = await ask_for(url, secret, CONNECTIONS, seconds)
    return whole, cpu_s(process) - before


async def measure(url: str, secret: str, process: psutil.Process, seconds: float, streams: int) -> Figures:
    """Both loads on one target."""
    whole, whole_cpu_s = await measure_whole(url, secret, process, seconds)
    chunks = round(seconds * CHUNKS_PER_S)
    warm, _ = await open_streams(url, secret, streams, chunks)
    for asker in warm:  # the memory that a first wave leaves behind belongs to no stream of the second
        asker._transport.abort()
    await asyncio.wait({asker.ended for asker in warm}, timeout=10)
    await asyncio.sleep(0.5)
    resident = process.memory_info().rss
    askers, streamed = await open_streams(url, secret, streams, chunks)
    await asyncio.sleep(seconds / 3)
    before, chunks_before = cpu_s(process), streamed.chunks
    await asyncio.sleep(seconds / 3)
    chunk_cpu_s, relayed = cpu_s(process) - before, streamed.chunks - chunks_before
    grown = process.memory_info().rss - resident
    await asyncio.wait({asker.ended for asker in askers}, timeout=4 * seconds)
    return Figures(
        requests_per_s=whole.answers / whole.elapsed_s,
        cpu_per_request_us=1e6 * whole_cpu_s / max(1, whole.answers),
        latency_p50_ms=whole.latency_ms(0.5),
        latency_p99_ms=whole.latency_ms(0.99),
        cpu_per_chunk_us=1e6 * chunk_cpu_s / max(1, relayed),
        memory_per_stream_kib=max(0, grown) / streams / 1024,
        chunks_per_s=relayed / (seconds / 3),
        errors=whole.errors + streamed.errors,
    )


async def run(seconds: float, streams: int) -> Report:
    """Start everything, measure the bare upstream and the gateway, stop everything."""
    with tempfile.TemporaryDirectory(prefix="pn-bench-") as folder, bench_upstream(round(seconds * 50)) as upstream:
        server = await start_embedded_redis(Path(folder) / "redis", Path(folder) / "redis.log")
        try:
            redis = await connect(server.url)
            secret, record = make_key()
            limits = publication([upstream[0]], **AMPLE)  # type: ignore[arg-type]  # limits, and no other argument
            await publish(redis, limits, record)
            await redis.aclose()
            with GatewayProcess(gateway_settings(server.url)) as gateway:
                direct = await measure(upstream[0], secret, upstream[1], seconds, streams)
                through = await measure(gateway.url, secret, psutil.Process(gateway.process.pid), seconds, streams)
        finally:
            await server.stop()
    return Report(CONNECTIONS, streams, CHUNKS_PER_S, seconds, gateway=through, upstream=direct)


def show(report: Report) -> None:
    """Print the table."""
    table = Table(title=f"{report.connections} connections; {report.streams} streams at {CHUNKS_PER_S:.0f} chunks/s")
    for column in ("", "gateway, limiter on", "bare upstream"):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "requests/s": ("requests_per_s", "{:,.0f}"),
        "CPU per request": ("cpu_per_request_us", "{:,.0f} µs"),
        "latency p50": ("latency_p50_ms", "{:.1f} ms"),
        "latency p99": ("latency_p99_ms", "{:.1f} ms"),
        "CPU per relayed chunk": ("cpu_per_chunk_us", "{:.1f} µs"),
        "memory per stream": ("memory_per_stream_kib", "{:.1f} KiB"),
        "chunks/s": ("chunks_per_s", "{:,.0f}"),
        "errors": ("errors", "{}"),
    }
    for name, (attribute, form) in rows.items():
        values = (getattr(figures, attribute) for figures in (report.gateway, report.upstream))
        table.add_row(name, *(form.format(value) for value in values))
    Console().print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--streams", type=int, default=200)
    arguments = parser.parse_args()
    report = uvloop.run(run(arguments.seconds, arguments.streams))
    show(report)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


if __name__ == "__main__":
    main()
