"""Follows EndpointSlices in Kubernetes: lists them, watches from there, and lists anew now and then.

One task follows each listing, for ever. A cycle is a paged list, then watches from its version; a watch that ends in
order is taken up at the newest version heard of, which bookmarks bring even where nothing changes. After ``RESYNC_S``
the next cycle lists again, so that an event that was lost is mended. Whatever goes wrong (410 Gone, a connection cut,
an API server that is away or says no) ends the cycle, and the next begins after a jittered wait that doubles up to a
bound. Until it has listed, the last known slices stay as they are: an API server that is away changes nothing.

Answers are read by msgspec from the official client's raw responses: its own ``Watch`` builds models of a hundred times
the size, retries by itself, and cannot be told when to give up. Each cycle has a client of its own, so credentials that
were renewed on disk are read within ``RESYNC_S``. Every wait here is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib import import_module
from pathlib import Path
from random import uniform
from time import monotonic
from typing import Any

import aiohttp
import msgspec
from yaml import YAMLError

from serving.endpointslices import EndpointSlice, Listing
from serving.execplugin import bounded

log = logging.getLogger(__name__)

RESYNC_S = 300.0
#: A watch is asked for anew after this, so that a connection which died without a word is noticed.
WATCH_S = 60
#: From the moment a watch should have ended by itself until it is taken for dead; and for the answer to a request.
ANSWER_TIMEOUT_S = 15.0
#: For a credential plugin: it is ended before nobody waits for it any more.
PLUGIN_TIMEOUT_S = 12.0
LEAST_WAIT_S, MOST_WAIT_S = 0.2, 30.0
#: A cycle that lasted for so long was a good one: the next failure is a first one again.
GOOD_CYCLE_S = 10.0
#: So many cycles in a row may end early without a word in the log.
MOST_CUTS = 5
PAGE_SLICES, MOST_PAGES = 500, 200
_MOST_TEXT = 300
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class DiscoveryError(RuntimeError):
    """Why the fleet cannot be read from Kubernetes, and what to do about it."""


class _Version(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    metadata: _Version
    items: tuple[EndpointSlice, ...] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct):
    metadata: _Version


class _Status(msgspec.Struct):
    message: str = ""
    reason: str = ""
    code: int = 0


class _Ended(Exception):  # noqa: N818 - the end of a cycle, which need not be an error
    """That a cycle ended before its time; ``problem`` is what people should know, empty where that is routine."""

    def __init__(self, problem: str = "") -> None:
        super().__init__(problem)
        self.problem = problem


#: The listing call of the client: namespace and query in, an ``aiohttp`` response out.
Api = Callable[..., Any]
Connect = Callable[[], AbstractAsyncContextManager[Api]]


def check_client() -> None:
    """Raises ``DiscoveryError`` where the official client is not installed."""
    try:
        import_module("kubernetes.aio")
    except ImportError as error:
        raise DiscoveryError(
            f"pools[].discover needs the Kubernetes client ({error}); install it: pip install 'penstock[kubernetes]'"
        ) from error


def _without_output(record: logging.LogRecord) -> bool:
    """Cut what a credential plugin printed, which may be a token, from what the client logs of its failure."""
    message, _, printed = record.getMessage().partition(". ")
    if printed:
        record.msg, record.args = f"{message}; run the plugin by hand to see what it prints", ()
    return True


def _bound_plugins(users: Iterable[Any]) -> None:
    """Have the credential plugins of a kubeconfig's users ended where they hang."""
    for node in users:
        match node.value:
            case {"user": {"exec": {"command": command} as plugin}}:
                plugin["command"], *plugin["args"] = bounded([command, *(plugin.get("args") or ())], PLUGIN_TIMEOUT_S)


@asynccontextmanager
async def kubernetes_api() -> AsyncIterator[Api]:
    """The API server of KUBECONFIG where that is set, else the cluster's that this pod runs in, else of ~/.kube/config.

    Raises ``DiscoveryError``.
    """
    await asyncio.to_thread(check_client)  # its import takes a second
    from kubernetes.aio import client, config  # noqa: PLC0415 - an optional extra
    from kubernetes.aio.config import kube_config  # noqa: PLC0415 - as above

    kube_config.logger.addFilter(_without_output)  # a filter that is there already is not added
    settings = client.Configuration()
    named = os.environ.get("KUBECONFIG")
    try:
        if not named and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(settings)  # type: ignore[no-untyped-call] # the client's config has no types
        else:
            merged = kube_config.KubeConfigMerger(named or "~/.kube/config").config  # type: ignore[no-untyped-call] # as above
            _bound_plugins(merged.value["users"] if merged else ())
            loader = kube_config.KubeConfigLoader(merged, config_base_path=None)  # type: ignore[no-untyped-call] # as above
            await loader.load_and_set(settings)  # type: ignore[no-untyped-call] # as above
    except (config.ConfigException, OSError, ValueError, YAMLError) as error:
        raise DiscoveryError(
            f"the address of the Kubernetes API is not known: {error}; run in a pod with a service account, or set "
            "KUBECONFIG"
        ) from error
    async with client.ApiClient(settings) as connected:
        yield client.DiscoveryV1Api(connected).list_namespaced_endpoint_slice_without_preload_content


