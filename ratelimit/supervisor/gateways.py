"""The gateway workers of one machine: one process each, restarted when one exits."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import defaultdict
from pathlib import Path
from time import monotonic

import aiohttp

from ratelimit.config import GatewayConfig
from ratelimit.supervisor.backoff import Backoff
from serving.engine.guard import GuardedProcess

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.25
READY_TIMEOUT_S = 30.0


class GatewayError(RuntimeError):
    """A gateway worker that does not come up; the message carries the end of its log."""


class GatewayWorkers:
    """``workers`` gateway processes that share the data port; worker i has admin port ``admin_port`` + i."""

    def __init__(self, config: GatewayConfig, config_path: Path, redis_url: str, log_dir: Path) -> None:
        self._config = config
        self._config_path = config_path
        self._redis_url = redis_url
        self._log_dir = log_dir
        self._workers: dict[int, GuardedProcess] = {}
        self._exited: set[int] = set()
        self._backoffs: defaultdict[int, Backoff] = defaultdict(Backoff)

    @property
    def url(self) -> str:
        """Where callers reach the gateway."""
        return f"http://{self._config.host}:{self._config.port}"

    @property
    def admin_url(self) -> str:
        """The first worker's metrics and administration."""
        return f"http://{self._config.host}:{self._config.admin_port}"

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers and their guards."""
        return [pid for worker in self._workers.values() for pid in (worker.pid, worker.guard_pid)]

    def start(self) -> None:
        """Start every worker; ``wait_ready`` tells when they serve."""
        for index in range(self._config.workers):
            self._start(index)

    async def wait_ready(self) -> None:
        """Wait until every worker has read the published limits. Raises ``GatewayError``."""
        deadline = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            for index, worker in self._workers.items():
                while not await self._is_ready(session, index):
                    if worker.poll() is not None:
                        raise GatewayError(f"gateway worker {index} exited:\n{worker.log_tail()}")
                    if asyncio.get_running_loop().time() > deadline:
                        raise GatewayError(f"gateway worker {index} is not ready after {READY_TIMEOUT_S:.0f} s")
                    await asyncio.sleep(0.05)

    async def run(self) -> None:
        """Restart workers that exit, until cancelled."""
        while True:
            for index, worker in self._workers.items():
                if worker.poll() is None:
                    continue
                if index not in self._exited:
                    log.error("gateway worker %d exited with status %d", index, worker.poll())
                    self._exited.add(index)
                    self._backoffs[index].failed(monotonic())
                if self._backoffs[index].may_start(monotonic()):
                    self._start(index)
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def stop(self, grace_s: float) -> None:
        """Stop every worker, letting open streams finish for ``grace_s``."""
        await asyncio.gather(*(worker.stop(grace_s) for worker in self._workers.values()))

    def _start(self, index: int) -> None:
        argv = [sys.executable, "-m", "ratelimit.cli", "gateway", "--config", str(self._config_path)]
        argv += ["--redis", self._redis_url, "--worker", str(index)]
        self._exited.discard(index)
        self._backoffs[index].started(monotonic())
        self._workers[index] = GuardedProcess.start(argv, log_path=self._log_dir / f"gateway-{index}.log")

    async def _is_ready(self, session: aiohttp.ClientSession, index: int) -> bool:
        url = f"http://{self._config.host}:{self._config.admin_port + index}/health"
        try:
            async with session.get(url) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
