"""Who reaches whom in an installed release: vLLM and Redis are for Penstock alone."""

from __future__ import annotations

import pytest

from tests.support import chart
from tests.support.chart import Manifest, Pod
from tests.support.netpol import Peer, reaches

STRANGER = Peer("penstock", {"app": "somebody"}, {})
NEIGHBOUR = Peer("elsewhere", {"app.kubernetes.io/component": "gateway"}, {})
PROMETHEUS = Peer("monitoring", {"app": "prometheus"}, {})
DNS = Peer("kube-system", {"k8s-app": "kube-dns"}, {})
#: Stands for anything outside: the API server, a hub of models, an external Redis.
OUTSIDE = Peer("outside", {}, {})


class Release:
    """The pods and the policies of one render."""

    def __init__(self, manifests: list[Manifest]) -> None:
        self.policies = chart.of_kind(manifests, "NetworkPolicy")
        self.pods = {pod.labels["app.kubernetes.io/component"]: _peer(pod) for pod in chart.pods(manifests)}

    def callers(self, target: str, port: int) -> set[str]:
        """Which pods of the release, and which others, reach a port of one of its pods."""
        everyone = self.pods | {"stranger": STRANGER, "neighbour": NEIGHBOUR, "prometheus": PROMETHEUS}
        server = self.pods[target]
        return {name for name, peer in everyone.items() if reaches(self.policies, peer, server, port)}


def _peer(pod: Pod) -> Peer:
    return Peer(pod.namespace, pod.labels, pod.ports)


@pytest.fixture(scope="module")
def release() -> Release:
    """Virtual GPUs with the bundled Redis, and a load test."""
    load_test = {"enabled": True, "model": "llama-3.1-8b", "apiKey": {"existingSecret": "key"}}
    return Release(chart.render(chart.merged(chart.values_of("virtual"), {"loadTest": load_test})))


@pytest.mark.parametrize("engine", ["engine-h100", "engine-h200"])
def test_vllm_is_reached_by_penstock_and_prometheus_alone(release: Release, engine: str) -> None:
    """Neither the ingress nor another engine nor a pod beside it comes near vLLM."""
    assert release.callers(engine, 8000) == {"gateway", "controller", "prometheus"}
    assert release.callers(engine, 8001) == set()


def test_redis_is_reached_by_penstock_alone(release: Release) -> None:
    """Whoever writes to Redis decides everybody's limits."""
    assert release.callers("redis", 6379) == {"gateway", "controller"}


def test_everybody_calls_the_data_port_but_only_some_the_admin_port(release: Release) -> None:
    """The engines, Redis and the controller have no business with the gateway, and may not open connections to it."""
    clients = {"stranger", "neighbour", "prometheus", "test", "loadtest"}
    assert release.callers("gateway", 8080) == clients
    assert release.callers("gateway", 9090) == {"prometheus", "test", "loadtest"}
    assert release.callers("controller", 9091) == {"prometheus"}


def test_what_penstock_needs_outside_stays_open(release: Release) -> None:
    """Names for all, the API server for the controller, a hub for engines that load weights."""
    for name in ("gateway", "controller", "engine-h100"):
        # As plugins see it that look behind the Service: OpenShift's pods have 5353, others 8053.
        for port in (53, 5353, 8053):
            assert reaches(release.policies, release.pods[name], DNS, port, "UDP")
            assert reaches(release.policies, release.pods[name], DNS, port, "TCP")
    # And so the API server: kubeadm's, minikube's, MicroK8s'.
    for port in (443, 6443, 8443, 16443):
        assert reaches(release.policies, release.pods["controller"], OUTSIDE, port)
    for port in (443, 8000):
        assert not reaches(release.policies, release.pods["gateway"], OUTSIDE, port)
    assert reaches(release.policies, release.pods["engine-h100"], OUTSIDE, 443)
    assert not reaches(release.policies, release.pods["redis"], OUTSIDE, 443)


def test_existing_engines_are_guarded_and_reached() -> None:
    """Engines of another namespace and by URL: Penstock goes there, and in the namespace nobody else does."""
    values = chart.values_of("existing-vllm")
    values["config"]["pools"][1]["replicas"][0]["url"] = "https://vllm.example.internal"
    release = Release(chart.render(values))
    vllm = Peer("inference", {"app": "vllm-chat"}, {"http": 8000})
    for name in ("gateway", "controller"):
        assert reaches(release.policies, release.pods[name], vllm, 8000)
        assert reaches(release.policies, release.pods[name], OUTSIDE, 443)
        assert reaches(release.policies, release.pods[name], OUTSIDE, 6379)
    assert reaches(release.policies, PROMETHEUS, vllm, 8000)
    assert not reaches(release.policies, STRANGER, vllm, 8000)
    assert not reaches(release.policies, Peer("inference", {"app": "other"}, {}), vllm, 8000)


def test_callers_can_be_bounded() -> None:
    """With `networkPolicy.callers` the data port is for those alone, and for the chart's own tests."""
    ingress = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]
    values = chart.merged(chart.values_of("virtual"), {"networkPolicy": {"callers": ingress}})
    release = Release(chart.render(values))
    assert reaches(release.policies, Peer("ingress-nginx", {}, {}), release.pods["gateway"], 8080)
    assert release.callers("gateway", 8080) == {"test"}


def test_without_policies_all_is_open() -> None:
    """The switch leaves none behind, and the evaluator knows what that means."""
    release = Release(chart.render(chart.merged(chart.values_of("virtual"), {"networkPolicy": {"enabled": False}})))
    assert release.policies == []
    assert "stranger" in release.callers("engine-h100", 8000)
