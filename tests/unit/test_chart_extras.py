"""What the chart has beside the service: monitoring, autoscaling, ingress, `helm test` and the load test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import yaml

from serving.profile import dump_profile, load_profile
from tests.support import chart
from tests.support.chart import Manifest

MIXED = chart.values_of("mixed")
VIRTUAL = chart.values_of("virtual")
FILES = chart.CHART / "files"


@pytest.fixture(scope="module")
def mixed() -> list[Manifest]:
    """Production values, with everything on that they leave off."""
    scaled = {"enabled": True, "minReplicas": 2, "maxReplicas": 16}
    engines = [MIXED["engines"][0] | {"autoscaling": scaled}, *MIXED["engines"][1:]]
    route = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example.com"]}
    return chart.render(chart.merged(MIXED, {"engines": engines, "httpRoute": route}))


def test_the_log_of_helm_test_is_there_to_be_read(mixed: list[Manifest]) -> None:
    """`helm test --logs` reads it after the pod has succeeded: only the next test's start deletes the pod."""
    annotations = chart.find(mixed, "Pod", "penstock-test")["metadata"]["annotations"]
    assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_our_images_run_on_nodes_that_they_are_built_for() -> None:
    """On a site with arm64 nodes every pod of an image for amd64 says so, those of the tests too."""
    load_test = {"enabled": True, "model": "llama-3.1-70b", "apiKey": {"existingSecret": "key"}}
    found = {
        pod.labels["app.kubernetes.io/component"]: pod.spec["nodeSelector"].get("kubernetes.io/arch")
        for pod in chart.pods(chart.render(chart.merged(MIXED, {"loadTest": load_test})))
        if not pod.containers[0]["image"].startswith("vllm/")
    }
    assert found == dict.fromkeys(("gateway", "controller", "test", "loadtest"), "amd64")


def test_rollouts_outlast_the_slowest_engine() -> None:
    """A gateway is ready after an engine is, and an engine after its image and its weights are there."""
    engines = [MIXED["engines"][0] | {"startupSeconds": 7200}, *MIXED["engines"][1:]]
    manifests = chart.render(chart.merged(MIXED, {"engines": engines}))
    deadlines = {
        m["metadata"]["name"].removeprefix("penstock-"): m["spec"].get("progressDeadlineSeconds", 600)
        for m in chart.of_kind(manifests, "Deployment")
    }
    assert deadlines["engine-h100"] >= 7200 + 1800
    assert deadlines["engine-h200"] >= 1800 + 1800
    assert deadlines["gateway"] > deadlines["engine-h100"]
    existing = chart.find(chart.render(chart.values_of("existing-vllm")), "Deployment", "penstock-gateway")
    assert existing["spec"]["progressDeadlineSeconds"] == 3600


