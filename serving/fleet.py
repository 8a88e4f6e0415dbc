"""The fleet: probes every replica, and tells when one comes, goes or gets stuck."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from time import monotonic

import aiohttp
import msgspec

from serving.health import Observation, ReplicaHealth, found_again, lost, observe
from serving.signals import Counters, read_counters

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 2.0
#: Replicas watched no longer whose losses are remembered, those lost last.
MOST_LOST_KEPT = 10_000
#: How often a replica's counters are read out of what its probes fetch.
COUNTERS_INTERVAL_S = 5.0

#: The gauges whose sum is the work a replica holds.
HELD_METRICS = ("vllm:num_requests_running", "vllm:num_requests_waiting")
#: What changes when an engine step ends. The token counters, iteration_tokens_total too, move only with a request's
#: output, so the chunks of a long prompt show in none of them; but each chunk takes KV blocks, and vLLM reports the
#: share in use after every step, with outputs or without (AsyncLLM's output handler, vLLM 0.32).
PROGRESS_METRICS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc")


class ReplicaSpec(msgspec.Struct, frozen=True):
    """One vLLM server to watch: where it is, what it serves, on what, by which profile, and how it is slowed.

    It is stuck after ``stuck_after_s`` with work and without progress. ``domain`` labels what it fails together with.
    """

    url: str
    model: str
    gpu: str
    profile: str
    slowdown: float = 1.0
    stuck_after_s: float = 5.0
    domain: str | None = None


def is_same_engine(one: ReplicaSpec, other: ReplicaSpec) -> bool:
    """Whether both tell of the same server, though how it is watched, or what it fails together with, may differ."""
    return one == msgspec.structs.replace(other, stuck_after_s=one.stuck_after_s, domain=one.domain)


class ReplicaStatus(msgspec.Struct, frozen=True):
    """A watched replica and its health."""

    spec: ReplicaSpec
    health: ReplicaHealth


def sum_metrics(exposition: str, names: Iterable[str]) -> float:
    """The sum over all label sets of the named metrics in a Prometheus text exposition; 0 where none is found.

    vLLM exposes some 100 kB, mostly histograms, and every replica is read each probe: the lines wanted are picked
    by their beginning, which is some 50 times cheaper than parsing the whole exposition.
    """
    prefixes = tuple(f"{name}{sep}" for name in names for sep in ("{", " "))
    return sum(float(line.rsplit(" ", 1)[1]) for line in exposition.splitlines() if line.startswith(prefixes))


def probe_session() -> aiohttp.ClientSession:
    """A client for probes: bounded in time, and in connections a replica, so that hanging probes do not pile up."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=2),
    )


def _log_change(status: ReplicaStatus, health: ReplicaHealth) -> None:
    spec = status.spec
    why = f", no step ended for {spec.stuck_after_s:.3g} s" if health.phase == "stuck" else ""
    log.warning("replica %s (%s): %s -> %s%s", spec.url, spec.gpu, status.health.phase, health.phase, why)


