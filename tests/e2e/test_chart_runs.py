"""What the chart starts, run as rendered: every container's command line, environment, files, user and probes.

There is no container engine: pods are processes in namespaces (see ``tests/support/node.py``). Redis is real, the GPUs
are virtual, and the API server is a small one that speaks list and watch. The tests of a release follow each other as
its days do: what ends a pod comes last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import openai
import pytest

from tests.support import chart
from tests.support.cluster import Cluster, RunningPod
from tests.support.commands import read_page
from tests.support.node import REPOSITORY, why_not
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

MODEL = "llama-3.1-8b"
CONFIG = "/etc/penstock/penstock.yaml"
#: Shorter waits than the file's, so that the test ends; what waits is the same.
CHANGES: Mapping[str, Any] = {
    "gateway": {"replicas": 2, "drainDelaySeconds": 2},
    "engineDefaults": {"virtual": {"preStopSeconds": 2}},
}
KEY_SECRET = "penstock-loadtest-key"  # the Secret's name
LOAD_TEST: Mapping[str, Any] = {
    "enabled": True,
    "model": MODEL,
    "apiKey": {"existingSecret": KEY_SECRET},
    "ratePerSecond": 2,
    "durationSeconds": 5,
    "extraArgs": ["--scale", "0.05"],
}
READY_S = 60.0
FOLLOW_S = 30.0
ANSWER_S = 60.0
#: At 1:15 speed a stream of so many tokens lasts longer than the waits above, and less than the drain time.
STREAM_TOKENS = 120
#: How a process ends that does nothing about SIGTERM but end, or ends well.
ENDS = (0, 128 + 15, -15)


class Release:
    """The trial on virtual GPUs, as `helm install` leaves it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.redis = self.start("redis")
        self.engines = [self.start("engine-h100"), self.start("engine-h200")]
        self.until_ready(self.redis)
        self.controller = self.start("controller")
        self.gateways = [self.start("gateway"), self.start("gateway")]
        for pod in [*self.engines, self.controller, *self.gateways]:
            self.until_ready(pod)
        done = self.penstock("keys", "create", "--org", "demo", "--tier", "pro", "--name", "trial", "--config", CONFIG)
        self.key = done.strip()

    def start(self, component: str) -> RunningPod:
        """One more pod of a component."""
        return self.cluster.start(chart.pod(self.cluster.manifests, component))

    def until_ready(self, pod: RunningPod) -> None:
        """Wait for it, and let the cluster know."""
        pod.until_started()
        self.cluster.settle()
        pod.until_ready(READY_S)
        self.cluster.settle()

    def penstock(self, *words: str) -> str:
        """`kubectl exec deployment/penstock-controller -- penstock …`: what it said."""
        done = self.controller.container.execute("penstock", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def publication(self) -> Any:
        """The limits in force at the first gateway, by its admin port and the rendered Secret's token."""
        token = self.cluster.objects.secrets["penstock-admin-token"]["token"].decode()
        headers = {"authorization": f"Bearer {token}"}
        return httpx.get(self.gateways[0].url("admin") + "/limits", headers=headers, timeout=10).json()

    def replicas(self) -> dict[str, str]:
        """The GPU types of the replicas that the limits in force count on, by URL."""
        return {replica["url"]: replica["gpu"] for replica in self.publication()["pools"][0]["replicas"]}

    def output_limit(self) -> int:
        """Output tokens a minute of a key of the tier pro."""
        limits = next(tier for tier in self.publication()["tiers"] if tier["tier"] == "pro")["limits"]
        return int(next(limit["per_minute"] for limit in limits if limit["name"] == "output_tokens"))

    def client(self, gateway: RunningPod) -> openai.OpenAI:
        """The official client with the key, at one gateway."""
        return openai.OpenAI(base_url=gateway.url("http") + "/v1", api_key=self.key, timeout=ANSWER_S, max_retries=0)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """Every pod of the release, ready."""
    manifests = chart.render(chart.merged(chart.values_of("virtual"), CHANGES))
    with Cluster(tmp_path_factory.mktemp("cluster"), manifests) as cluster:
        try:
            running = Release(cluster)
        except BaseException:
            print(cluster.logs())
            raise
        yield running


def test_everything_starts_and_answers_its_probes(release: Release) -> None:
    """Every container of the trial starts within its startup probe's time, is ready, and stays alive."""
    started = {pod.plan.labels["app.kubernetes.io/component"] for pod in release.cluster.pods}
    workloads = {pod.labels["app.kubernetes.io/component"] for pod in chart.pods(release.cluster.manifests)}

    assert started == workloads - {"test"}
    assert [pod.plan.name for pod in release.cluster.pods if not (pod.is_ready and pod.is_live())] == []


def test_containers_run_as_nobody_on_a_root_that_cannot_be_written(release: Release) -> None:
    """What this file runs is as restricted as a container: else it would prove less than it says."""
    for pod in release.cluster.pods:
        done = pod.container.execute(
            "sh", "-c", "id -u; touch /etc/here || echo refused; ls /tmp > /dev/null && echo ok"
        )
        assert done.stdout.split() == [str(pod.plan.container.uid), "refused", "ok"], done
        assert pod.plan.container.uid > 0


def test_it_finds_its_fleet(release: Release) -> None:
    """The controller finds both groups by their Services' EndpointSlices, each with its own GPU type."""
    expected = {
        f"http://{engine.address}:8000": gpu for engine, gpu in zip(release.engines, ("H100", "H200"), strict=True)
    }

    assert eventually(lambda: release.replicas() == expected, FOLLOW_S, "limits of both replicas")


def test_the_pages_commands_run_in_the_controllers_pod(release: Release) -> None:
    """Every `kubectl exec` of docs/deploy.md that changes nothing, or makes a key, runs there."""
    page = read_page(
        (REPOSITORY / "docs" / "deploy.md").read_text(), dict.fromkeys(("KEY", "HF_TOKEN", "REDIS_PASSWORD"), "")
    )
    inner = [
        words[words.index("--") + 1 :]
        for words in page.of("kubectl", "--namespace", "penstock", "exec", "deployment/penstock-controller")
    ]
    said = {}
    for words in inner:
        if "--extract" in words or "approve" in words:  # what they need is not there
            continue
        done = release.controller.container.execute(*words)
        assert done.returncode == 0, (words, done.stderr)
        said[" ".join(words[:3])] = done.stdout

    assert {
        "penstock keys create",
        "penstock keys list",
        "penstock limits explain",
        "penstock check " + CONFIG,
    } <= said.keys()
    assert "1 × H100" in said["penstock limits explain"]
    assert "trial" in said["penstock keys list"]
    assert said["tar --create --gzip"]


def test_a_caller_is_answered_by_every_gateway(release: Release) -> None:
    """A key made in the controller's pod is known at both gateways, and a model answers it."""
    for gateway in release.gateways:
        with release.client(gateway) as client:
            answer = client.chat.completions.create(
                model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "How much water passes the sluice?"}]
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5


