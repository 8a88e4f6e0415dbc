"""A scenario's own ``penstock up``: started from a config we write, changed by editing it, always stopped."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from string import Template
from typing import TypeVar

import aiohttp
import msgspec

from ratelimit.keys import KeyFile
from ratelimit.publication import Publication
from serving.engine.guard import GuardedProcess

MODEL = "llama-3.1-8b"
ORG = "demo"
_START_TIMEOUT_S = 180.0
_STOP_GRACE_S = 25.0
_POLL_S = 0.1
#: The engines, the load and Redis share a machine here: a slow answer is no fault that a scenario is about.
_REDIS_TIMEOUT_MS = 5000
_REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=30)
_IN_ENGINE = ("vllm:num_requests_running", "vllm:num_requests_waiting{")


T = TypeVar("T")


class StackError(RuntimeError):
    """The stack did not do what the scenario needs in time; says what and shows its log."""


class _NotYetError(Exception):
    """What a probe is still waiting for."""


class StackSettings(msgspec.Struct, frozen=True):
    """The parts of the config that a scenario decides once.

    Every tier's ceiling is its share and every hold the maximum: callers who never borrow are throttled by their own
    limits alone, and nothing is learned while a load runs, so that what is admitted can be foretold request by request.
    """

    profile: str
    slowdown: float
    mix_scale: float
    ttft_ms: float
    tpot_ms: float
    percentile: float
    burst_s: float
    tier_shares: tuple[tuple[str, float], ...]
    most_replicas: int


class _Ready(msgspec.Struct):
    url: str
    admin_url: str
    admin_token_file: str
    key: str
    tier: str


class _OwnLimit(msgspec.Struct):
    name: str
    burst: int
    remaining: int


class _OwnLimits(msgspec.Struct):
    limits: list[_OwnLimit]


_CONFIG = Template(
    """\
state_dir: state
redis: embedded
gateway: {port: $port, admin_port: $admin_port, enforce: $enforce, redis_timeout_ms: $redis_timeout_ms}
pools:
  - model: $model
    slo: {ttft_ms: $ttft_ms, tpot_ms: $tpot_ms, percentile: $percentile}
    mix: {name: chat, scale: $mix_scale}
    raise_after_s: 2
    stuck_after_s: 10
    engines: [{device: virtual, profile: $profile, count: $count, slowdown: $slowdown, port: $engine_port}]
tiers:
$tiers
orgs:
  - {name: $org}
