"""Talk to a vLLM server as the engine tests need it: whole streams with what ended them, and single metrics."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import psutil

from serving.capacity import EngineLimits, StepTimeModel
from serving.engine.launch import EngineSpec
from serving.engine.tiny_model import WORDS
from serving.profile import Profile, Provenance

MODEL = "tiny"


class Answer(msgspec.Struct):
    """One stream, as far as it came."""

    texts: list[str] = []
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    done: bool = False

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)


def prompt_of(tokens: int, first: int = 0) -> str:
    """A prompt of exactly that many tokens of the tiny model."""
    return "".join(f" {WORDS[(first + number) % len(WORDS)]}" for number in range(tokens))


def profile_of(base_s: float = 0.002, **limits: int) -> Profile:
    """A fast device for tests; no real GPU is like it."""
    bounds = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "kv_tokens": 16384, "max_model_len": 4096}
    return Profile(
        name="test",
        model="tiny",
        gpu="none",
        gpus_per_replica=1,
        step_time=StepTimeModel(base_s, base_s / 1000, base_s / 1000, base_s / 1e6),
        limits=EngineLimits(**bounds | limits),
        provenance=Provenance("estimated", "2026-01-01", "vLLM", "any", "any", "any", "made up for a test"),
    )


def free_port() -> int:
    """A port that the kernel gives out, and does not give again soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def virtual_spec(profile: Profile, slowdown: float = 1.0) -> EngineSpec:
    """A virtual GPU on a free port."""
    return EngineSpec("virtual", MODEL, free_port(), profile=profile, slowdown=slowdown)


async def read_stream(session: aiohttp.ClientSession, url: str, answer: Answer, **body: object) -> Answer:
    """Stream a completion into ``answer``, to its end or until the connection breaks."""
    request = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **body}
    try:
        async with session.post(f"{url}/v1/completions", json=request) as response:
            response.raise_for_status()
            async for line in response.content:
                _take(answer, line.removeprefix(b"data: ").strip())
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionError):
        return answer
    return answer


def _take(answer: Answer, data: bytes) -> None:
    if data == b"[DONE]":
        answer.done = True
        return
    if not data:
        return
    event = msgspec.json.decode(data)
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices", ()):
        answer.texts.append(choice["text"])
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


async def complete(session: aiohttp.ClientSession, url: str, **body: object) -> dict[str, Any]:
    """A completion in one piece."""
    async with session.post(f"{url}/v1/completions", json={"model": MODEL, **body}) as response:
        response.raise_for_status()
        answer: dict[str, Any] = await response.json()
        return answer


async def metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    """The value of one of vLLM's metrics."""
    async with session.get(f"{url}/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith(f"vllm:{name}{{"):
                return float(line.rsplit(" ", 1)[1])
    raise LookupError(f"{url} has no metric vllm:{name}")


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float, what: str) -> None:
    """Poll until the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s} s"
        await asyncio.sleep(0.02)


def family_of(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def engine_core_of(pid: int) -> psutil.Process:
    """The engine core below an API server."""
    return next(process for process in family_of(pid) if "EngineCore" in "".join(process.cmdline()))
