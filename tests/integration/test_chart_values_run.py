"""The values files for GPUs and for vLLM that is there already: all that they start is run, but for vLLM itself.

In place of the GPU engines a stand-in answers their probes at the host and port that they are told; their whole command
lines are read by vLLM's own parser.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.profile import load_profile
from tests.support import chart
from tests.support.chart import Manifest, Pod
from tests.support.cluster import Cluster, RunningPod, images
from tests.support.commands import read_page
from tests.support.node import REPOSITORY, why_not
from tests.support.pods import ContainerPlan, plan, stored
from tests.support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
needs_namespaces = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

GPU_FILES = ("trial-gpu", "mixed")
READY_S = 60.0
ADMIN_TOKEN = "the-operators-own-token"  # of a test


def operators_redis() -> list[Manifest]:
    """A Redis that the release did not make: the bundled one of another, whose Secret has the name in the values."""
    rendered = chart.render(chart.values_of("trial-gpu"))
    return [
        manifest
        for manifest in rendered
        if manifest["metadata"]["labels"]["app.kubernetes.io/component"] == "redis"
        and manifest["kind"] != "NetworkPolicy"
    ]


def operators_vllm() -> tuple[Manifest, Pod]:
    """A Service of vLLM in another namespace, labelled by the page's own command, and a pod of it."""
    page = read_page(
        (REPOSITORY / "docs" / "deploy.md").read_text(), dict.fromkeys(("KEY", "HF_TOKEN", "REDIS_PASSWORD"), "")
    )
    (words,) = page.of("kubectl", "--namespace", "inference", "label", "service", "vllm-chat")
    metadata = {"name": "vllm-chat", "namespace": "inference", "labels": dict(word.split("=") for word in words[6:])}
    ports = [{"name": "http", "port": 8000, "targetPort": "http"}]
    selector = {"app": "vllm-chat"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"selector": selector, "ports": ports},
    }
    container = {
        "name": "vllm",
        "image": "vllm/vllm-openai:v0.32.0",
        "args": ["--host", "0.0.0.0", "--port", "8000"],
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}},
    }
    spec = {"containers": [container], "automountServiceAccountToken": False}
    return service, Pod("Deployment/vllm-chat", "inference", selector, spec)


def until_all_ready(cluster: Cluster) -> None:
    """Wait for every pod, and let the cluster know of each."""
    for pod in cluster.pods:
        if "startup" in pod.plan.container.probes:
            pod.until_started()
        cluster.settle()
        pod.until_ready(READY_S)
        cluster.settle()


def start(cluster: Cluster, *components: str) -> list[RunningPod]:
    """One pod of each component."""
    return [cluster.start(chart.pod(cluster.manifests, component)) for component in components]


def replicas_of(gateway: RunningPod, token: str) -> list[str]:
    """The URLs of the replicas in the limits in force."""
    headers = {"authorization": f"Bearer {token}"}
    publication = httpx.get(gateway.url("admin") + "/limits", headers=headers, timeout=10).json()
    return [replica["url"] for pool in publication["pools"] for replica in pool["replicas"]]


def check(cluster: Cluster, gateway: RunningPod, engines: Sequence[RunningPod]) -> None:
    """All pods are ready and alive, the limits count the engines, and `helm test` passes."""
    until_all_ready(cluster)
    token = next(iter(cluster.objects.secrets[admin_secret(cluster)].values())).decode()
    expected = sorted(f"http://{engine.address}:8000" for engine in engines)
    eventually(lambda: sorted(replicas_of(gateway, token)) == expected, READY_S, "limits of all engines")
    (tested,) = start(cluster, "test")
    assert tested.container.wait(READY_S) == 0, tested.container.log()


def admin_secret(cluster: Cluster) -> str:
    """The Secret that the gateways' token comes from."""
    volumes = chart.pod(cluster.manifests, "gateway").spec["volumes"]
    return next(str(volume["secret"]["secretName"]) for volume in volumes if volume["name"] == "admin-token")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a cluster keeps its logs; what pods said is shown where the test fails."""
    yield tmp_path
    for log in sorted(tmp_path.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")


@needs_namespaces
def test_the_trial_on_one_gpu_starts(folder: Path) -> None:
    """Redis with its append-only file on a claim, an engine's start as rendered, controller and gateway."""
    with Cluster(folder, chart.render(chart.values_of("trial-gpu"))) as cluster:
        _, engine, controller, gateway = start(cluster, "redis", "engine-h100", "controller", "gateway")
        check(cluster, gateway, [engine])
        words = ("keys", "create", "--org", "trial", "--tier", "pro", "--config", "/etc/penstock/penstock.yaml")
        made = controller.container.execute("penstock", *words)
        assert (made.returncode, made.stdout[:3]) == (0, "pn-"), made.stderr


@needs_namespaces
def test_a_mixed_site_starts(folder: Path) -> None:
    """Three GPU types, two controllers on one claim, and Secrets and claims that the operator made."""
    manifests = [*chart.render(chart.values_of("mixed")), *operators_redis()]
    with Cluster(folder, manifests) as cluster:
        made = cluster.objects.with_secret("penstock-admin", token=ADMIN_TOKEN).with_claim("models")
        cluster.objects = made.with_secret("penstock-redis-ca", **{"ca.crt": "a certificate"})
        engines = start(cluster, "engine-h100", "engine-h200", "engine-gb200")
        start(cluster, "redis")
        first, second = start(cluster, "controller", "controller")
        (gateway,) = start(cluster, "gateway")
        check(cluster, gateway, engines)

        seen = gateway.container.execute("cat", "/etc/penstock-redis/ca.crt").stdout
        assert seen == "a certificate"
        assert [cluster.end(first), cluster.end(second)] == [0, 0]


@needs_namespaces
def test_vllm_that_is_there_already_is_found(folder: Path) -> None:
    """A labelled Service in another namespace is found; of a pool whose replicas are away, nothing is counted."""
    service, vllm = operators_vllm()
    with Cluster(folder, [*chart.render(chart.values_of("existing-vllm")), *operators_redis(), service]) as cluster:
        found = cluster.start(vllm)
        start(cluster, "redis", "controller")
        (gateway,) = start(cluster, "gateway")
        check(cluster, gateway, [found])


def test_vllm_takes_the_gpu_engines_arguments() -> None:
    """The parser of `vllm serve` reads every GPU engine's command line, and finds its profile's bounds in it."""
    groups: list[tuple[dict[str, Any], ContainerPlan]] = []
    for file in GPU_FILES:
        values = chart.values_of(file)
        manifests = chart.render(values)
        objects = stored(manifests).with_claim("models")
        for group in values["engines"]:
            pod = chart.pod(manifests, f"engine-{group['name']}")
            groups.append((group, plan(pod, "engine", images(), objects).container))
    assert {container.argv[:2] for _, container in groups} == {("vllm", "serve")}
    lines = [json.dumps(container.argv[2:]) for _, container in groups]
    argv = [sys.executable, "-m", "tests.support.vllm_arguments"]
    done = subprocess.run(argv, input="\n".join(lines), capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    for (group, container), line in zip(groups, done.stdout.splitlines()[-len(groups) :], strict=True):
        parsed = json.loads(line)
        limits = load_profile(group["profile"]).limits
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            assert parsed[name] == getattr(limits, name)
        assert (parsed["port"], parsed["served_model_name"]) == (container.ports["http"], [group["model"]])
        assert (parsed["host"], parsed["scheduling_policy"]) == ("0.0.0.0", "priority")