class _Known(msgspec.Struct):
    """What is known of one listing. ``slices`` is None until it was listed; ``heard_at_s``: the newest word of it."""

    since_s: float
    slices: dict[str, EndpointSlice] | None = None
    version: str = ""
    heard_at_s: float | None = None
    said: str = ""


class Discovery:
    """The EndpointSlices of the listings watched; ``on_change`` is called whenever they are others than before."""

    def __init__(self, on_change: Callable[[], None], connect: Connect = kubernetes_api) -> None:
        self._on_change = on_change
        self._connect = connect
        self._known: dict[Listing, _Known] = {}
        self._tasks: dict[Listing, asyncio.Task[None]] = {}
        self._listed = asyncio.Condition()
        #: Cycles that ended before their time, for whatever reason.
        self.failures = 0
        #: Another number whenever a slice is another, or a listing is, than before.
        self.version = 0

    def watch(self, listings: Iterable[Listing]) -> None:
        """Follow exactly these from now on; what is known of those that stay is kept."""
        wanted = set(listings)
        for listing in self._tasks.keys() - wanted:
            self._tasks.pop(listing).cancel()
            del self._known[listing]
            self.version += 1
        for listing in wanted - self._tasks.keys():
            self._known[listing] = _Known(monotonic())
            self._tasks[listing] = asyncio.create_task(self._follow(listing), name=f"follow {listing}")

    async def stop(self) -> None:
        """Follow nothing any more, and close what is open. What was found is forgotten."""
        tasks = list(self._tasks.values())
        self.watch(())
        if tasks:
            await asyncio.wait(tasks)

    def slices(self) -> Mapping[Listing, Mapping[str, EndpointSlice]]:
        """The last known slices by name, of those that were ever listed."""
        return {listing: known.slices for listing, known in self._known.items() if known.slices is not None}

    def age_s(self) -> float:
        """How long ago the API server was last heard of, of the listing for which that is longest; 0 without any.

        It says something at least every ``WATCH_S``: an event, a bookmark or the end of a watch.
        """
        now_s = monotonic()
        ages = (now_s - (k.since_s if k.heard_at_s is None else k.heard_at_s) for k in self._known.values())
        return max(ages, default=0.0)

    async def listed_once(self, timeout_s: float) -> bool:
        """Wait until every listing has been listed; False where that takes longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s), self._listed:
                await self._listed.wait_for(lambda: len(self.slices()) == len(self._known))
        except TimeoutError:
            return False
        return True

    async def _follow(self, listing: Listing) -> None:
        known, failures = self._known[listing], 0
        while True:
            began_s = monotonic()
            ended = await self._cycle(listing, known)
            if ended is None:
                failures = 0
                continue
            was_good = monotonic() - began_s > GOOD_CYCLE_S and (known.heard_at_s or 0) > began_s
            failures = 1 if was_good else failures + 1
            self.failures += 1
            self._say(listing, known, ended.problem or ("watches end at once" if failures > MOST_CUTS else ""))
            await asyncio.sleep(wait_s(failures))

    def _say(self, listing: Listing, known: _Known, problem: str) -> None:
        """Log it once, until all is well or something else is wrong."""
        if problem and problem != known.said:
            state = "the last known state stays" if known.slices is not None else "nothing is known yet"
            log.error("discovery of %s: %s; %s", listing, problem, state)
            known.said = problem

    async def _cycle(self, listing: Listing, known: _Known) -> _Ended | None:
        """One list and the watches after it; None where it lasted until it was time to list again.

        What nobody foresaw ends the cycle too, counted and in the log: the client and what it rests on may raise
        anything, and discovery must not end by it.
        """
        try:
            async with AsyncExitStack() as stack:
                api = await self._connected(stack)
                await self._list(api, listing, known)
                await self._watch_until(api, listing, known, monotonic() + RESYNC_S * uniform(0.9, 1.1))  # noqa: S311
        except _Ended as ended:
            return ended
        except Exception as error:
            return _Ended(_in_words(error))
        return None

    async def _connected(self, stack: AsyncExitStack) -> Api:
        """The API, open as long as the stack is. To connect may be to run a credential plugin, or to import."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await stack.enter_async_context(self._connect())
        except TimeoutError as error:
            raise _Ended(
                f"the client is not ready within {ANSWER_TIMEOUT_S:g} s; check the credential plugin in KUBECONFIG"
            ) from error

    async def _list(self, api: Api, listing: Listing, known: _Known) -> None:
        slices: dict[str, EndpointSlice] = {}
        token = ""
        for _ in range(MOST_PAGES):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                response = await api(
                    _namespace(listing), label_selector=listing.selector, limit=PAGE_SLICES, _continue=token or None
                )
                async with response:
                    await _accepted(response)
                    page = msgspec.json.decode(await response.read(), type=_Page)
            slices |= {each.metadata.name: each for each in page.items or ()}
            token = page.metadata.continue_
            if not token:
                break
        else:
            raise _Ended(f"there are more than {MOST_PAGES * PAGE_SLICES} EndpointSlices; narrow the selector")
        known.version = page.metadata.resource_version
        await self._took(known, slices)

    async def _took(self, known: _Known, slices: dict[str, EndpointSlice]) -> None:
        known.heard_at_s = monotonic()
        if slices != known.slices:
            known.slices = slices
            self.version += 1
            self._on_change()
        async with self._listed:
            self._listed.notify_all()

    async def _watch_until(self, api: Api, listing: Listing, known: _Known, end_s: float) -> None:
        """Watch, one watch after the other, until ``end_s`` of the monotonic clock."""
        while (left_s := end_s - monotonic()) > 1:
            for_s, began_s = min(WATCH_S, int(left_s)), monotonic()
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                response = await api(
                    _namespace(listing),
                    label_selector=listing.selector,
                    watch=True,
                    allow_watch_bookmarks=True,
                    resource_version=known.version,
                    timeout_seconds=for_s,
                    _request_timeout=for_s + 2 * ANSWER_TIMEOUT_S,
                )
            async with response:
                await _accepted(response)
                self._is_well(listing, known)
                await self._take_events(response, known, for_s + ANSWER_TIMEOUT_S)
            known.heard_at_s = monotonic()
            if monotonic() - began_s < min(1, for_s / 2):
                raise _Ended  # whoever ends watches at once would have us ask without a pause

    def _is_well(self, listing: Listing, known: _Known) -> None:
        if known.said:
            log.warning("discovery of %s: the Kubernetes API answers again", listing)
            known.said = ""

    async def _take_events(self, response: aiohttp.ClientResponse, known: _Known, within_s: float) -> None:
        """Take what comes until the watch ends in order. A connection that breaks is routine."""
        try:
            async with asyncio.timeout(within_s):
                while line := await response.content.readline():
                    await self._take(msgspec.json.decode(line, type=_Event), known)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Ended from error

    async def _take(self, event: _Event, known: _Known) -> None:
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            raise _Ended("" if status.code == 410 else f"a watch says {status.code} {_short(status.message)}")
        known.version = msgspec.json.decode(event.object, type=_Versioned).metadata.resource_version
        slices = dict(known.slices or {})
        if event.type in ("ADDED", "MODIFIED"):
            found = msgspec.json.decode(event.object, type=EndpointSlice)
            slices[found.metadata.name] = found
        elif event.type == "DELETED":
            slices.pop(msgspec.json.decode(event.object, type=EndpointSlice).metadata.name, None)
        await self._took(known, slices)


