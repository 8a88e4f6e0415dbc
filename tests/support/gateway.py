"""Real gateway processes for tests, and the publications that they enforce."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import httpx
import msgspec
from redis.asyncio import Redis

from ratelimit.gateway.server import GatewayStartError, run_gateway
from ratelimit.gateway.settings import GatewaySettings
from ratelimit.keys import KeyRecord, new_key
from ratelimit.policy import OrgPolicy
from ratelimit.publication import (
    Holds,
    Limit,
    LimitName,
    LimitRule,
    Publication,
    PublishedPool,
    PublishedReplica,
    TierLimits,
)
from ratelimit.publisher import CHANGED_CHANNEL, KEYS_KEY, PUBLICATION_KEY
from serving.capacity import EngineLimits, ReplicaGroup, Slo, StepTimeModel
from tests.support.stack import free_ports
from tests.support.waiting import eventually

MODEL = "tiny"
MAX_MODEL_LEN = 4096
#: Per minute and burst; 0 a minute is a gauge. The rates are so slow that what a test uses stays readable.
AMPLE: dict[LimitName, tuple[int, int]] = {
    "requests": (1, 50_000),
    "input_tokens": (1, 5_000_000),
    "output_tokens": (1, 5_000_000),
    "concurrency": (0, 1_000),
}


def group(count: int = 1) -> ReplicaGroup:
    """Replicas with plain round numbers."""
    step_time = StepTimeModel(base_s=0.005, prompt_token_s=1e-5, sequence_s=1e-4, kv_token_s=1e-8)
    limits = EngineLimits(max_num_seqs=256, max_num_batched_tokens=8192, kv_tokens=400_000, max_model_len=MAX_MODEL_LEN)
    return ReplicaGroup(count, step_time, limits, Slo(ttft_s=1.0, tpot_s=0.05))


def publication(
    urls: Sequence[str],
    epoch: int = 1,
    enforce: bool = True,
    pool_budget: tuple[int, int] = (10**12, 10**11),
    default_max_output: int = 64,
    *,
    ceilings: Mapping[LimitName, tuple[int, int]] | None = None,
    priority: int = 0,
    borrow_up_to: int = 0,
    assured: bool = True,
    holds: Holds = "maximum",
    shadow: bool = False,
    rules: Sequence[LimitRule] = (),
    shadow_keys: Sequence[str] = (),
    priority_scheduling: bool = False,
    **limits: tuple[int, int],
) -> Publication:
    """One pool behind ``urls``, the org "acme", and the tier "pro": ample limits but for the (rate, burst) given.

    The tier borrows nothing and holds the maximum unless told otherwise; ``ceilings`` are (rate, burst) too.
    """
    found = ceilings or {}
    terms = tuple(
        Limit(
            name,
            *limits.get(name, ample),
            f"why {name}",
            ceiling_per_minute=found.get(name, (0, 0))[0],
            ceiling_burst=found.get(name, (0, 0))[1],
        )
        for name, ample in AMPLE.items()
    )
    pool = PublishedPool(
        model=MODEL,
        replicas=tuple(PublishedReplica(url, "virtual", "test", 1.0, 10.0) for url in urls),
        groups=tuple(group() for _ in urls),
        max_model_len=MAX_MODEL_LEN,
        tokens_per_byte=0.25,
        default_max_output=default_max_output,
        budget_per_minute=pool_budget[0],
        budget_burst=pool_budget[1],
        usable_requests_per_s=10.0,
        usable_input_tokens_per_s=1000.0,
        usable_output_tokens_per_s=500.0,
        explanation="test",
        priority_scheduling=priority_scheduling,
    )
    tier = TierLimits("pro", MODEL, 1, terms, priority, borrow_up_to, assured, holds, shadow)
    orgs = (OrgPolicy("acme"),)
    return Publication(
        epoch, "2026-01-01T00:00:00Z", "test", enforce, (pool,), (tier,), orgs, tuple(rules), tuple(shadow_keys)
    )


def make_key(expires_at: float | None = None, tier: str = "pro") -> tuple[str, KeyRecord]:
    """A secret and its record."""
    return new_key("acme", tier, "test", created_at=0.0, expires_at=expires_at)


def gateway_settings(redis_url: str) -> GatewaySettings:
    """Free ports and small bounds, with patience for a busy machine."""
    port, admin_port = free_ports(2)
    return GatewaySettings(
        redis_url=redis_url,
        port=port,
        admin_port=admin_port,
        request_timeout_s=20,
        first_byte_timeout_s=20,
        chunk_timeout_s=20,
        store_timeout_s=5,
        body_timeout_s=2,
        max_body_bytes=1024 * 1024,
        drain_s=5,
    )


class GatewayProcess:
    """One gateway in a process of its own. Use as a context manager."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.url = f"http://{settings.host}:{settings.port}"
        self.admin_url = f"http://{settings.host}:{settings.admin_port}"

    def __enter__(self) -> GatewayProcess:
        # A file, since nobody reads a pipe while the tests run.
        self._log = tempfile.TemporaryFile("w+")
        argv = [sys.executable, "-m", "tests.support.gateway", msgspec.json.encode(self.settings).decode()]
        self.process = subprocess.Popen(argv, stdout=self._log, stderr=self._log)
        eventually(self._serves, 20, "the gateway's start")
        return self

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the gateway exited with {self.process.returncode}: {self.log()}")
        try:
            return httpx.get(self.admin_url + "/health", timeout=5).status_code in (200, 503)
        except httpx.TransportError:
            return False

    def log(self) -> str:
        """All that it has printed."""
        self._log.seek(0)
        return self._log.read()

    def epoch(self) -> int:
        """The epoch of the limits in force; 0 before the first."""
        response = httpx.get(self.admin_url + "/limits", timeout=5)
        return int(response.json()["epoch"]) if response.status_code == 200 else 0

    def metrics(self) -> str:
        """The metrics' exposition."""
        return httpx.get(self.admin_url + "/metrics", timeout=5).text

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait for its end; the exit status."""
        self.process.send_signal(signum)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()

    def __exit__(self, *_: object) -> None:
        try:
            if self.process.poll() is None:
                self.stop()
        finally:
            self._log.close()


async def publish(redis: Redis, published: Publication, *records: KeyRecord) -> None:
    """Put a publication and keys where gateways read them."""
    await redis.set(PUBLICATION_KEY, msgspec.json.encode(published))
    for record in records:
        await redis.hset(KEYS_KEY, record.digest, msgspec.json.encode(record).decode())
    await redis.publish(CHANGED_CHANNEL, "publication")


def main(settings: str) -> None:
    """Run a gateway as ``penstock gateway`` does."""
    try:
        run_gateway(msgspec.json.decode(settings.encode(), type=GatewaySettings))
    except GatewayStartError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1])
