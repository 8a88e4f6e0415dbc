"""An installation as on a cluster: controllers and gateways, each a process of its own, on one Redis and one folder.

Every process has a config file of its own, for its ports; all say the same of pools and tiers. The replicas are the
test's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from redis.asyncio import Redis

from ratelimit.admintoken import admin_token
from ratelimit.keys import KeyFile
from ratelimit.leadership import LEADER_KEY
from ratelimit.usage import LedgerLine
from ratelimit.usagefiles import UsageFiles
from tests.support.stack import PENSTOCK, free_ports, metric
from tests.support.waiting import eventually_async

MODEL = "llama-3.1-8b"
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0
END_TIMEOUT_S = 40.0
#: A takeover: the lease, an asking, the probes of the fleet and its knee, on a machine that does other things too.
TAKEOVER_TIMEOUT_S = 40.0
DRAIN_S = 3.0

#: In the year 3000.
_FOR_EVER_MS = 32_503_680_000_000

_CONFIG = """\
state_dir: {folder}/state
redis: {redis}
gateway: {{port: {port}, admin_port: {admin_port}, redis_timeout_ms: 5000, drain_s: {drain_s}}}
controller: {{metrics_port: {metrics_port}}}
pools:
  - model: {model}
    mix: {{name: chat, scale: 0.125}}
    default_max_output: 64
    raise_after_s: 0.5
    replicas: [{replicas}]
tiers:
  - {{name: pro, share: 0.9, burst_s: 60}}
orgs:
  - {{name: acme}}
"""
_REPLICA = "{{url: '{url}', profile: h100-llama-3.1-8b}}"


class Process:
    """One process of ``penstock``; ``probe_url`` is its port for probes, ``environment`` is set before its start."""

    def __init__(self, kind: str, config: Path, probe_url: str, http: httpx.AsyncClient) -> None:
        self.config = config
        self._http = http
        self.probe_url = probe_url
        self.environment: dict[str, str] = {}
        self._kind = kind
        self._log = config.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it was started and runs no more."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start it, anew after it has ended; its log goes on."""
        with self._log.open("ab") as log:
            argv = [*PENSTOCK, self._kind, "--config", str(self.config)]
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment | self.environment)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal and wait for its end; its exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self.send(number)
        return await asyncio.to_thread(self._process.wait, END_TIMEOUT_S)

    async def kill(self) -> None:
        """Have it gone, also where it was stopped or never started."""
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait, END_TIMEOUT_S)

    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text()

    async def probe(self, path: str = "/health") -> int:
        """The status of a probe; 0 where nobody answers."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"{self.config.stem} ended with {self._process.returncode}:\n{self.log()}")
        try:
            return (await self._http.get(self.probe_url + path)).status_code
        except httpx.TransportError:
            return 0

    async def until_ready(self) -> None:
        """Wait until its probe says that it is ready."""
        try:
            await eventually_async(self._is_ready, START_TIMEOUT_S, f"the readiness of {self.config.stem}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    async def _is_ready(self) -> bool:
        return await self.probe() == 200


class Controller(Process):
    """A controller, on its metrics port."""

    def __init__(self, config: Path, port: int, http: httpx.AsyncClient) -> None:
        super().__init__("controller", config, f"http://127.0.0.1:{port}", http)

    async def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        return metric((await self._http.get(self.probe_url + "/metrics")).text, name)


class Gateway(Process):
    """A gateway, on its own data port."""

    def __init__(self, config: Path, ports: Sequence[int], token: str, http: httpx.AsyncClient) -> None:
        super().__init__("gateway", config, f"http://127.0.0.1:{ports[1]}", http)
        self.url = f"http://127.0.0.1:{ports[0]}"
        self._token = token

    async def publication(self) -> Any:
        """The limits in force here."""
        headers = {"authorization": f"Bearer {self._token}"}
        return (await self._http.get(self.probe_url + "/limits", headers=headers)).json()

    async def limits(self, secret: str) -> dict[str, dict[str, Any]]:
        """The key's own limits, by name."""
        headers = {"authorization": f"Bearer {secret}"}
        limits = (await self._http.get(self.url + "/v1/limits", headers=headers)).json()["limits"]
        return {limit["name"]: limit for limit in limits}


class Installation:
    """Controllers and gateways that run while its block does; ``secret`` is a key's."""

    def __init__(
        self, folder: Path, redis_url: str, replicas: Sequence[str], controllers: int = 2, gateways: int = 3
    ) -> None:
        self._folder = folder
        self._redis_url = redis_url
        self._state_dir = state_dir = folder / "state"
        self._ports = free_ports(3 * (controllers + gateways))
        configs = [folder / f"controller-{n}.yaml" for n in range(controllers)]
        configs += [folder / f"gateway-{n}.yaml" for n in range(gateways)]
        self._configs = configs
        self.serve_by(replicas)
        self.secret = KeyFile(state_dir).replace_demo("acme", "pro", 86_400.0)
        token = admin_token(state_dir, None)
        self._http = httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S)
        ports = [self._ports[at : at + 3] for at in range(0, len(self._ports), 3)]
        self.controllers = [Controller(configs[n], ports[n][2], self._http) for n in range(controllers)]
        self.gateways = [
            Gateway(configs[n], ports[n][:2], token, self._http) for n in range(controllers, controllers + gateways)
        ]

    def serve_by(self, replicas: Sequence[str]) -> None:
        """Have these replicas in every config from now on."""
        listed = ", ".join(_REPLICA.format(url=url) for url in replicas)
        for config, ports in zip(self._configs, zip(*[iter(self._ports)] * 3, strict=True), strict=True):
            text = _CONFIG.format(
                folder=self._folder, redis=self._redis_url, port=ports[0], admin_port=ports[1], metrics_port=ports[2],
                model=MODEL, replicas=listed, drain_s=DRAIN_S,
            )  # fmt: skip
            fresh = config.with_suffix(".new")
            fresh.write_text(text)
            fresh.replace(config)

    @property
    def processes(self) -> list[Process]:
        """All of them, controllers first."""
        return [*self.controllers, *self.gateways]

    async def __aenter__(self) -> Installation:
        self.redis = Redis.from_url(self._redis_url)
        try:
            for process in self.processes:
                process.start()
            for process in self.processes:
                await process.until_ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            await process.kill()
        await self.redis.aclose()
        await self._http.aclose()

    async def leader(self) -> Controller | None:
        """The controller that holds the lease in Redis; none where nobody does, or a process that has ended."""
        held = await self.redis.get(LEADER_KEY)
        pid = int(held.split(b":")[-2]) if isinstance(held, bytes) else 0
        return next((each for each in self.controllers if each.pid == pid), None)

    async def until_led(self, by: Controller | None = None) -> Controller:
        """Wait until a controller, or this one, leads and its round was good."""

        async def led() -> Controller | None:
            leader = await self.leader()
            is_it = leader is not None and (by is None or leader is by)
            return leader if is_it and leader is not None and await leader.metric("penstock_epoch") > 0 else None

        found = await eventually_async(led, TAKEOVER_TIMEOUT_S, "the lead of a controller")
        assert found is not None
        return found

    def ledger(self) -> list[LedgerLine]:
        """Every usage record that has reached the day files."""
        return list(UsageFiles(self._state_dir).lines(0, _FOR_EVER_MS))

    def standby(self, leader: Controller) -> Controller:
        """One that does not lead."""
        return next(each for each in self.controllers if each is not leader)