def wait_s(failures: int) -> float:
    """How long to wait after so many failures in a row, in seconds: doubled each time, and jittered by half."""
    most = min(MOST_WAIT_S, LEAST_WAIT_S * 2 ** min(failures - 1, 16))
    return uniform(most / 2, most)  # noqa: S311 - jitter


def _in_words(error: Exception) -> str:
    match error:
        case DiscoveryError():
            return str(error)
        case TimeoutError():
            return f"the Kubernetes API does not answer within {ANSWER_TIMEOUT_S:g} s"
        case aiohttp.ClientError() | OSError():
            return f"the Kubernetes API cannot be reached: {_short(str(error) or type(error).__name__)}"
        case msgspec.DecodeError():
            return f"the Kubernetes API's answer cannot be understood: {_short(str(error))}"
        case _:
            return f"{type(error).__name__}: {_short(str(error))}"


async def _accepted(response: aiohttp.ClientResponse) -> None:
    """Raises ``_Ended`` where the answer is not 200."""
    if response.status == 200:
        return
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        body = await response.content.read(1 << 16)
    if response.status == 410:
        raise _Ended
    try:
        message = msgspec.json.decode(body, type=_Status).message
    except msgspec.DecodeError:
        message = body.decode(errors="replace")
    hints = {
        401: "; check the service account's token or KUBECONFIG",
        403: "; grant the verbs list and watch on endpointslices of discovery.k8s.io",
        400: "; check discover.selector",
    }
    raise _Ended(f"the Kubernetes API says {response.status} {_short(message)}{hints.get(response.status, '')}")


def _namespace(listing: Listing) -> str:
    if listing.namespace is not None:
        return listing.namespace
    try:
        return _POD_NAMESPACE.read_text("utf-8").strip() or "default"
    except OSError:
        return "default"


def _short(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."
