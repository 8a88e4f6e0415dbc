"""Keeps the engines that the config asks for running: starts the missing, stops the surplus, restarts the crashed.

An engine that goes is stopped in two steps, so that it can be taken off the published limits in between: ``want``
names it, ``let_go`` stops it. One that is replaced at its own address has no such step in between, since the limits
never stop naming that address; the next check stops it, and a later one starts its successor.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable
from pathlib import Path
from time import monotonic

from ratelimit.supervisor.backoff import Backoff
from serving.engine.command import EngineIdentity
from serving.engine.launch import Engine, EngineError, EngineSpec, all_ready

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.25

StartEngine = Callable[[EngineSpec, Path], Awaitable[Engine]]


class EngineKeeper:
    """One engine for each wanted spec, under a restart back-off; ``stop`` ends them all."""

    def __init__(self, workdir: Path, start_engine: StartEngine = Engine.start) -> None:
        self._workdir = workdir
        self._start_engine = start_engine
        self._wanted: dict[EngineIdentity, EngineSpec] = {}
        self._running: dict[EngineIdentity, Engine] = {}
        self._backoffs: defaultdict[EngineIdentity, Backoff] = defaultdict(Backoff)
        self._stopping: dict[asyncio.Task[None], Engine] = {}

    @property
    def engines(self) -> list[Engine]:
        """The engines that are running or starting up."""
        return list(self._running.values())

    def want(self, specs: Iterable[EngineSpec]) -> list[str]:
        """Run these engines from the next check on, and return the URLs at which none is wanted any more.

        Engines at those URLs run on, though a crashed one is not restarted, until ``let_go`` stops them or a later
        ``want`` keeps them. What needs their GPUs is started after that.
        """
        self._wanted = {spec.identity: spec for spec in specs}
        urls = {spec.url for spec in self._wanted.values()}
        return [engine.url for engine in self._running.values() if engine.url not in urls]

    async def let_go(self, urls: Collection[str]) -> None:
        """Stop the engines at these URLs that are not wanted, and wait for their end."""
        going = [
            self._stop(identity)
            for identity, engine in list(self._running.items())
            if engine.url in urls and identity not in self._wanted
        ]
        if going:
            await asyncio.wait(going)  # unlike gather, leaves the stops running where we are cancelled

    async def start(self) -> None:
        """Start every wanted engine and wait until all serve.

        Raises the ``EngineError`` of the first that does not; the others are left for ``stop``.
        """
        for identity, spec in self._wanted.items():
            await self._start(identity, spec)
        await all_ready(self._running.values())

    async def run(self) -> None:
        """Check for ever, until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def check(self) -> None:
        """Take note of the crashed, stop the replaced, and start what is missing and may start."""
        urls = {spec.url for spec in self._wanted.values()}
        for identity, engine in list(self._running.items()):
            status = engine.poll()
            if status is not None:
                log.error("engine %s exited with status %d", engine.url, status)
                self._backoffs[identity].failed(monotonic())
                self._stop(identity)
            elif identity not in self._wanted and engine.url in urls:
                self._stop(identity)
        for identity, spec in self._wanted.items():
            if self._may_start(identity, spec):
                await self._try_start(identity, spec)

    async def stop(self) -> None:
        """Stop every engine."""
        self._wanted = {}
        for identity in list(self._running):
            self._stop(identity)
        await asyncio.gather(*self._stopping)

    def _may_start(self, identity: EngineIdentity, spec: EngineSpec) -> bool:
        if identity in self._running or not self._backoffs[identity].may_start(monotonic()):
            return False
        leaving = [engine for other, engine in self._running.items() if other not in self._wanted]
        return not any(spec.shares_with(engine.spec) for engine in (*leaving, *self._stopping.values()))

    def _stop(self, identity: EngineIdentity) -> asyncio.Task[None]:
        engine = self._running.pop(identity)
        task = asyncio.create_task(engine.stop())
        self._stopping[task] = engine
        task.add_done_callback(self._stopping.pop)
        return task

    async def _start(self, identity: EngineIdentity, spec: EngineSpec) -> None:
        self._backoffs[identity].started(monotonic())
        self._running[identity] = await self._start_engine(spec, self._workdir)
        if identity not in self._wanted:  # ``want`` came while it started, too early to name it
            self._stop(identity)

    async def _try_start(self, identity: EngineIdentity, spec: EngineSpec) -> None:
        try:
            await self._start(identity, spec)
        except EngineError as error:
            self._backoffs[identity].failed(monotonic())
            log.error("%s", error)
