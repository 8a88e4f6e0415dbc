"""The fleet: probes every replica, and tells when one comes, goes or gets stuck."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from random import uniform
from time import monotonic

import aiohttp
import msgspec

from serving.health import SILENT_PROBES_ALLOWED, Observation, ReplicaHealth, found_again, lost, observe
from serving.signals import Counters, read_counters

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 2.0
#: Probes at a time. All of them share one core with the rounds, and what they wait for each other counts against their
#: timeout, so it must stay far below that: some 0.2 s. Those of replicas that were silent or down have as many places
#: of their own, so that a rack which hangs does not hold up the probes of all others.
MOST_PROBES = 128
#: More than any server's metrics; vLLM's are some 100 kB.
MOST_ANSWER_BYTES = 4 << 20
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

    Raises ``ValueError`` where a line has no number.

    vLLM exposes some 100 kB, mostly histograms, and every replica is read each probe: the lines wanted are picked
    by their beginning, which is some 50 times cheaper than parsing the whole exposition.
    """
    prefixes = tuple(f"{name}{sep}" for name in names for sep in ("{", " "))
    return sum(float(line.rpartition(" ")[2]) for line in exposition.splitlines() if line.startswith(prefixes))


class _Load(msgspec.Struct):
    server_load: float | None = None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises ``ValueError`` where it is longer than any answer to a probe."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MOST_ANSWER_BYTES:
            raise ValueError(f"{response.url.path} answers more than {MOST_ANSWER_BYTES} bytes")
    return bytes(body)


def open_all_files() -> None:
    """Let this process open as many files as it may: each replica that is probed has a connection.

    The usual soft limit is 1,024; beyond it every other replica would look as if it refused.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
        self._places, self._places_of_silent = asyncio.Semaphore(MOST_PROBES), asyncio.Semaphore(MOST_PROBES)
        #: Probes that ended in a way nobody foresaw, by the type of the exception.
        self.unforeseen: Counter[str] = Counter()
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
                self._probed[url] = probed = asyncio.Event()
                self._tasks[url] = asyncio.create_task(self._probe_forever(url, probed), name=f"probe {url}")

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
        """Wait until every watched replica has answered or refused a probe, or was silent as often as makes it down.

        Until then a fleet that has just begun to watch would look smaller than it is. Each probe is bounded in time.
        """
        await asyncio.gather(*(probed.wait() for probed in self._probed.values()))

    def statuses(self) -> Mapping[str, ReplicaStatus]:
        """Every watched replica by URL."""
        return dict(self._statuses)

    def counters(self) -> Mapping[str, Counters]:
        """The newest reading of every watched replica that was ever read, by URL; it says how old it is."""
        return dict(self._counters)

    async def _probe_forever(self, url: str, probed: asyncio.Event) -> None:
        try:
            while True:
                before = self._statuses[url].health
                async with self._place(before):
                    seen = await self._probe(url)
                self._note(url, seen)
                if seen.answer != "silent" or before.silent_probes >= SILENT_PROBES_ALLOWED:
                    probed.set()
                # Jittered, so that those that were added together are not probed together for ever.
                await asyncio.sleep(PROBE_INTERVAL_S * uniform(0.9, 1.1))  # noqa: S311
        finally:
            probed.set()

    def _place(self, health: ReplicaHealth) -> asyncio.Semaphore:
        is_silent = health.silent_probes > 0 or health.phase == "down"
        return self._places_of_silent if is_silent else self._places

    def _note(self, url: str, seen: Observation) -> None:
        status = self._statuses[url]
        health = observe(status.health, seen, status.spec.stuck_after_s)
        self._statuses[url] = ReplicaStatus(status.spec, health)
        if health.phase != status.health.phase:
            self.version += 1
            _log_change(status, health)
            self._on_change(self._statuses[url])

    async def _probe(self, url: str) -> Observation:
        """One look at a replica. An answer that nobody can make sense of is none: it counts as refused."""
        try:
            return await self._look_at(url)
        except TimeoutError:
            return Observation(monotonic(), "silent")
        except (aiohttp.ClientError, OSError, ValueError):
            pass
        except Exception as error:
            # Of no replica may the probes end, or it would keep its health for ever.
            kind = type(error).__name__
            if not self.unforeseen[kind]:
                log.exception("a probe of %s failed by %s; it counts as refused, as all like it do", url, kind)
            self.unforeseen[kind] += 1
        return Observation(monotonic(), "refused")

    async def _look_at(self, url: str) -> Observation:
        """Ask a replica for its health, its metrics and its load. Any error of the session or of reading passes."""
        async with self._session.get(f"{url}/health") as response:
            if response.status != 200:
                return Observation(monotonic(), "refused")
        async with self._session.get(f"{url}/metrics") as response:
            exposition = (await _read(response)).decode(errors="replace")
        held, progress = sum_metrics(exposition, HELD_METRICS), sum_metrics(exposition, PROGRESS_METRICS)
        self._read_counters(url, exposition)
        held = max(held, await self._server_load(url))
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
            return msgspec.json.decode(await _read(response), type=_Load).server_load or 0.0
