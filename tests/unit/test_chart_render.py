"""Every values file gives objects that Kubernetes takes, and that fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ratelimit.config import Config, load_config
from serving.engine.command import EngineSpec, engine_argv
from serving.profile import load_profile
from tests.support import chart
from tests.support.chart import Manifest, Pod

#: Secrets and claims that the values files ask their reader to make.
MADE_BY_THE_READER = {"penstock-redis", "penstock-redis-ca", "penstock-admin", "huggingface", "models"}


@pytest.fixture(params=chart.VALUES_FILES, scope="module")
def values_file(request: pytest.FixtureRequest) -> str:
    """Each of the values files."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def manifests(values_file: str) -> list[Manifest]:
    """What the values file renders to."""
    return chart.render(chart.values_of(values_file))


def test_helm_lints_the_chart_without_a_finding(values_file: str) -> None:
    """Strict linting, which includes the schema of the values, finds nothing."""
    assert chart.lint_findings(chart.values_of(values_file)) == []


@pytest.mark.parametrize("version", chart.KUBERNETES_VERSIONS)
def test_every_manifest_is_valid_in_each_kubernetes(manifests: list[Manifest], version: str) -> None:
    """No unknown field, no wrong type, in any of the versions."""
    assert [problem for manifest in manifests for problem in chart.schema_problems(manifest, version)] == []


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    """The check above sees a typo."""
    deployment = chart.find(chart.render(chart.values_of("virtual")), "Deployment", "penstock-gateway")
    deployment["spec"]["replica"] = deployment["spec"].pop("replicas")
    assert "'replica' was unexpected" in " ".join(chart.schema_problems(deployment, chart.KUBERNETES_VERSIONS[-1]))


def test_the_config_in_the_config_map_is_one_that_penstock_takes(manifests: list[Manifest], tmp_path: Path) -> None:
    """The service's own check passes, and every pool has a fleet."""
    config = load_config(chart.write_config(manifests, tmp_path))
    assert all(pool.discover or pool.replicas for pool in config.pools)
    assert config.gateway.admin_token_file == Path("/etc/penstock-admin/token")


def test_a_pool_finds_the_services_of_its_engine_groups_and_no_others(
    manifests: list[Manifest], tmp_path: Path
) -> None:
    """The selector of the config picks exactly the Services of the model, whose labels name a profile of the pool."""
    config = load_config(chart.write_config(manifests, tmp_path))
    services = [m for m in chart.of_kind(manifests, "Service") if "penstock.io/pool" in m["metadata"]["labels"]]
    for pool in config.pools:
        if pool.discover is None or pool.discover.namespace != "penstock":
            continue
        wanted = dict(part.split("=") for part in pool.discover.selector.split(","))
        found = [s for s in services if wanted.items() <= s["metadata"]["labels"].items()]
        profiles = {load_profile(name).name for name in pool.discover.profiles}
        assert {s["metadata"]["labels"]["penstock.io/profile"] for s in found} == profiles
        assert {port["name"] for s in found for port in s["spec"]["ports"]} == {pool.discover.port}
        services = [s for s in services if s not in found]
    assert services == []


def test_every_gateway_lives_as_long_as_its_streams_may(manifests: list[Manifest], tmp_path: Path) -> None:
    """The kubelet's patience outlasts the drain that the config promises, with the settling."""
    gateway = load_config(chart.write_config(manifests, tmp_path)).gateway
    patience_s = chart.pod(manifests, "gateway").spec["terminationGracePeriodSeconds"]
    assert patience_s >= gateway.drain_delay_s + gateway.drain_s + 5 + 5


