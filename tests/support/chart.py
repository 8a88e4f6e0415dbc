"""The Helm chart as a cluster would get it: rendered and linted by the Helm library, checked by Kubernetes' schemas."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import helm_python
import yaml
from jsonschema.validators import Draft202012Validator  # type: ignore[import-untyped]  # it ships no types
from kubernetes_validate.utils import schema_contents  # type: ignore[import-untyped]  # nor does this
from referencing import Registry, Resource

Manifest: TypeAlias = dict[str, Any]
Values: TypeAlias = Mapping[str, Any]

CHART = Path(__file__).parents[2] / "charts" / "penstock"
#: The sets of values that the chart ships, by the middle of their files' names.
VALUES_FILES = ("trial-gpu", "mixed", "existing-vllm", "virtual")
#: The oldest Kubernetes that Chart.yaml promises, and the newest three whose schemas are at hand.
KUBERNETES_VERSIONS = ("1.30.0", "1.35.0", "1.36.0", "1.37.0")
#: Groups of custom resources, which Kubernetes' own schemas do not know.
CUSTOM_GROUPS = ("monitoring.coreos.com", "gateway.networking.k8s.io", "keda.sh")
#: What has pods, and where its template is.
_TEMPLATES = {"Deployment": ("spec", "template"), "StatefulSet": ("spec", "template"), "Job": ("spec", "template")}


class Pod(NamedTuple):
    """A pod as a workload of the chart makes it."""

    owner: str
    namespace: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    #: Names of volumes that each pod gets a claim of its own for.
    claimed: tuple[str, ...] = ()

    @property
    def volumes(self) -> list[str]:
        """The names of all its volumes."""
        return [*(volume["name"] for volume in self.spec.get("volumes", ())), *self.claimed]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All its containers, those of its start included."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        """The numbers of its ports, by name."""
        return {port["name"]: port["containerPort"] for c in self.containers for port in c.get("ports", ())}


def values_of(file: str) -> dict[str, Any]:
    """What one of the chart's values files says."""
    values: dict[str, Any] = yaml.safe_load((CHART / f"values-{file}.yaml").read_text())
    return values


def merged(base: Values, changes: Values) -> dict[str, Any]:
    """``changes`` over ``base``, mapping by mapping, as Helm merges values."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def with_setting(values: Values, setting: str) -> dict[str, Any]:
    """As ``--set`` does it over values files: `list[0].field=…` changes one entry, all else is put in its place."""
    path = setting.partition("=")[0]
    if "[" not in path:
        return merged(values, helm_python.parse_set_string(setting))
    root = path.partition("[")[0].partition(".")[0]
    changed = helm_python.parse_set_json(f"{root}={json.dumps(values[root])},{setting}")
    return dict(values) | changed


def render_text(
    values: Values, name: str = "penstock", namespace: str = "penstock", path: Path = CHART
) -> dict[str, str]:
    """Every template's text by its path. Raises ``helm_python.HelmError`` for values that the chart refuses."""
    with helm_python.Chart.load(path) as chart:
        return chart.render(dict(values), name=name, namespace=namespace)


def render(values: Values, name: str = "penstock", namespace: str = "penstock", path: Path = CHART) -> list[Manifest]:
    """What `helm install` would send to the API server, `helm test` and its like included."""
    texts = render_text(values, name, namespace, path)
    return [
        manifest
        for template, text in sorted(texts.items())
        if template.endswith(".yaml")
        for manifest in yaml.load_all(text, yaml.CSafeLoader)  # in C: an example of a property is read in no time
        if manifest is not None
    ]


def lint_findings(values: Values) -> list[str]:
    """What `helm lint --strict` objects to; that there is no icon is no objection."""
    report = helm_python.lint(CHART, dict(values), strict=True)
    return [*report["errors"], *(found["error"] for found in report["messages"] if found["severity"] > 1)]


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one object of this kind and name."""
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """All objects of this kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pods(manifests: list[Manifest]) -> list[Pod]:
    """One pod of each workload."""
    found = []
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            template = manifest
        elif manifest["kind"] in _TEMPLATES:
            template = functools.reduce(lambda part, key: part[key], _TEMPLATES[manifest["kind"]], manifest)
        else:
            continue
        name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
        claimed = tuple(claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", ()))
        owner = f"{manifest['kind']}/{name}"
        found.append(Pod(owner, namespace, template["metadata"]["labels"], template["spec"], claimed))
    return found


def pod(manifests: list[Manifest], component: str) -> Pod:
    """The pod of one component, such as ``gateway`` or ``engine-h100``."""
    (found,) = [pod for pod in pods(manifests) if pod.labels["app.kubernetes.io/component"] == component]
    return found


def write_config(manifests: list[Manifest], folder: Path) -> Path:
    """The config and the profiles as the pods see them, in ``folder``; gives the path of penstock.yaml."""
    (data,) = [m["data"] for m in of_kind(manifests, "ConfigMap") if "penstock.yaml" in m["data"]]
    (folder / "profiles").mkdir(parents=True, exist_ok=True)
    for name, text in data.items():
        (folder / name if name == "penstock.yaml" else folder / "profiles" / name).write_text(text)
    return folder / "penstock.yaml"


def schema_problems(manifest: Manifest, version: str) -> list[str]:
    """What a Kubernetes of this version would refuse; nothing is known of custom resources."""
    if manifest["apiVersion"].partition("/")[0] in CUSTOM_GROUPS:
        return []
    validator = _validator(manifest["kind"], manifest["apiVersion"], version)
    where = f"{manifest['kind']}/{manifest['metadata']['name']}"
    return [f"{where} {error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def strings_in(value: object) -> Iterator[str]:
    """Every string within a document, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)


@functools.cache
def _validator(kind: str, api_version: str, version: str) -> Any:
    """As ``kubernetes_validate.validate`` with ``strict``, which reads all definitions anew for each manifest."""
    group, _, number = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], number)))
    schema = schema_contents(f"kubernetes-json-schema/v{version}-local-strict/{name}.json", version)
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    path = f"kubernetes-json-schema/v{version}-local-strict/_definitions.json"
    definitions: Resource[Any] = Resource.from_contents(schema_contents(path, version))
    return definitions @ Registry()
