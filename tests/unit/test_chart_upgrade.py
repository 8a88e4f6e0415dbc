"""What an upgrade of the release leaves alone: engines that serve, counts that a scaler has set, secrets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import chart
from tests.support.chart import Manifest
from tests.support.installed import render_over

TRIAL = chart.values_of("trial-gpu")
SCALED = {"enabled": True, "minReplicas": 1, "maxReplicas": 9}


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The chart as its next release."""
    copy = tmp_path / "penstock"
    shutil.copytree(chart.CHART, copy)
    text = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(text.replace("0.1.0", "0.2.0"))
    return copy


def _template(manifests: list[Manifest], kind: str, component: str) -> dict[str, Any]:
    template: dict[str, Any] = chart.find(manifests, kind, f"penstock-{component}")["spec"]["template"]
    return template


def test_a_newer_chart_restarts_neither_engines_nor_redis(newer: Path) -> None:
    """Their pods are as they were, though each object is labelled with the release that it came with."""
    before = chart.render(TRIAL)
    after = chart.render(TRIAL | {"commonLabels": {"team": "inference"}}, path=newer)
    for kind, component in (("Deployment", "engine-h100"), ("StatefulSet", "redis")):
        assert _template(after, kind, component) == _template(before, kind, component)
        labels = chart.find(after, kind, f"penstock-{component}")["metadata"]["labels"]
        assert (labels["helm.sh/chart"], labels["team"]) == ("penstock-0.2.0", "inference")
    for component in ("gateway", "controller"):
        old, new = (_template(manifests, "Deployment", component) for manifests in (before, after))
        assert new["spec"] != old["spec"]  # their image is the release's
        assert new["metadata"] == old["metadata"]


def _deployment(component: str, replicas: int) -> Manifest:
    metadata = {"name": f"penstock-{component}", "namespace": "penstock"}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"replicas": replicas}}


def _secret(name: str, data: dict[str, str]) -> Manifest:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "penstock"}, "data": data}


def test_what_is_scaled_keeps_its_count_and_secrets_their_values() -> None:
    """A count left out would become 1 when the scaler is switched on; one from the values would undo the scaler."""
    changes = {
        "gateway": {"autoscaling": {"enabled": True}},
        "engines": [TRIAL["engines"][0] | {"replicas": 2, "autoscaling": SCALED}],
    }
    there = [
        _deployment("engine-h100", 7),
        _deployment("gateway", 5),
        _secret("penstock-admin-token", {"token": "b2xk"}),
        _secret("penstock-redis", {"password": "b2xk", "url": "b2xk"}),
    ]
    manifests = render_over(chart.merged(TRIAL, changes), there)
    for component, count in (("engine-h100", 7), ("gateway", 5)):
        assert chart.find(manifests, "Deployment", f"penstock-{component}")["spec"]["replicas"] == count
    assert chart.find(manifests, "Secret", "penstock-admin-token")["data"] == {"token": "b2xk"}
    assert chart.find(manifests, "Secret", "penstock-redis")["data"]["password"] == "b2xk"


def test_what_is_not_scaled_has_the_count_of_the_values() -> None:
    """Whatever is there, and a scaled one that is not there yet begins with its own count."""
    manifests = render_over(TRIAL, [_deployment("engine-h100", 7)])
    assert chart.find(manifests, "Deployment", "penstock-engine-h100")["spec"]["replicas"] == 1
    engines = [TRIAL["engines"][0] | {"replicas": 2, "autoscaling": SCALED}]
    gateway = {"replicas": 1, "autoscaling": {"enabled": True, "minReplicas": 3}}
    first = chart.render(chart.merged(TRIAL, {"engines": engines, "gateway": gateway}))
    assert chart.find(first, "Deployment", "penstock-engine-h100")["spec"]["replicas"] == 2
    assert chart.find(first, "Deployment", "penstock-gateway")["spec"]["replicas"] == 3