def test_prometheus_gets_the_rules_of_the_file(mixed: list[Manifest]) -> None:
    """The PrometheusRule holds what promtool checks, as it is, with the label that the operator selects by."""
    rule = chart.find(mixed, "PrometheusRule", "penstock")
    assert rule["spec"] == yaml.safe_load((FILES / "rules.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_grafana_gets_the_dashboard_of_the_file(mixed: list[Manifest]) -> None:
    """In a ConfigMap with the sidecar's label."""
    found = chart.find(mixed, "ConfigMap", "penstock-dashboard")
    assert json.loads(found["data"]["penstock.json"]) == json.loads((FILES / "dashboard.json").read_text())
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_gateways_are_scraped_with_their_token(mixed: list[Manifest]) -> None:
    """The operator reads it from the Secret; the controller and the engines have none."""
    secret = {"name": "penstock-admin", "key": "token"}
    (endpoint,) = chart.find(mixed, "ServiceMonitor", "penstock-gateway")["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": secret}
    for name in ("penstock-controller", "penstock-engines"):
        (endpoint,) = chart.find(mixed, "ServiceMonitor", name)["spec"]["endpoints"]
        assert "authorization" not in endpoint


def test_a_group_scales_by_demand_as_the_example_does(mixed: list[Manifest]) -> None:
    """The ScaledObject is the example's but for its names and numbers, and the Deployment begins with its count."""
    found = chart.find(mixed, "ScaledObject", "penstock-engine-h100")["spec"]
    example = yaml.safe_load((chart.CHART / "examples" / "keda-scaledobject.yaml").read_text())["spec"]
    assert found["advanced"] == example["advanced"]
    assert set(found) == set(example)
    (trigger,), (shown,) = found["triggers"], example["triggers"]
    assert trigger["metadata"] == shown["metadata"] | {
        "query": 'max(penstock:replicas_needed{namespace="penstock", model="llama-3.1-70b", gpu="H100"})'
    }
    assert (found["minReplicaCount"], found["maxReplicaCount"], found["fallback"]["replicas"]) == (2, 16, 8)
    deployment = chart.find(mixed, "Deployment", found["scaleTargetRef"]["name"])
    assert deployment["spec"]["replicas"] == 8


def test_only_v1_is_published_and_streams_are_let_through(mixed: list[Manifest]) -> None:
    """Neither the Ingress nor the HTTPRoute leads to anything but the data port's API, unbuffered and patient."""
    ingress = chart.find(mixed, "Ingress", "penstock-gateway")
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/v1", "Prefix")
    assert path["backend"]["service"] == {"name": "penstock-gateway", "port": {"number": 8080}}
    nginx = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
    assert nginx["proxy-buffering"] == "off"
    assert nginx["proxy-next-upstream"] == "off"
    assert int(nginx["proxy-read-timeout"]) > 600
    (route,) = chart.find(mixed, "HTTPRoute", "penstock-gateway")["spec"]["rules"]
    assert route["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert route["backendRefs"] == [{"name": "penstock-gateway", "port": 8080}]


def test_the_load_test_has_its_key_by_reference() -> None:
    """Its Job calls the gateway's Service with the arguments of the load test's command."""
    load_test = {"enabled": True, "model": "llama-3.1-8b", "ratePerSecond": 2.5, "apiKey": {"existingSecret": "caller"}}
    manifests = chart.render(chart.merged(VIRTUAL, {"loadTest": load_test}))
    (container,) = chart.pod(manifests, "loadtest").containers
    assert container["args"] == [
        *("--url", "http://penstock-gateway.penstock.svc:8080", "--model", "llama-3.1-8b"),
        *("--rate", "2.5", "--duration-s", "60"),
    ]
    assert container["env"][0]["valueFrom"] == {"secretKeyRef": {"name": "caller", "key": "key"}}


def test_an_own_profile_goes_where_it_is_read() -> None:
    """Into the config's folder for gateway and controller, to the virtual GPU, and into labels and arguments."""
    profile = json.loads(dump_profile(load_profile("h200-llama-3.1-8b"))) | {"name": "our-h200"}
    engines = [
        {**VIRTUAL["engines"][0], "name": "ours", "profile": "our-h200.json", "gpu": "H200"},
        {"name": "real", "model": "llama-3.1-8b", "profile": "our-h200.json", "device": "gpu", "replicas": 1}
        | {"modelPath": "/models/llama", "gpusPerReplica": 2},
    ]
    values = VIRTUAL | {"engines": engines[:1], "profiles": {"our-h200.json": json.dumps(profile)}}
    manifests = chart.render(values)
    (virtual,) = chart.pod(manifests, "engine-ours").containers
    path = virtual["args"][virtual["args"].index("--profile") + 1]
    assert {"name": "config", "mountPath": path.rpartition("/")[0], "readOnly": True} in virtual["volumeMounts"]
    service = chart.find(manifests, "Service", "penstock-engine-ours")
    assert service["metadata"]["labels"]["penstock.io/profile"] == "our-h200"
    for component in ("gateway", "controller"):
        (config,) = [v for v in chart.pod(manifests, component).spec["volumes"] if v["name"] == "config"]
        assert {"key": "our-h200.json", "path": "profiles/our-h200.json"} in config["configMap"]["items"]
    (real,) = chart.pod(chart.render(values | {"engines": engines[1:]}), "engine-real").containers
    assert real["args"][-2:] == ["--tensor-parallel-size", "2"]
    assert real["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_a_gateway_restarts_only_for_what_it_reads_at_its_start() -> None:
    """Pools and tiers reach it from the controller; its own section does not."""

    def checksum(config: dict[str, Any]) -> str:
        manifests = chart.render(chart.merged(VIRTUAL, {"config": config}))
        template = chart.find(manifests, "Deployment", "penstock-gateway")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum({"orgs": [{"name": "other"}]}) == checksum({})
    assert checksum({"gateway": {"request_timeout_s": 60}}) != checksum({})


class _Answers(BaseHTTPRequestHandler):
    """A gateway as far as the smoke test asks it: answers by path."""

    answers: dict[str, tuple[int, bytes]]

    def do_GET(self) -> None:
        """Answer as told."""
        status, body = self.answers[self.path]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the class above
        """Say nothing."""


@pytest.fixture
def gateway_url() -> Iterator[str]:
    """A server that answers as ``_Answers.answers`` says."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(timeout=10)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ({"/health": (200, b"ok"), "/v1/models": (401, b'{"error": {"message": "no key"}}')}, None),
        ({"/health": (503, b"no limits yet")}, "503"),
        ({"/health": (200, b"ok"), "/v1/models": (200, b"{}")}, "not 401"),
        ({"/health": (200, b"ok"), "/v1/models": (401, b"<html>")}, "not an OpenAI error"),
    ],
)
def test_helm_test_tells_a_gateway_from_what_is_none(
    answers: dict[str, tuple[int, bytes]], problem: str | None, gateway_url: str
) -> None:
    """The script of the rendered pod is satisfied by a gateway alone, and says what is wrong with anything else."""
    _Answers.answers = answers
    (container,) = chart.pod(chart.render(VIRTUAL), "test").containers
    assert container["command"][:2] == ["python", "-c"]
    script = container["command"][2]
    names: dict[str, Any] = {"__name__": "smoke"}
    exec(script, names)  # noqa: S102 - our own file, as the pod runs it
    found = names["problem"](gateway_url, gateway_url)
    assert (found is None) if problem is None else problem in found
