"""``penstock measure``'s runner against ``vllm bench serve``, on the tiny model on the CPU, at three loads.

The two take turns on one engine. Each sends random text whose length is drawn evenly from the same range, asks for as
many tokens (EOS ignored), and keeps as many requests in flight. What is compared is the rounds' median. Prompts are not
all of one length, since equal requests march in step, and then latencies hang on how they happened to fall in.
``penstock measure`` itself sends token ids, whose number is exact, and which spare the server its tokenizer (2 to 3 ms
of a TTFT of 30, measured here); the bench cannot, so here its runner sends what they decode to.

The engine's worker runs within its core process. As a process of its own it and the core both spin for each other; on
two cores that leaves none to the API server, which then delivers whole answers at once, and neither tool's latencies
mean anything (seen: TTFT 8 ms or 150 ms, from one second to the next).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
from tokenizers import Tokenizer

from serving.capacity import RequestShape, WorkloadMix
from serving.closedloop import run_closed_point
from serving.endpoint import Answer, Endpoint
from serving.engine.launch import Engine, EngineSpec, start_engines
from serving.run_verdict import PointSettings
from tests.support.engines import MODEL, free_port

REPOSITORY = Path(__file__).parents[2]
#: The mean prompt, each drawn from ±20 % of it, and the answer.
INPUT_TOKENS, OUTPUT_TOKENS = 768, 64
RANGE = 0.2
_GRID = 21
#: The most that the two may differ, as a share of the bench's figure.
BOUND = 0.10
#: vLLM's CPU platform takes the option at its word only with this in its environment.
_WITHIN_THE_CORE = ("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
_OPTIONS = ("--no-enable-prefix-caching", "--distributed-executor-backend", "uni")
_BENCH_TIMEOUT_S = 180.0
_REQUEST_TIMEOUT_S = 60.0


class Level(NamedTuple):
    """Requests in flight, and how many the bench sends in all: some seconds' worth."""

    concurrency: int
    requests: int


LEVELS = (Level(1, 60), Level(2, 100), Level(4, 160))
#: Our runs take about as long as the bench's.
POINT = PointSettings(warm_up_s=1.0, watch_s=9.0)


class Run(msgspec.Struct, frozen=True):
    """One run of either tool; medians over its requests, in seconds."""

    output_per_s: float
    tpot_p50_s: float
    ttft_p50_s: float


class Agreement(msgspec.Struct, frozen=True):
    """One figure: the medians over the rounds, and how far ours is above the bench's, as a share of it."""

    name: str
    ours: float
    bench: float
    error: float
    holds: bool


class LevelResult(msgspec.Struct, frozen=True):
    """One load: all rounds of both tools, in the order they ran, and what they agree in."""

    concurrency: int
    figures: tuple[Agreement, ...]
    ours: tuple[Run, ...]
    bench: tuple[Run, ...]

    @property
    def holds(self) -> bool:
        """Whether all figures agree."""
        return all(figure.holds for figure in self.figures)


async def run_measure(
    folder: Path, rounds: int, tell: Callable[[str], None], levels: Sequence[Level] = LEVELS
) -> tuple[LevelResult, ...]:
    """Start the CPU engine, let the two take turns at each load, and stop it."""
    with _environment(*_WITHIN_THE_CORE):
        (engine,) = await start_engines([EngineSpec("cpu", MODEL, free_port(), extra_args=_OPTIONS)], folder)
    try:
        return tuple([await _level(engine, folder, level, rounds, tell) for level in levels])
    finally:
        await engine.stop()


async def _level(engine: Engine, folder: Path, level: Level, rounds: int, tell: Callable[[str], None]) -> LevelResult:
    ours: list[Run] = []
    bench: list[Run] = []
    for number in range(rounds):
        tell(f"concurrency {level.concurrency}, round {number + 1} of {rounds}: vllm bench serve")
        bench.append(await bench_run(engine, folder, level, seed=1 + number))
        tell(f"concurrency {level.concurrency}, round {number + 1} of {rounds}: penstock measure")
        ours.append(await own_run(engine, folder, level, seed=number))
    figures = tuple(_agreement(name, ours, bench) for name in ("output_per_s", "tpot_p50_s", "ttft_p50_s"))
    return LevelResult(level.concurrency, figures, tuple(ours), tuple(bench))


