"""A Kubernetes API server as far as discovery needs one: list and watch of EndpointSlices, on 127.0.0.1.

It keeps objects in memory and speaks the protocol of the API concepts page: paged lists with a resourceVersion; watches
from a resourceVersion, one JSON event a line; bookmarks; 410 Gone where history is forgotten. Tests tell it what to do
by its methods; other processes by PUT and DELETE of a slice, as ``kubectl`` would.

    python -m tests.support.kube_api --kubeconfig PATH [FILE.json ...]     serves until it is stopped; prints its URL
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from aiohttp import web

RECORDED = Path(__file__).parents[1] / "data" / "kubernetes" / "endpointslices.json"
NAMESPACE = "inference"
TOKEN = "fake-service-account-token"
_API = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
_FIRST_VERSION = 48_300
_MOST_HISTORY = 10_000

Slice = dict[str, Any]
Event = tuple[int, str, Slice]


def recorded_slices() -> list[Slice]:
    """The EndpointSlices of ``tests/data/kubernetes``: two of a Service on H100s, one of a Service on H200s."""
    found: list[Slice] = json.loads(RECORDED.read_text("utf-8"))["items"]
    return found


def endpoint(
    address: str, node: str | None = "node-1", *, ready: bool | None = True, terminating: bool | None = False
) -> dict[str, Any]:
    """One endpoint, ready unless the conditions say otherwise."""
    states = {"ready": ready, "serving": ready or terminating, "terminating": terminating}
    return {"addresses": [address], "conditions": states, **({"nodeName": node} if node else {})}


def endpoint_slice(
    name: str,
    endpoints: Iterable[Mapping[str, Any]],
    *,
    pool: str = "chat",
    profile: str = "h100-llama-3.1-8b",
    gpu: str = "H100",
    port: int | None = 8000,
    address_type: str = "IPv4",
) -> Slice:
    """A slice of the Service ``engine`` with our three labels."""
    ours = {"pool": pool, "profile": profile, "gpu": gpu}
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {
                "kubernetes.io/service-name": "engine",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                **{f"penstock.io/{key}": value for key, value in ours.items()},
            },
        },
        "addressType": address_type,
        "endpoints": [dict(each) for each in endpoints],
        "ports": [] if port is None else [{"name": "http", "port": port, "protocol": "TCP"}],
    }


class KubeApi:
    """The server: an async context manager. ``requests`` holds the query of each list and watch, in order.

    ``watches`` is how many watches are open now.
    """

    def __init__(
        self, slices: Iterable[Slice] = (), *, host: str = "127.0.0.1", port: int = 0, kubeconfig: Path | None = None
    ) -> None:
        self._folder = TemporaryDirectory(prefix="pn-kube-")
        self.kubeconfig = kubeconfig or Path(self._folder.name) / "kubeconfig"
        self.host = host
        self.port = port
        self.requests: list[dict[str, str]] = []
        self.watches = 0
        self._version = _FIRST_VERSION
        self._objects: dict[tuple[str, str], Slice] = {}
        self._history: list[tuple[int, Slice | None, Slice | None]] = []
        self._oldest = self._version
        self._pages: dict[str, tuple[int, list[Slice]]] = {}
        self._news = asyncio.Event()
        self._bookmarks = 0
        self._cuts = 0
        self._dropped: set[int] = set()
        self._mode: Literal["serve", "hang", "away"] | int = "serve"
        self._gone_as: Literal["status", "event"] = "event"
        for each in slices:
            self.apply(each)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    @property
    def version(self) -> str:
        """The newest resourceVersion."""
        return str(self._version)

    @property
    def lists(self) -> int:
        """How many lists have been asked for; each page counts."""
        return sum("watch" not in query for query in self.requests)

    async def __aenter__(self) -> KubeApi:
        app = web.Application()
        app.router.add_get(_API, self._list_or_watch)
        app.router.add_put(_API + "/{name}", self._put)
        app.router.add_delete(_API + "/{name}", self._delete)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await self.come_back()
        self.kubeconfig.write_text(json.dumps(_kubeconfig(self.url)), "utf-8")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut_watches()
        await self._runner.cleanup()
        self._folder.cleanup()

    async def go_away(self) -> None:
        """Refuse connections, and cut those that are open."""
        self._mode = "away"
        self.cut_watches()
        await self._site.stop()

    async def come_back(self) -> None:
        """Listen, at the port of before, and answer."""
        self._mode = "serve"
        self._site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True)
        await self._site.start()
        if not self.port:
            self.port = int(self._runner.addresses[0][1])

    def answer(self, mode: Literal["serve", "hang"] | int) -> None:
        """Answer requests as they ask, or never, or with this HTTP status; open watches go on."""
        self._mode = mode

    def apply(self, new: Slice) -> None:
        """Add or change a slice."""
        new = json.loads(json.dumps(new))
        key = (new["metadata"]["namespace"], new["metadata"]["name"])
        self._changed(key, new)

    def remove(self, name: str, namespace: str = NAMESPACE) -> None:
        """Delete a slice."""
        self._changed((namespace, name), None)

    def apply_unseen(self, new: Slice) -> None:
        """Add or change a slice, and tell no watch of it: an event that got lost."""
        self._dropped.add(self._version + 1)
        self.apply(new)

    def send_bookmark(self) -> None:
        """Tell every open watch that asked for bookmarks the newest resourceVersion."""
        self._bookmarks += 1
        self._wake()

    def advance(self, by: int = 1) -> None:
        """Objects of other kinds changed: the resourceVersion grows, and no watch here sees anything."""
        self._version += by

    def forget_history(self, gone_as: Literal["status", "event"] = "event") -> None:
        """Versions before the newest are 410 Gone from now on, told as HTTP status or as an ERROR event."""
        self._gone_as = gone_as
        self._history.clear()
        self._pages.clear()
        self._oldest = self._version

    def cut_watches(self) -> None:
        """Close the connections of all open watches in the middle."""
        self._cuts += 1
        self._wake()

    def _changed(self, key: tuple[str, str], new: Slice | None) -> None:
        self._version += 1
        old = self._objects.pop(key, None)
        if new is not None:
            new["metadata"]["resourceVersion"] = str(self._version)
            self._objects[key] = new
        elif old is not None:
            gone = json.loads(json.dumps(old))
            gone["metadata"]["resourceVersion"] = str(self._version)
            old = gone
        self._history.append((self._version, old, new))
        if len(self._history) > _MOST_HISTORY:
            self._oldest = self._history.pop(0)[0]
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _put(self, request: web.Request) -> web.Response:
        self.apply(await request.json())
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _delete(self, request: web.Request) -> web.Response:
        self.remove(request.match_info["name"], request.match_info["namespace"])
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _list_or_watch(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(dict(request.query))
        if self._mode == "hang":
            await asyncio.sleep(3600)
        if self._mode == "away" and request.transport is not None:
            request.transport.abort()
        if isinstance(self._mode, int):
            return _status(self._mode, "the test says so")
        if request.headers.get("Authorization", "").lower() != f"bearer {TOKEN}".lower():
            return _status(401, "Unauthorized")
        matches = _selector(request.query.get("labelSelector", ""))
        if request.query.get("watch") in ("true", "True", "1"):
            return await self._watch(request, matches)
        return self._list(request, matches)

    def _list(self, request: web.Request, matches: Callable[[Slice], bool]) -> web.Response:
        token = request.query.get("continue", "")
        if token and token not in self._pages:
            return _status(410, "The provided continue parameter is too old")
        namespace = request.match_info["namespace"]
        found = (each for (where, _), each in sorted(self._objects.items()) if where == namespace and matches(each))
        version, items = self._pages.pop(token) if token else (self._version, list(found))
        limit = int(request.query.get("limit", "0")) or len(items)
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        if len(items) > limit:
            metadata["continue"] = f"{version}-{len(items) - limit}"
            metadata["remainingItemCount"] = len(items) - limit
            self._pages[metadata["continue"]] = (version, items[limit:])
        body = {"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1", "metadata": metadata}
        return web.json_response({**body, "items": items[:limit]})

    async def _watch(self, request: web.Request, matches: Callable[[Slice], bool]) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion") or 0)
        if since < self._oldest and self._gone_as == "status":
            return _status(410, f"too old resource version: {since} ({self._oldest})")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        self.watches += 1
        try:
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", "1800"))):
                await self._stream(request, response, matches, since)
        except TimeoutError:
            await response.write(self._bookmark(self._version))
        except ConnectionError:
            pass  # the client has gone
        finally:
            self.watches -= 1
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, matches: Callable[[Slice], bool], since: int
    ) -> None:
        bookmarks, cuts = self._bookmarks, self._cuts
        wants_bookmarks = request.query.get("allowWatchBookmarks") in ("true", "True", "1")
        while self._cuts == cuts:
            news = self._news
            if since < self._oldest:
                gone = _status_object(410, f"too old resource version: {since} ({self._oldest})")
                await response.write(_line("ERROR", gone))
                return
            for version, kind, found in self._events(request.match_info["namespace"], matches, since):
                if version not in self._dropped:
                    await response.write(_line(kind, found))
            since = self._version
            if bookmarks != self._bookmarks and wants_bookmarks:
                bookmarks = self._bookmarks
                await response.write(self._bookmark(since))
            await news.wait()
        if request.transport is not None:
            request.transport.abort()

    def _events(self, namespace: str, matches: Callable[[Slice], bool], since: int) -> Iterator[Event]:
        """The events after a version, as a watch with a selector sees them: what matches no longer is deleted."""
        for version, old, new in self._history:
            if (
                version <= since
                or (new or old or {"metadata": {"namespace": ""}})["metadata"]["namespace"] != namespace
            ):
                continue
            was, is_now = old is not None and matches(old), new is not None and matches(new)
            if is_now and new is not None:
                yield version, "MODIFIED" if was else "ADDED", new
            elif was and old is not None:
                yield version, "DELETED", old

    def _bookmark(self, version: int) -> bytes:
        metadata = {"resourceVersion": str(version), "creationTimestamp": None}
        return _line("BOOKMARK", {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": metadata})


def _line(kind: str, found: Mapping[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": found}).encode() + b"\n"


def _status_object(code: int, message: str) -> dict[str, Any]:
    reason = {401: "Unauthorized", 403: "Forbidden", 410: "Expired"}.get(code, "InternalError")
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code}  # fmt: skip


def _status(code: int, message: str) -> web.Response:
    return web.json_response(_status_object(code, message), status=code)


def _selector(text: str) -> Callable[[Slice], bool]:
    """Equality and set rules of a label selector: ``a=b,c!=d,e in (f,g),h notin (i),j,!k``."""
    rules = [rule.strip() for rule in re.split(r",(?![^(]*\))", text) if rule.strip()]

    def matches(found: Slice) -> bool:
        labels: dict[str, str] = found["metadata"].get("labels", {})
        return all(_rule(rule, labels) for rule in rules)

    return matches


def _rule(rule: str, labels: Mapping[str, str]) -> bool:
    if among := re.fullmatch(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)", rule):
        values = {each.strip() for each in among[3].split(",")}
        return (labels.get(among[1]) in values) == (among[2] == "in")
    if equal := re.fullmatch(r"([^=!\s]+)\s*(==|=|!=)\s*(\S*)", rule):
        return (labels.get(equal[1]) == equal[3]) == (equal[2] != "!=")
    return rule[1:].strip() not in labels if rule.startswith("!") else rule in labels


def _kubeconfig(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "penstock", "user": {"token": TOKEN}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "penstock", "namespace": NAMESPACE}}],
        "current-context": "fake",
    }


async def _serve(kubeconfig: Path, host: str, port: int, files: Iterable[Path]) -> None:
    slices = [each for file in files for each in json.loads(file.read_text("utf-8"))["items"]]
    async with KubeApi(slices, host=host, port=port, kubeconfig=kubeconfig) as api:
        print(api.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A fake Kubernetes API server.")
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("files", type=Path, nargs="*")
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.kubeconfig, arguments.host, arguments.port, arguments.files))