def test_selectors_pick_the_pods_that_they_are_meant_for(manifests: list[Manifest]) -> None:
    """Each workload selects its own pods alone; each Service, budget and monitor selects something."""
    pods = chart.pods(manifests)
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            wanted = manifest["spec"]["selector"]["matchLabels"]
            assert [pod.owner for pod in pods if wanted.items() <= pod.labels.items()] == [
                f"{manifest['kind']}/{manifest['metadata']['name']}"
            ]
    for manifest in manifests:
        if manifest["kind"] in ("Service", "PodDisruptionBudget"):
            selector = manifest["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= pod.labels.items() for pod in pods), manifest["metadata"]["name"]


def test_services_and_probes_name_ports_that_there_are(manifests: list[Manifest]) -> None:
    """A port that is misspelt would be found when nothing answers."""
    pods = chart.pods(manifests)
    for service in chart.of_kind(manifests, "Service"):
        wanted = service["spec"]["selector"]
        targets = [pod for pod in pods if wanted.items() <= pod.labels.items()]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(targets[0].ports)
    for pod in pods:
        assert {probe["port"] for probe in _probes(pod)} <= set(pod.ports)


def test_service_monitors_scrape_ports_of_services_that_there_are(manifests: list[Manifest]) -> None:
    """Each monitor selects a Service by its labels, and a port of it by its name."""
    for monitor in chart.of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        services = [m for m in chart.of_kind(manifests, "Service") if wanted.items() <= m["metadata"]["labels"].items()]
        assert services
        for service in services:
            assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_what_pods_refer_to_is_there(manifests: list[Manifest]) -> None:
    """ConfigMaps with their keys, Secrets, claims, accounts and volumes: made by the chart, or by its reader."""
    made = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    keys = {m["metadata"]["name"]: set(m["data"]) for m in manifests if m["kind"] in ("ConfigMap", "Secret")}
    for pod in chart.pods(manifests):
        for kind, name, wanted in _references(pod):
            assert (kind, name) in made or name in MADE_BY_THE_READER, (pod.owner, kind, name)
            assert name not in keys or wanted <= keys[name], (pod.owner, kind, name, wanted)
        for container in pod.containers:
            mounted = [mount["name"] for mount in container.get("volumeMounts", ())]
            assert set(mounted) == set(pod.volumes)
            assert len({mount["mountPath"] for mount in container["volumeMounts"]}) == len(mounted)


def test_no_secret_is_readable_outside_a_secret(manifests: list[Manifest]) -> None:
    """Neither config maps nor command lines nor environments hold one, and the Redis URL comes by reference."""
    secrets = {value for m in chart.of_kind(manifests, "Secret") for value in m["data"].values()}
    for manifest in manifests:
        if manifest["kind"] != "Secret":
            assert not secrets & set(chart.strings_in(manifest))
    for component in ("gateway", "controller"):
        (url,) = [e for e in chart.pod(manifests, component).containers[0]["env"] if e["name"] == "PENSTOCK_REDIS_URL"]
        assert set(url) == {"name", "valueFrom"}
        assert set(url["valueFrom"]) == {"secretKeyRef"}


def test_every_pod_is_nobody(manifests: list[Manifest]) -> None:
    """The restricted profile of the Pod Security Standards, a read-only root, bounds, and no API token but one."""
    for pod in chart.pods(manifests):
        outer = pod.spec["securityContext"]
        assert outer["runAsNonRoot"] is True
        assert outer["runAsUser"] > 0
        assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
        is_watching = pod.labels["app.kubernetes.io/component"] == "controller"
        assert pod.spec["automountServiceAccountToken"] is False or is_watching
        for container in pod.containers:
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False
            assert inner["readOnlyRootFilesystem"] is True
            assert inner["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]
            assert "memory" in container["resources"]["limits"]
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]  # noqa: S108 - a mount, not a file


def test_the_controller_may_watch_where_its_config_looks(manifests: list[Manifest], tmp_path: Path) -> None:
    """A role with its binding in each namespace, and nothing else allowed."""
    config = load_config(chart.write_config(manifests, tmp_path))
    watched = {pool.discover.namespace for pool in config.pools if pool.discover}
    roles = chart.of_kind(manifests, "Role")
    assert {role["metadata"]["namespace"] for role in roles} == watched
    allowed = [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}]
    assert all(role["rules"] == allowed for role in roles)
    account = chart.pod(manifests, "controller").spec["serviceAccountName"]
    for binding in chart.of_kind(manifests, "RoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "penstock"}]
        chart.find(
            [role for role in roles if role["metadata"]["namespace"] == binding["metadata"]["namespace"]],
            "Role",
            binding["roleRef"]["name"],
        )


def test_a_gpu_engine_is_started_as_penstock_itself_starts_one() -> None:
    """The arguments for vLLM are those of `penstock up`, limits and parallelism of the profile included."""
    values = chart.values_of("mixed")
    manifests = chart.render(values)
    for group in values["engines"]:
        container = chart.pod(manifests, f"engine-{group['name']}").containers[0]
        profile = load_profile(group["profile"])
        spec = EngineSpec("gpu", group["model"], 8000, "0.0.0.0", profile, model_path=group["modelPath"])
        assert container["command"] == ["vllm", "serve"]
        assert container["args"] == engine_argv(spec, None)[4:]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == profile.gpus_per_replica


def test_two_installs_in_one_namespace_share_no_name_and_no_engine(tmp_path: Path) -> None:
    """Names and selectors carry the release."""
    values = chart.values_of("virtual")
    first, second = (chart.render(values, name=name) for name in ("one", "two"))
    assert not _names(first) & _names(second)
    for name, manifests in (("one", first), ("two", second)):
        config = load_config(chart.write_config(manifests, tmp_path / name))
        assert f"app.kubernetes.io/instance={name}" in _selector(config)


def test_generated_secrets_are_long_and_new_each_time() -> None:
    """Without a cluster to look them up in, each render draws its own."""
    values = chart.values_of("virtual")
    first, second = (chart.of_kind(chart.render(values), "Secret") for _ in range(2))
    assert len(first) == 2
    for one, other in zip(first, second, strict=True):
        assert one["data"] != other["data"]
        assert all(len(value) >= 64 for value in one["data"].values())
        assert one["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_notes_name_commands_of_this_release() -> None:
    """What people copy from NOTES names the objects that are there."""
    notes = chart.render_text(chart.values_of("virtual"), name="demo", namespace="llm")["penstock/templates/NOTES.txt"]
    assert "deploy/demo-penstock-controller" in notes
    assert "kubectl -n llm" in notes


def _probes(pod: Pod) -> Iterator[dict[str, Any]]:
    for container in pod.containers:
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            yield from (probe[how] for how in ("httpGet", "tcpSocket") if how in probe)


def _references(pod: Pod) -> Iterator[tuple[str, str, set[str]]]:
    """What a pod needs to be there: (kind, name, keys in it)."""
    if "serviceAccountName" in pod.spec:
        yield "ServiceAccount", pod.spec["serviceAccountName"], set()
    for volume in pod.spec.get("volumes", ()):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], {item["key"] for item in volume["configMap"]["items"]}
        if "secret" in volume:
            wanted = {item["key"] for item in volume["secret"].get("items", ())}
            yield "Secret", volume["secret"]["secretName"], wanted
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], set()
    for container in pod.containers:
        for variable in container.get("env", ()):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                yield "Secret", reference["name"], {reference["key"]}


def _names(manifests: list[Manifest]) -> set[tuple[str, str]]:
    return {(m["kind"], m["metadata"]["name"]) for m in manifests}


def _selector(config: Config) -> str:
    (pool,) = config.pools
    assert pool.discover
    return pool.discover.selector
