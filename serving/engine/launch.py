"""Start, watch and stop real vLLM on a GPU, on the CPU, or on a virtual GPU."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple, NoReturn

import aiohttp

from serving.engine.command import EngineError, EnginePaths, EngineSpec, engine_argv, engine_environment
from serving.engine.control import VirtualGpuControl
from serving.engine.guard import GuardedProcess, GuardError
from serving.engine.tiny_model import TinyModel, make_tiny_model
from serving.profile import dump_profile

__all__ = ["Engine", "EngineError", "EngineSpec", "all_ready", "become_engine", "start_engines"]

#: How long a SIGTERM may take. Idle vLLM needs about 2 s; with open streams it hangs, so the guard kills it after this.
STOP_GRACE_S = 3.0
#: How long a start may take, by device: a GPU loads tens of gigabytes of weights, perhaps over a network first.
START_TIMEOUT_S: Mapping[str, float] = {"gpu": 1800.0, "cpu": 180.0, "virtual": 180.0}

_HEALTH_INTERVAL_S = 0.2
_HEALTH_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
_IMPORT_CHECK_TIMEOUT_S = 30.0


class Engine:
    """One running vLLM server under a guard."""

    def __init__(self, spec: EngineSpec, process: GuardedProcess, control: VirtualGpuControl | None) -> None:
        self.spec = spec
        self.url = spec.url
        self.pid = process.pid
        self.guard_pid = process.guard_pid
        self.control = control
        self._process = process

    @classmethod
    async def start(cls, spec: EngineSpec, workdir: Path) -> Engine:
        """Spawn the server and return at once; its files lie under ``workdir``. Raises ``EngineError``."""
        try:
            return await cls._start(spec, workdir)
        except (GuardError, OSError) as error:
            raise EngineError(f"cannot start engine {spec.url}: {error}") from error

    @classmethod
    async def _start(cls, spec: EngineSpec, workdir: Path) -> Engine:
        command = await _prepared(spec, workdir)
        process = GuardedProcess.start(command.argv, log_path=command.paths.log, env=command.env)
        control = VirtualGpuControl(command.paths.control) if spec.device == "virtual" else None
        return cls(spec, process, control)

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the server is healthy, for as long as its device may take where no timeout is given.

        Raises ``EngineError`` with the log's tail when it ends or is late.
        """
        timeout_s = START_TIMEOUT_S[self.spec.device] if timeout_s is None else timeout_s
        deadline_s = monotonic() + timeout_s
        async with aiohttp.ClientSession(timeout=_HEALTH_TIMEOUT) as session:
            while not await self._is_healthy(session):
                status = self.poll()
                if status is not None:
                    raise EngineError(
                        f"engine {self.url} ended with status {status} while starting:\n{self._process.log_tail()}"
                    )
                if monotonic() > deadline_s:
                    raise EngineError(
                        f"engine {self.url} was not ready after {timeout_s:.0f} s:\n{self._process.log_tail()}"
                    )
                await asyncio.sleep(_HEALTH_INTERVAL_S)

    def poll(self) -> int | None:
        """The server's exit status, None while it runs."""
        return self._process.poll()

    async def stop(self) -> None:
        """End the server and all that it started; idempotent."""
        await self._process.stop(STOP_GRACE_S)

    async def _is_healthy(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


async def start_engines(specs: Sequence[EngineSpec], workdir: Path, timeout_s: float | None = None) -> list[Engine]:
    """Start all engines beside each other and wait until all are ready; one that fails stops the others."""
    engines: list[Engine] = []
    try:
        for spec in specs:
            engines.append(await Engine.start(spec, workdir))  # noqa: PERF401 - what has started must be stopped
        await all_ready(engines, timeout_s)
    except BaseException:
        await asyncio.gather(*(engine.stop() for engine in engines))
        raise
    return engines


async def all_ready(engines: Iterable[Engine], timeout_s: float | None = None) -> None:
    """Wait until all are ready. Raises the ``EngineError`` of the first that is not to be, at once."""
    try:
        async with asyncio.TaskGroup() as group:
            for engine in engines:
                group.create_task(engine.wait_ready(timeout_s))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def become_engine(spec: EngineSpec, workdir: Path) -> NoReturn:
    """Turn this process into the server, its output where ours goes; its files lie under ``workdir``.

    For containers, whose runtime is the guard: it signals this one process, and ends all that is left after its grace.
    Raises ``EngineError``.
    """
    try:
        command = asyncio.run(_prepared(spec, workdir))
        os.execve(command.argv[0], command.argv, command.env)  # noqa: S606 - our own command, no shell
    except OSError as error:
        raise EngineError(f"cannot start engine {spec.url}: {error}") from error


class _Command(NamedTuple):
    """What starts a server whose files have been written."""

    argv: list[str]
    env: dict[str, str]
    paths: EnginePaths


async def _prepared(spec: EngineSpec, workdir: Path) -> _Command:
    """Check that the server can start, and write what it reads. Raises ``EngineError`` and ``OSError``."""
    _check_spec(spec)
    _check_port(spec)
    await _check_vllm(spec.python)
    paths, model = _prepare(spec, workdir)
    if spec.device == "virtual":
        VirtualGpuControl(paths.control).reset()
    env = engine_environment(spec, os.environ, paths, model, os.cpu_count() or 1)
    return _Command(engine_argv(spec, model), env, paths)


def _check_spec(spec: EngineSpec) -> None:
    if spec.gpu_index < 0:
        raise EngineError(f"engine {spec.url}: gpu_index is {spec.gpu_index}, the first GPU is 0")
    if spec.device == "virtual" and spec.profile is None:
        raise EngineError(f"engine {spec.url}: a virtual GPU needs a profile, such as h100-llama-3.1-8b")
    if not 0 < spec.slowdown < float("inf"):
        raise EngineError(f"engine {spec.url}: slowdown is {spec.slowdown}, it must be a positive number")
    if spec.device != "virtual" and spec.slowdown != 1.0:
        raise EngineError(f"engine {spec.url}: only a virtual GPU can be slowed down; leave slowdown out")


def _check_port(spec: EngineSpec) -> None:
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((spec.host, spec.port))
        except OSError as error:
            raise EngineError(
                f"cannot start an engine on {spec.host}:{spec.port}: {error.strerror}; "
                "choose another port, or stop what uses this one"
            ) from error


async def _check_vllm(python: str) -> None:
    """Raise ``EngineError`` unless that interpreter has vLLM. Importing it would take seconds, so it is only found."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    advice = "install penstock[vllm] on a GPU host, or the CPU wheel by `make install`"
    try:
        process = await asyncio.create_subprocess_exec(python, "-c", code)
    except OSError as error:
        raise EngineError(f"cannot run {python}: {error.strerror}; name a Python that has vLLM") from error
    try:
        status = await asyncio.wait_for(process.wait(), _IMPORT_CHECK_TIMEOUT_S)
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise EngineError(f"{python} did not answer within {_IMPORT_CHECK_TIMEOUT_S:.0f} s") from error
    if status:
        raise EngineError(f"{python} has no vLLM; {advice}")


def _prepare(spec: EngineSpec, workdir: Path) -> tuple[EnginePaths, TinyModel | None]:
    """Write what the server reads: its profile, and the tiny model for the devices that are no GPU."""
    workdir.mkdir(parents=True, exist_ok=True)
    name = f"engine-{spec.port}"
    folder = workdir.resolve()
    paths = EnginePaths(folder / f"{name}.log", folder / f"{name}.profile.json", folder / f"{name}.control.json")
    if spec.profile is not None:
        paths.profile.write_bytes(dump_profile(spec.profile))
    if spec.device == "gpu" or spec.limits is None:
        return paths, None
    return paths, make_tiny_model(folder / "models", spec.limits.max_model_len)
