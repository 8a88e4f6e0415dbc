"""Keeps the engines that the config asks for running: starts the missing, stops the surplus, restarts the crashed."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from time import monotonic

from ratelimit.supervisor.backoff import Backoff
from serving.engine.launch import Engine, EngineError, EngineSpec

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.25


class EngineKeeper:
    """One engine for each wanted spec, under a restart back-off; ``stop`` ends them all."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._wanted: tuple[EngineSpec, ...] = ()
        self._running: dict[EngineSpec, Engine] = {}
        self._backoffs: defaultdict[EngineSpec, Backoff] = defaultdict(Backoff)
        self._stopping: set[asyncio.Task[None]] = set()

    @property
    def engines(self) -> list[Engine]:
        """The engines that are running or starting up."""
        return list(self._running.values())

    def want(self, specs: Iterable[EngineSpec]) -> None:
        """Run exactly these engines from the next check on."""
        self._wanted = tuple(specs)

    async def start(self) -> None:
        """Start every wanted engine and wait until all serve. Raises ``EngineError`` when one does not."""
        for spec in self._wanted:
            await self._start(spec)
        await asyncio.gather(*(engine.wait_ready() for engine in self._running.values()))

    async def run(self) -> None:
        """Check for ever, until cancelled."""
        while True:
            await self._check()
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def stop(self) -> None:
        """Stop every engine."""
        engines, self._running, self._wanted = list(self._running.values()), {}, ()
        await asyncio.gather(*(engine.stop() for engine in engines), *self._stopping)

    async def _check(self) -> None:
        for spec, engine in list(self._running.items()):
            status = engine.poll()
            if spec not in self._wanted:
                self._let_go(spec, engine)
            elif status is not None:
                log.error("engine %s exited with status %d", engine.url, status)
                self._backoffs[spec].failed(monotonic())
                self._let_go(spec, engine)
        for spec in self._wanted:
            if spec not in self._running and self._backoffs[spec].may_start(monotonic()):
                await self._try_start(spec)

    def _let_go(self, spec: EngineSpec, engine: Engine) -> None:
        del self._running[spec]
        task = asyncio.create_task(engine.stop())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _start(self, spec: EngineSpec) -> None:
        self._backoffs[spec].started(monotonic())
        self._running[spec] = await Engine.start(spec, self._workdir)

    async def _try_start(self, spec: EngineSpec) -> None:
        try:
            await self._start(spec)
        except EngineError as error:
            self._backoffs[spec].failed(monotonic())
            log.error("%s", error)
