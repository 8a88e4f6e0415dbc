"""The chart as an upgrade renders it, where its templates look up what is there: Helm beside an API server that has it.

The server speaks as much as `helm --dry-run=server` asks for: what kinds there are, that it checks fields itself, and
the objects that it was given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import helm_python
import yaml

from tests.support.chart import CHART, Manifest, Values, render

#: What Helm leaves on objects of a release, without which it takes them for somebody else's.
_OWNED = {
    "labels": {"app.kubernetes.io/managed-by": "Helm"},
    "annotations": {"meta.helm.sh/release-name": "penstock", "meta.helm.sh/release-namespace": "penstock"},
}


def render_over(values: Values, there: list[Manifest]) -> list[Manifest]:
    """What the release `penstock` sends to an API server that has the objects ``there``; hooks and notes aside."""
    with _serving(_answers(render(values), there)) as url:
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": url}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "users": [{"name": "it", "user": {}}],
        }
        content = json.dumps(kubeconfig)
        with helm_python.Config(kubeconfig_content=content, namespace="penstock", storage_driver="memory") as config:
            found = config.install(str(CHART), "penstock", dict(values), namespace="penstock", dry_run="server")
    return [manifest for manifest in yaml.safe_load_all(found["manifest"]) if manifest is not None]


def _answers(rendered: list[Manifest], there: list[Manifest]) -> dict[str, Any]:
    """The server's documents by path."""
    kinds = sorted({(m["apiVersion"], m["kind"]) for m in rendered})
    versions = sorted({version for version, _ in kinds})
    groups = [version for version in versions if "/" in version]
    answers: dict[str, Any] = {
        "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(version) for version in groups]},
        "/openapi/v3": {"paths": {_root(v)[1:]: {"serverRelativeURL": f"/openapi/v3{_root(v)}"} for v in versions}},
    }
    for version in versions:
        of_version = [kind for v, kind in kinds if v == version]
        answers[_root(version)] = {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": version,
            "resources": [{"name": _plural(k), "kind": k, "namespaced": True, "verbs": ["get"]} for k in of_version],
        }
        answers[f"/openapi/v3{_root(version)}"] = _checks_fields(version, of_version)
    for manifest in there:
        name = f"{_plural(manifest['kind'])}/{manifest['metadata']['name']}"
        owned = manifest | {"metadata": manifest["metadata"] | _OWNED}
        answers[f"{_root(manifest['apiVersion'])}/namespaces/penstock/{name}"] = owned
    return answers


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _plural(kind: str) -> str:
    low = kind.lower()
    return f"{low[:-1]}ies" if low.endswith("y") else f"{low}es" if low.endswith("s") else f"{low}s"


def _group(version: str) -> dict[str, Any]:
    this = {"groupVersion": version, "version": version.partition("/")[2]}
    return {"name": version.partition("/")[0], "versions": [this], "preferredVersion": this}


def _checks_fields(version: str, kinds: list[str]) -> dict[str, Any]:
    """That a PATCH of these kinds takes `fieldValidation`, so that Helm asks for no schema of theirs."""
    group, _, number = version.rpartition("/")
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.37.0"},
        "paths": {
            f"{_root(version)}/namespaces/{{namespace}}/{_plural(kind)}/{{name}}": {
                "patch": {
                    "parameters": [{"name": "fieldValidation", "in": "query"}],
                    "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
                }
            }
            for kind in kinds
        },
    }


@contextmanager
def _serving(answers: Mapping[str, Any]) -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            none = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(answers.get(path, none)).encode()
            self.send_response(200 if path in answers else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the class above
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(timeout=10)
