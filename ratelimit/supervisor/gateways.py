"""The gateway workers of one machine: one process each, restarted when one exits.

A worker is told its settings when the stack starts, and the same ones when it is restarted, but for its id: what the
config file says by then may be wrong, or not taken up. They go by the environment, since command lines can be read by
every user.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import aiohttp
import msgspec

from ratelimit.config import GatewayConfig
from ratelimit.gateway.settings import SETTINGS_VARIABLE, GatewaySettings, new_gateway_id
from ratelimit.supervisor.backoff import Backoff
from serving.engine.guard import GuardedProcess

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.25
READY_TIMEOUT_S = 30.0


def gateway_settings(config: GatewayConfig, redis_url: str, admin_token: str) -> list[GatewaySettings]:
    """What each worker of a config is told to do."""
    return [
        GatewaySettings(
            host=config.host,
            port=config.port,
            admin_port=admin_port,
            redis_url=redis_url,
            request_timeout_s=config.request_timeout_s,
            max_body_bytes=config.max_body_bytes,
            body_timeout_s=config.body_timeout_s,
            store_timeout_s=config.redis_timeout_ms / 1000,
            drain_s=config.drain_s,
            drain_delay_s=config.drain_delay_s,
            admin_token=admin_token,
        )
        for admin_port in config.admin_ports()
    ]


class GatewayError(RuntimeError):
    """A gateway worker that does not come up; the message carries the end of its log."""


class GatewayWorkers:
    """``workers`` gateway processes that share the data port; worker i has admin port ``admin_port`` + i."""

    def __init__(self, workers: Sequence[GatewaySettings], log_dir: Path) -> None:
        self._settings = tuple(workers)
        self._log_dir = log_dir
        self._workers: dict[int, GuardedProcess] = {}
        self._exited: set[int] = set()
        self._backoffs: defaultdict[int, Backoff] = defaultdict(Backoff)

    @property
    def url(self) -> str:
        """Where callers reach the gateway."""
        return _url(self._settings[0].host, self._settings[0].port)

    @property
    def admin_url(self) -> str:
        """The first worker's metrics and administration."""
        return _url(self._settings[0].host, self._settings[0].admin_port)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers and their guards."""
        return [pid for worker in self._workers.values() for pid in (worker.pid, worker.guard_pid)]

    def start(self) -> None:
        """Start every worker; ``wait_ready`` tells when they serve."""
        for index in range(len(self._settings)):
            self._start(index)

    async def wait_ready(self) -> None:
        """Wait until every worker can serve. Raises ``GatewayError``."""
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

    async def stop(self) -> None:
        """Stop every worker, once its open streams have ended or had their time, and what they used is settled."""
        await asyncio.gather(
            *(worker.stop(self._settings[index].longest_end_s) for index, worker in self._workers.items())
        )

    def _start(self, index: int) -> None:
        argv = [sys.executable, "-m", "ratelimit.gateway"]
        settings = msgspec.structs.replace(self._settings[index], gateway_id=new_gateway_id())
        env = os.environ | {SETTINGS_VARIABLE: msgspec.json.encode(settings).decode()}
        self._exited.discard(index)
        self._backoffs[index].started(monotonic())
        self._workers[index] = GuardedProcess.start(argv, log_path=self._log_dir / f"gateway-{index}.log", env=env)

    async def _is_ready(self, session: aiohttp.ClientSession, index: int) -> bool:
        settings = self._settings[index]
        url = _url(settings.host, settings.admin_port) + "/health"
        try:
            async with session.get(url) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False


def _url(host: str, port: int) -> str:
    """Where a server that listens on ``host`` is reached from this machine."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - translated, not bound
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