def test_helm_test_passes(release: Release) -> None:
    """`helm test`'s pod finds the gateways by the Services' names, and exits 0 within its deadline."""
    spec = chart.pod(release.cluster.manifests, "test")
    pod = release.cluster.start(spec)

    assert pod.container.wait(spec.spec["activeDeadlineSeconds"]) == 0, pod.container.log()
    assert "ready, and a caller without a key is told" in pod.container.log()


def test_the_load_tests_job_ends_well(release: Release) -> None:
    """The Job's container sends its load with the Secret's key; no request fails, and the log's last line says so."""
    values = chart.merged(chart.merged(chart.values_of("virtual"), CHANGES), {"loadTest": LOAD_TEST})
    release.cluster.objects = release.cluster.objects.with_secret(KEY_SECRET, key=release.key)
    pod = release.cluster.start(chart.pod(chart.render(values), "loadtest"))

    assert pod.container.wait(120) == 0, pod.container.log()
    summary = json.loads(pod.container.log().splitlines()[-1])
    assert summary["requests"] > 0
    assert summary["fates"].keys() <= {"admitted", "throttled"}, summary


def test_scaling_a_group_raises_the_limits(release: Release) -> None:
    """One more engine of a group, ready by its probe, is found and raises every key's limits."""
    before = release.output_limit()
    engine = release.start("engine-h100")
    release.engines.append(engine)
    release.until_ready(engine)

    eventually(lambda: f"http://{engine.address}:8000" in release.replicas(), FOLLOW_S, "limits with the new replica")
    assert release.output_limit() > before


def test_a_gateway_that_ends_lets_its_stream_finish(release: Release) -> None:
    """Told to end in mid-stream, a gateway turns unready, serves the stream to its end, and exits in its time."""
    gateway = release.gateways.pop()
    with release.client(gateway) as client:
        stream = client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=STREAM_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        left_s = release.cluster.begin_end(gateway)
        eventually(lambda: not gateway.ask_ready(), left_s, "the gateway's unreadiness")
        assert not gateway.container.has_ended, gateway.container.log()
        rest = list(stream)

    assert len(rest) > STREAM_TOKENS / 2
    assert rest[-1].choices[0].finish_reason == "length"
    assert gateway.container.wait(left_s) == 0, gateway.container.log()


def test_an_engine_that_ends_takes_its_limits_along(release: Release) -> None:
    """An engine ends within its grace after its preStop; limits fall, and callers are served by the others."""
    before, engine = release.output_limit(), release.engines.pop()

    assert release.cluster.end(engine) in ENDS, engine.container.log()
    eventually(
        lambda: f"http://{engine.address}:8000" not in release.replicas(), FOLLOW_S, "limits without the replica"
    )
    assert release.output_limit() < before
    with release.client(release.gateways[0]) as client:
        assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=2).usage is not None


def test_a_controllers_successor_knows_what_it_knew(release: Release) -> None:
    """The controller exits 0 in its time; its successor finds keys and limits on the claim, and goes on."""
    epoch = release.publication()["epoch"]
    assert release.cluster.end(release.controller) == 0, release.controller.container.log()
    with release.client(release.gateways[0]) as client:
        assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=2).usage is not None

    release.controller = release.start("controller")
    release.until_ready(release.controller)
    assert "trial" in release.penstock("keys", "list", "--config", CONFIG)
    assert release.publication()["epoch"] >= epoch


def test_redis_ends_in_its_time(release: Release) -> None:
    """The bundled Redis exits 0 on SIGTERM."""
    assert release.cluster.end(release.redis) == 0, release.redis.container.log()