class Fleet:
    """Watches a set of replicas; ``on_change`` is called whenever one's phase changes. ``watch(())`` ends it."""

    def __init__(self, session: aiohttp.ClientSession, on_change: Callable[[ReplicaStatus], None]) -> None:
        self._session = session
        self._on_change = on_change
        self._statuses: dict[str, ReplicaStatus] = {}
        self._lost: dict[str, ReplicaStatus] = {}
        self._counters: dict[str, Counters] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._probed: dict[str, asyncio.Event] = {}
        #: Another number whenever the replicas watched, or the phase of one, are others than before.
        self.version = 0

    def watch(self, specs: Iterable[ReplicaSpec]) -> None:
        """Watch exactly these replicas from now on.

        Those already watched keep their health, unless another engine is to be at their URL: then nothing is known.
        """
        self.version += 1
        wanted = {spec.url: spec for spec in specs}
        replaced = {url for url, spec in wanted.items() if self._is_replaced(spec)}
        for url in (self._tasks.keys() - wanted.keys()) | replaced:
            self._tasks.pop(url).cancel()
            self._lose(self._statuses.pop(url))
            self._counters.pop(url, None)
            self._probed.pop(url).set()
        for url, spec in wanted.items():
            known = self._statuses.get(url)
            self._statuses[url] = ReplicaStatus(spec, known.health if known else self._new_health(spec))
            if url not in self._tasks:
                self._probed[url] = asyncio.Event()
                self._tasks[url] = asyncio.create_task(self._probe_forever(url), name=f"probe {url}")

    def _lose(self, status: ReplicaStatus) -> None:
        """Keep how often it was lost: whoever is taken off and put back again and again flaps."""
        self._lost.pop(status.spec.url, None)
        self._lost[status.spec.url] = ReplicaStatus(status.spec, lost(status.health, monotonic()))
        if len(self._lost) > MOST_LOST_KEPT:
            del self._lost[next(iter(self._lost))]

    def _new_health(self, spec: ReplicaSpec) -> ReplicaHealth:
        before = self._lost.pop(spec.url, None)
        if before is None or not is_same_engine(before.spec, spec):
            return ReplicaHealth(since_s=monotonic())
        return found_again(before.health, monotonic())

    def _is_replaced(self, spec: ReplicaSpec) -> bool:
        """Whether another engine is watched at this URL."""
        known = self._statuses.get(spec.url)
        return known is not None and not is_same_engine(known.spec, spec)

    async def probed_once(self) -> None:
        """Wait until every watched replica has been probed; each probe is bounded in time.

        Until then a fleet that has just begun to watch would look smaller than it is.
        """
        await asyncio.gather(*(probed.wait() for probed in self._probed.values()))

    def statuses(self) -> Mapping[str, ReplicaStatus]:
        """Every watched replica by URL."""
        return dict(self._statuses)

    def counters(self) -> Mapping[str, Counters]:
        """The newest reading of every watched replica that was ever read, by URL; it says how old it is."""
        return dict(self._counters)

    async def _probe_forever(self, url: str) -> None:
        while True:
            seen = await self._probe(url)
            status = self._statuses[url]
            health = observe(status.health, seen, status.spec.stuck_after_s)
            self._statuses[url] = ReplicaStatus(status.spec, health)
            self._probed[url].set()
            if health.phase != status.health.phase:
                self.version += 1
                _log_change(status, health)
                self._on_change(self._statuses[url])
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def _probe(self, url: str) -> Observation:
        try:
            async with self._session.get(f"{url}/health") as response:
                if response.status != 200:
                    return Observation(monotonic(), "refused")
            async with self._session.get(f"{url}/metrics") as response:
                exposition = await response.text()
            held, progress = sum_metrics(exposition, HELD_METRICS), sum_metrics(exposition, PROGRESS_METRICS)
            self._read_counters(url, exposition)
            held = max(held, await self._server_load(url))
        except TimeoutError:
            return Observation(monotonic(), "silent")
        except (aiohttp.ClientError, OSError, ValueError):
            return Observation(monotonic(), "refused")
        return Observation(monotonic(), "healthy", held, progress)

    def _read_counters(self, url: str, exposition: str) -> None:
        last, now_s = self._counters.get(url), monotonic()
        if last is not None and now_s - last.at_s < COUNTERS_INTERVAL_S:
            return
        counters = read_counters(exposition, now_s)
        if counters is not None and url in self._statuses:
            self._counters[url] = counters

    async def _server_load(self, url: str) -> float:
        """Requests the API server holds; it counts those that a frozen engine has not yet taken up.

        0 where the server does not track its load (``--enable-server-load-tracking``).
        """
        async with self._session.get(f"{url}/load") as response:
            if response.status != 200:
                return 0.0
            body = msgspec.json.decode(await response.read())
        load = body.get("server_load", 0) if isinstance(body, dict) else 0
        return float(load or 0)