"""
)


class Stack:
    """The running stack. ``secrets`` and ``tier_of_key`` are its callers', by a name that does not change by run."""

    def __init__(self, settings: StackSettings, workdir: Path) -> None:
        self._settings = settings
        self._config_path = workdir / "penstock.yaml"
        self._keys = KeyFile(workdir / "state")
        self._log_path = workdir / "up.log"
        self._ports = free_ports(2 + settings.most_replicas)
        self._process: GuardedProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._ready = _Ready("", "", "", "", "")
        self.secrets: dict[str, str] = {}
        self.tier_of_key: dict[str, str] = {}

    @property
    def url(self) -> str:
        """The gateway's data port."""
        return self._ready.url

    async def start(self, keys_by_tier: Mapping[str, int]) -> None:
        """Bring it up with one replica, limits not enforced, and that many keys; the demo key is one of them."""
        first_tier = self._settings.tier_shares[0][0]
        self.write_config(count=1, enforce=False)
        for tier, count in keys_by_tier.items():
            for number in range(2 if tier == first_tier else 1, count + 1):
                self._adopt_key(f"{tier}-{number}", tier)
        argv = [sys.executable, "-m", "ratelimit.cli", "up", "--config", str(self._config_path), "--json"]
        self._process = GuardedProcess.start(argv, log_path=self._log_path)
        self._session = aiohttp.ClientSession(timeout=_REQUEST_TIMEOUT)
        self._ready = await self._until(self._read_ready, _START_TIMEOUT_S, "come up")
        self.secrets[f"{first_tier}-1"] = self._ready.key
        self.tier_of_key[f"{first_tier}-1"] = self._ready.tier

    async def stop(self) -> None:
        """Stop everything that was started; idempotent."""
        if self._session is not None:
            await self._session.close()
        if self._process is not None:
            await self._process.stop(_STOP_GRACE_S)

    def write_config(self, count: int, enforce: bool) -> None:
        """Replace the config file in one step; the running stack takes it up."""
        settings = self._settings
        tiers = "\n".join(
            f"  - {{name: {name}, share: {share}, ceiling: {share}, holds: maximum, priority: {priority}, "
            f"burst_s: {settings.burst_s}}}"
            for priority, (name, share) in enumerate(settings.tier_shares)
        )
        fields = {**msgspec.structs.asdict(settings), "tiers": tiers, "model": MODEL, "org": ORG, "count": count}
        port, admin_port, engine_port = self._ports[:3]
        text = _CONFIG.substitute(
            fields,
            port=port,
            admin_port=admin_port,
            engine_port=engine_port,
            enforce=str(enforce).lower(),
            redis_timeout_ms=_REDIS_TIMEOUT_MS,
        )
        draft = self._config_path.with_suffix(".new")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self._config_path)

    async def published(self, replicas: int, enforce: bool, timeout_s: float = 120) -> Publication:
        """The limits in force, once they are those of that many replicas."""

        async def read() -> Publication:
            limits = await self._get(f"{self._ready.admin_url}/limits", self._admin_headers())
            publication = msgspec.json.decode(limits, type=Publication)
            pool = publication.pool(MODEL)
            count = len(pool.replicas) if pool else 0
            if count != replicas or publication.enforce != enforce or not self._counts_keys(publication):
                raise _NotYetError(f"epoch {publication.epoch} has {count} replicas, enforce {publication.enforce}")
            return publication

        return await self._until(read, timeout_s, f"publish the limits of {replicas} replicas")

    async def drained(self, publication: Publication, timeout_s: float = 120) -> None:
        """Wait until no engine has a request and every key's meters are empty."""
        pool = publication.pool(MODEL)
        urls = [replica.url for replica in pool.replicas] if pool else []

        async def is_idle() -> None:
            for url in urls:
                if held := requests_in_engine(await self._get(f"{url}/metrics")):
                    raise _NotYetError(f"{url} has {held:.0f} requests")
            await self._check_meters_are_empty()

        await self._until(is_idle, timeout_s, "drain")

    async def ask(self, body: bytes) -> bytes:
        """One chat completion that is not part of any load, with the demo key. Raises ``StackError``."""
        if self._session is None:
            raise StackError("the stack has not been started")
        headers = {"Authorization": f"Bearer {self._ready.key}", "Content-Type": "application/json"}
        async with self._session.post(f"{self.url}/v1/chat/completions", data=body, headers=headers) as response:
            answer = await response.read()
            if response.status != 200:
                raise StackError(f"a single request got status {response.status}: {answer[:300]!r}")
            return answer

    def log_tail(self) -> str:
        """The last lines that ``penstock up`` wrote."""
        return self._process.log_tail(30) if self._process else ""

    def _adopt_key(self, name: str, tier: str) -> None:
        self.secrets[name], _ = self._keys.create(org=ORG, tier=tier, name=name)
        self.tier_of_key[name] = tier

    def _counts_keys(self, publication: Publication) -> bool:
        tiers = list(self.tier_of_key.values())
        return all(tier.active_keys == tiers.count(tier.tier) for tier in publication.tiers)

    async def _read_ready(self) -> _Ready:
        with self._log_path.open("rb") as log:
            line = next((line for line in log if line.startswith(b'{"url"') and line.endswith(b"\n")), None)
        if line is None:
            raise _NotYetError("it has not printed its URL")
        return msgspec.json.decode(line, type=_Ready)

    async def _check_meters_are_empty(self) -> None:
        for key, secret in self.secrets.items():
            body = await self._get(f"{self.url}/v1/limits", {"Authorization": f"Bearer {secret}"})
            for limit in msgspec.json.decode(body, type=_OwnLimits).limits:
                if limit.remaining < limit.burst:
                    raise _NotYetError(f"{key} has {limit.remaining} of {limit.burst} {limit.name} left")

    def _admin_headers(self) -> dict[str, str]:
        token = Path(self._ready.admin_token_file).read_text(encoding="ascii").strip()
        return {"Authorization": f"Bearer {token}"}

    async def _get(self, url: str, headers: Mapping[str, str] | None = None) -> bytes:
        if self._session is None:
            raise StackError("the stack has not been started")
        async with self._session.get(url, headers=headers) as response:
            response.raise_for_status()
            return await response.read()

    async def _until(self, probe: Callable[[], Awaitable[T]], timeout_s: float, what: str) -> T:
        """The answer of ``probe`` once it has one."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        waiting_for: Exception | None = None
        while asyncio.get_running_loop().time() < deadline:
            if self._process is not None and (status := self._process.poll()) is not None:
                raise StackError(f"penstock up ended with status {status}:\n{self.log_tail()}")
            try:
                return await probe()
            except (_NotYetError, aiohttp.ClientError, TimeoutError) as error:  # told if it is the last
                waiting_for = error
            await asyncio.sleep(_POLL_S)
        raise StackError(f"the stack did not {what} within {timeout_s:.0f} s: {waiting_for}\n{self.log_tail()}")


def requests_in_engine(metrics: bytes) -> float:
    """Requests that run or wait in a vLLM, from its ``/metrics``."""
    lines = metrics.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(_IN_ENGINE))


def free_ports(count: int, first: int = 18_000) -> list[int]:
    """Neighbouring ports of 127.0.0.1, from ``first`` on, that are free right now. Raises ``StackError``."""
    for base in range(first, 60_000, 2 * count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", base + offset))
        except OSError:
            continue
        else:
            return [base + offset for offset in range(count)]
        finally:
            for probe in probes:
                probe.close()
    raise StackError(f"there are no {count} neighbouring free ports on 127.0.0.1")
