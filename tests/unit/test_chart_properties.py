"""Whatever sensible values a person writes, the chart gives objects that Kubernetes takes and that fit each other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit.config import load_config
from tests.support import chart
from tests.support.chart_checks import wiring_problems
from tests.support.netpol import Peer, reaches

#: Each example renders some thirty objects and checks them all, which takes a tenth of a second.
EXAMPLES = 15
MANY_EXAMPLES = 150

dns_labels = st.from_regex(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?", fullmatch=True)
label_values = st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,20}[A-Za-z0-9])?", fullmatch=True)
group_names = st.from_regex(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?", fullmatch=True)
models = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,100}", fullmatch=True)
profiles = st.sampled_from(["h100-llama-3.1-8b", "h200-llama-3.1-8b", "gb200-llama-3.1-8b"])

virtual_groups = st.fixed_dictionaries(
    {"device": st.just("virtual"), "profile": profiles, "replicas": st.integers(0, 50)},
    optional={"startupSeconds": st.integers(10, 3600), "preStopSeconds": st.integers(1, 600)},
)
gpu_groups = st.fixed_dictionaries(
    {
        "device": st.just("gpu"),
        "profile": profiles,
        "replicas": st.integers(0, 2000),
        "modelPath": st.sampled_from(["/models/llama", "meta-llama/Llama-3.1-8B-Instruct"]),
    },
    optional={
        "gpusPerReplica": st.integers(1, 8),
        "modelCache": st.sampled_from([{"existingClaim": "elsewhere"}, {"hostPath": "/data"}, {}]),
        "nodeSelector": st.dictionaries(st.just("nvidia.com/gpu.product"), label_values),
        "huggingFaceToken": st.just({"secret": "elsewhere", "key": "token"}),
        "offline": st.booleans(),
        "extraArgs": st.lists(st.sampled_from(["--kv-cache-dtype=fp8", "--seed", "7", "a: b", "{x}"]), max_size=3),
        "shmSize": st.sampled_from(["1Gi", "64Mi"]),
    },
)
counts = st.sampled_from([1, "25%"])
redis = st.sampled_from(
    [
        {"bundled": {"enabled": True, "persistence": {"enabled": True}}},
        {"bundled": {"enabled": True, "persistence": {"enabled": False}}},
        {"bundled": {"enabled": True, "existingSecret": "elsewhere"}},
        {"external": {"existingSecret": "elsewhere", "tls": {"caSecret": "elsewhere"}}, "bundled": {"enabled": False}},
        {"external": {"existingSecret": "elsewhere", "key": "REDIS_URL"}, "bundled": {"enabled": False}},
    ]
)


@st.composite
def values(draw: st.DrawFn) -> dict[str, Any]:
    """Values of one release, with one pool and some engine groups."""
    model = draw(models)
    names = draw(st.lists(group_names, max_size=3, unique=True))
    groups = [{"name": name, "model": model, **draw(st.one_of(virtual_groups, gpu_groups))} for name in names]
    pool = chart.values_of("virtual")["config"]["pools"][0] | {"model": model}
    if not groups:
        pool["replicas"] = [{"url": "http://vllm.example:8000", "profile": "h100-llama-3.1-8b"}]
    shared = draw(st.booleans())
    return {
        "config": chart.values_of("virtual")["config"] | {"pools": [pool]},
        "commonLabels": draw(st.dictionaries(st.sampled_from(["team", "example.com/cost"]), label_values)),
        "engines": groups,
        "redis": draw(redis),
        "gateway": {
            "replicas": draw(st.integers(1, 100)),
            "drainSeconds": draw(st.integers(1, 3600)),
            "drainDelaySeconds": draw(st.integers(0, 300)),
            "autoscaling": {"enabled": draw(st.booleans())},
            "podDisruptionBudget": {
                "enabled": draw(st.booleans()),
                "maxUnavailable": draw(st.sampled_from([1, "25%"])),
            },
            "spreadOver": draw(st.lists(st.just("kubernetes.io/hostname"), max_size=1)),
            "service": {"port": draw(st.integers(1, 65535))},
        },
        "controller": {
            "replicas": draw(st.integers(1, 2)) if shared else 1,
            "persistence": {"accessModes": ["ReadWriteMany" if shared else "ReadWriteOnce"]},
        },
        "adminToken": {"existingSecret": draw(st.sampled_from(["", "elsewhere"]))},
        "networkPolicy": {"enabled": draw(st.booleans()), "egress": {"enabled": draw(st.booleans())}},
        "metrics": {
            "serviceMonitor": {"enabled": draw(st.booleans())},
            "prometheusRule": {"enabled": draw(st.booleans())},
            "dashboard": {"enabled": draw(st.booleans())},
        },
        "ingress": {"enabled": draw(st.booleans()), "hosts": ["llm.example.com"]},
        "httpRoute": {"enabled": draw(st.booleans()), "parentRefs": [{"name": "public"}]},
        "loadTest": {"enabled": draw(st.booleans()), "model": model, "apiKey": {"existingSecret": "elsewhere"}},
    }


@given(values=values(), release=dns_labels, namespace=dns_labels)
@settings(max_examples=EXAMPLES)
def test_every_set_of_values_gives_objects_that_fit(values: dict[str, Any], release: str, namespace: str) -> None:
    """Valid in the oldest and the newest Kubernetes, wired, hardened; the config loads; vLLM is Penstock's alone."""
    _fits(values, release, namespace)


@pytest.mark.slow
@given(values=values(), release=dns_labels, namespace=dns_labels)
@settings(max_examples=MANY_EXAMPLES)
def test_many_sets_of_values_give_objects_that_fit(values: dict[str, Any], release: str, namespace: str) -> None:
    """The same, looked for longer."""
    _fits(values, release, namespace)


def _fits(values: dict[str, Any], release: str, namespace: str) -> None:
    manifests = chart.render(values, release, namespace)
    for version in (chart.KUBERNETES_VERSIONS[0], chart.KUBERNETES_VERSIONS[-1]):
        assert [problem for manifest in manifests for problem in chart.schema_problems(manifest, version)] == []
    assert wiring_problems(manifests, {"elsewhere"}) == []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(chart.write_config(manifests, Path(folder)))
    assert (config.pools[0].discover is not None) == bool(values["engines"])
    if values["networkPolicy"]["enabled"]:
        _vllm_is_penstocks_alone(manifests)


def _vllm_is_penstocks_alone(manifests: list[chart.Manifest]) -> None:
    policies = chart.of_kind(manifests, "NetworkPolicy")
    everyone = {pod.labels["app.kubernetes.io/component"]: pod for pod in chart.pods(manifests)}
    peers = {name: Peer(pod.namespace, pod.labels, pod.ports) for name, pod in everyone.items()}
    for name, engine in peers.items():
        if engine.labels.get("penstock.io/role") == "engine":
            callers = {other for other, peer in peers.items() if reaches(policies, peer, engine, 8000)}
            assert callers == {"gateway", "controller"}, name