async def own_run(engine: Engine, folder: Path, level: Level, seed: int) -> Run:
    """One closed loop of ``penstock measure``'s own runner. Raises ``RuntimeError`` for one that is not steady."""
    tokenizer = Tokenizer.from_file(str(_model_folder(folder) / "tokenizer.json"))
    async with _TextEndpoint(engine.url, tokenizer) as endpoint:
        found = await run_closed_point(endpoint, MODEL, drawn_mix(), level.concurrency, POINT, seed)
        await endpoint.drained(_REQUEST_TIMEOUT_S)
    point = found.point
    if found.state != "steady" or point.tpot_p50_s is None or point.ttft_p50_s is None:
        raise RuntimeError(f"a run at concurrency {level.concurrency} was {found.state}: {found.why}")
    return Run(point.output_tokens / point.duration_s, point.tpot_p50_s, point.ttft_p50_s)


def drawn_mix() -> WorkloadMix:
    """The lengths that both draw, as a grid."""
    factors = [1 - RANGE + 2 * RANGE * k / (_GRID - 1) for k in range(_GRID)]
    return WorkloadMix("drawn", tuple(RequestShape(round(INPUT_TOKENS * f), OUTPUT_TOKENS) for f in factors))


class _TextEndpoint(Endpoint):
    """Sends what the token ids of a prompt decode to."""

    def __init__(self, url: str, tokenizer: Tokenizer) -> None:
        super().__init__(url, None, _REQUEST_TIMEOUT_S)
        self._tokenizer = tokenizer

    async def complete(self, model: str, prompt: str | list[int], output_tokens: int) -> Answer:
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        return await super().complete(model, text, output_tokens)


def _model_folder(folder: Path) -> Path:
    (model,) = (folder / "models").iterdir()
    return model


async def bench_run(engine: Engine, folder: Path, level: Level, seed: int) -> Run:
    """One run of ``vllm bench serve``, read from the JSON that it saves. Raises ``RuntimeError`` where it fails."""
    name = f"bench-{level.concurrency}-{seed}.json"
    lengths = msgspec.json.encode({"input": RANGE, "output": 0.0}).decode()
    command = [
        *(sys.executable, "-m", "tests.support.vllm_bench", "--backend", "openai", "--base-url", engine.url),
        *("--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", str(_model_folder(folder))),
        *("--dataset-name", "random", "--random-input-len", str(INPUT_TOKENS), "--random-range-ratio", lengths),
        *("--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(level.requests), "--ignore-eos"),
        *("--max-concurrency", str(level.concurrency), "--temperature", "0", "--seed", str(seed)),
        *("--disable-tqdm", "--save-result", "--result-dir", str(folder), "--result-filename", name),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _BENCH_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"vllm bench serve failed: {output.decode(errors='replace')[-1000:]}")
    return _read(folder / name, level)


class _BenchResult(msgspec.Struct):
    completed: int
    total_output_tokens: int
    output_throughput: float
    median_tpot_ms: float
    median_ttft_ms: float


def _read(path: Path, level: Level) -> Run:
    result = msgspec.json.decode(path.read_bytes(), type=_BenchResult)
    if (result.completed, result.total_output_tokens) != (level.requests, level.requests * OUTPUT_TOKENS):
        raise RuntimeError(f"vllm bench serve had {result.completed} of {level.requests} requests answered in full")
    return Run(result.output_throughput, result.median_tpot_ms / 1e3, result.median_ttft_ms / 1e3)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Engines started meanwhile inherit it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({name: before} if before is not None else {})


def _agreement(name: str, ours: Sequence[Run], bench: Sequence[Run]) -> Agreement:
    own, other = (median(getattr(run, name) for run in runs) for runs in (ours, bench))
    error = own / other - 1
    return Agreement(name, own, other, error, abs(error) <= BOUND)
