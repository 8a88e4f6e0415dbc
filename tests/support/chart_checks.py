"""What must be true of whatever the chart renders; each check gives the problems it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tests.support.chart import Manifest, Pod, of_kind, pods, strings_in

_LONGEST_NAME = 63
_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def wiring_problems(manifests: list[Manifest], made_elsewhere: Collection[str] = ()) -> list[str]:
    """All of the below."""
    return [
        *_name_problems(manifests),
        *_selector_problems(manifests),
        *_port_problems(manifests),
        *_reference_problems(manifests, made_elsewhere),
        *_secret_problems(manifests),
        *(problem for pod in pods(manifests) for problem in _hardening_problems(pod)),
    ]


def _name_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Names are unique, and short enough for where Kubernetes puts them."""
    names = Counter((m["kind"], m["metadata"]["namespace"], m["metadata"]["name"]) for m in manifests)
    yield from (f"{name} is there {count} times" for name, count in names.items() if count > 1)
    yield from (f"{name} is too long" for name in names if len(name[2]) > _LONGEST_NAME)


def _selector_problems(manifests: list[Manifest]) -> Iterator[str]:
    """A workload selects its own pods alone; a Service or a budget selects some; a monitor selects a Service."""
    for manifest in manifests:
        spec, owner = manifest.get("spec", {}), f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            selected = _selected(manifests, spec["selector"]["matchLabels"])
            if [pod.owner for pod in selected] != [owner]:
                yield f"{owner} selects {selected}"
        elif manifest["kind"] in ("Service", "PodDisruptionBudget"):
            if not _selected(manifests, spec["selector"].get("matchLabels", spec["selector"])):
                yield f"{owner} selects no pod"
        elif manifest["kind"] == "ServiceMonitor":
            yield from _monitor_problems(manifests, owner, spec)


def _monitor_problems(manifests: list[Manifest], owner: str, spec: Mapping[str, Any]) -> Iterator[str]:
    wanted = spec["selector"]["matchLabels"]
    services = [m for m in of_kind(manifests, "Service") if wanted.items() <= m["metadata"]["labels"].items()]
    if not services:
        yield f"{owner} selects no service"
    for service in services:
        if spec["endpoints"][0]["port"] not in {port["name"] for port in service["spec"]["ports"]}:
            yield f"{owner} scrapes a port that {service['metadata']['name']} has not"


def _port_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Services, probes and policies name ports that the pods have."""
    for service in of_kind(manifests, "Service"):
        for pod in _selected(manifests, service["spec"]["selector"]):
            if not {port["targetPort"] for port in service["spec"]["ports"]} <= set(pod.ports):
                yield f"Service/{service['metadata']['name']} leads to a port that {pod.owner} has not"
    for pod in pods(manifests):
        if not {check["port"] for check in _probe_targets(pod)} <= set(pod.ports):
            yield f"{pod.owner} probes a port that it has not"


def _reference_problems(manifests: list[Manifest], made_elsewhere: Collection[str]) -> Iterator[str]:
    """ConfigMaps with their keys, Secrets, claims, accounts and volumes are there."""
    made = {(m["kind"], m["metadata"]["name"]): set(m.get("data", ())) for m in manifests}
    for pod in pods(manifests):
        for kind, name, keys in _references(pod):
            if (kind, name) not in made and name not in made_elsewhere:
                yield f"{pod.owner} needs {kind}/{name}, which nobody makes"
            elif not keys <= made.get((kind, name), keys):
                yield f"{pod.owner} needs {sorted(keys)} in {kind}/{name}"
        for container in pod.containers:
            mounts = container.get("volumeMounts", ())
            if sorted(mount["name"] for mount in mounts) != sorted(pod.volumes):
                yield f"{pod.owner} mounts {mounts}, and has {pod.volumes}"
            if len({mount["mountPath"] for mount in mounts}) != len(mounts):
                yield f"{pod.owner} mounts two volumes in one place"


def _secret_problems(manifests: list[Manifest]) -> Iterator[str]:
    """No secret is readable outside a Secret, and the URL of Redis comes by reference."""
    secrets = {value for m in of_kind(manifests, "Secret") for value in m["data"].values()}
    for manifest in manifests:
        if manifest["kind"] != "Secret" and secrets & set(strings_in(manifest)):
            yield f"{manifest['kind']}/{manifest['metadata']['name']} holds a secret"
    for pod in pods(manifests):
        for variable in (v for container in pod.containers for v in container.get("env", ())):
            if variable["name"] in ("PENSTOCK_REDIS_URL", "HF_TOKEN", "PENSTOCK_API_KEY") and "value" in variable:
                yield f"{pod.owner} has {variable['name']} by value"


def _hardening_problems(pod: Pod) -> Iterator[str]:
    """The restricted profile of the Pod Security Standards, a read-only root, bounds, and no API token but one."""
    outer = pod.spec["securityContext"]
    if not (outer["runAsNonRoot"] is True and outer["runAsUser"] > 0):
        yield f"{pod.owner} may run as root"
    if outer["seccompProfile"] != {"type": "RuntimeDefault"}:
        yield f"{pod.owner} has no seccomp profile"
    if pod.spec["automountServiceAccountToken"] and pod.labels["app.kubernetes.io/component"] != "controller":
        yield f"{pod.owner} has a token of the API"
    for container in pod.containers:
        inner = container["securityContext"]
        if inner["allowPrivilegeEscalation"] or inner["capabilities"] != {"drop": ["ALL"]}:
            yield f"{pod.owner} has privileges"
        if not inner["readOnlyRootFilesystem"]:
            yield f"{pod.owner} may write to its root"
        if not container["resources"]["requests"] or "memory" not in container["resources"]["limits"]:
            yield f"{pod.owner} has no bounds"


def _selected(manifests: list[Manifest], wanted: Mapping[str, str]) -> list[Pod]:
    return [pod for pod in pods(manifests) if wanted.items() <= pod.labels.items()]


def _probe_targets(pod: Pod) -> Iterator[Mapping[str, Any]]:
    for container in pod.containers:
        for probe in (container.get(kind, {}) for kind in _PROBES):
            yield from (probe[how] for how in ("httpGet", "tcpSocket") if how in probe)


def _references(pod: Pod) -> Iterator[tuple[str, str, set[str]]]:
    """What a pod needs to be there: (kind, name, keys in it)."""
    if "serviceAccountName" in pod.spec:
        yield "ServiceAccount", pod.spec["serviceAccountName"], set()
    for volume in pod.spec.get("volumes", ()):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], {item["key"] for item in volume["configMap"]["items"]}
        if "secret" in volume:
            keys = {item["key"] for item in volume["secret"].get("items", ())}
            yield "Secret", volume["secret"]["secretName"], keys
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], set()
    for variable in (v for container in pod.containers for v in container.get("env", ())):
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            yield "Secret", reference["name"], {reference["key"]}
