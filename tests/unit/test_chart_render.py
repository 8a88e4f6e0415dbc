"""Every values file gives objects that Kubernetes takes, and that fit each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ratelimit.config import Config, load_config
from serving.engine.command import EngineSpec, engine_argv
from serving.profile import load_profile
from tests.support import chart
from tests.support.chart import Manifest
from tests.support.chart_checks import wiring_problems

#: Secrets and claims that the values files ask their reader to make.
MADE_BY_THE_READER = {"penstock-redis", "penstock-redis-ca", "penstock-admin", "models"}


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


def test_all_objects_fit_each_other(manifests: list[Manifest]) -> None:
    """Selectors, ports, references, secrets and the hardening of every pod: see each check for what it proves."""
    assert wiring_problems(manifests, MADE_BY_THE_READER) == []


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda pod: pod["metadata"]["labels"].update({"app.kubernetes.io/component": "gatway"}), "selects"),
        (lambda pod: _container(pod).update(ports=[]), "leads to a port"),
        (lambda pod: _container(pod)["livenessProbe"]["httpGet"].update(port="amdin"), "probes a port"),
        (lambda pod: _container(pod)["env"][0]["valueFrom"]["secretKeyRef"].update(key="uri"), "needs ['uri'] in"),
        (lambda pod: pod["spec"]["volumes"][1]["secret"].update(secretName="none"), "which nobody makes"),
        (lambda pod: pod["spec"]["volumes"].pop(), "mounts"),
        (lambda pod: _container(pod)["env"].append({"name": "HF_TOKEN", "value": "x"}), "by value"),
        (lambda pod: pod["spec"].update(automountServiceAccountToken=True), "has a token of the API"),
        (lambda pod: _container(pod)["securityContext"].update(readOnlyRootFilesystem=False), "write to its root"),
        (lambda pod: _container(pod)["resources"].update(limits={}), "has no bounds"),
    ],
)
def test_what_does_not_fit_is_found(broken: Callable[[dict[str, Any]], object], problem: str) -> None:
    """The checks above see each kind of mistake."""
    manifests = chart.render(chart.values_of("virtual"))
    template = chart.find(manifests, "Deployment", "penstock-gateway")["spec"]["template"]
    broken(template)
    assert any(problem in found for found in wiring_problems(manifests))


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


def test_the_longest_names_are_cut_and_stay_apart() -> None:
    """Pods and revisions get a suffix of Kubernetes' own; groups that differ in the last letter keep two names."""
    values = chart.values_of("virtual")
    values["engines"] = [group | {"name": "g" * 29 + last} for group, last in zip(values["engines"], "ab", strict=True)]
    manifests = chart.render(values, name="r" * 53)
    names = [m["metadata"]["name"] for m in manifests if m["kind"] == "Deployment"]
    assert len(set(names)) == len(names) == 4
    assert all(len(name) <= 52 for name in names)
    assert wiring_problems(manifests) == []


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


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod["spec"]["containers"][0]
    return container


def _names(manifests: list[Manifest]) -> set[tuple[str, str]]:
    return {(m["kind"], m["metadata"]["name"]) for m in manifests}


def _selector(config: Config) -> str:
    (pool,) = config.pools
    assert pool.discover
    return pool.discover.selector
