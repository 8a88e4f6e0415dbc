"""A rendered pod as a kubelet reads it: what it would run, with which files, and what it would ask it. Pure.

Knows the fields that our chart uses and refuses all others by name, so that nothing in a pod goes unchecked. The rules
are those of the API reference of Kubernetes: what ``command`` and ``args`` replace in an image, what ``$(NAME)``
becomes, where a volume's keys end up, and what a probe has where it says nothing.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from tests.support.chart import Manifest, Pod
from tests.support.dockerfile import Stage

Fields: TypeAlias = Mapping[str, Any]

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)")
_DEFAULT_MODE = 0o644
_DEFAULT_GRACE_S = 30
#: What decides where a pod runs, or how much it may use: nothing of this is ours to follow.
_FOR_THE_SCHEDULER = {"affinity", "tolerations", "nodeSelector", "topologySpreadConstraints", "priorityClassName"}
_FOR_OTHERS = _FOR_THE_SCHEDULER | {"restartPolicy", "imagePullSecrets", "activeDeadlineSeconds", "runtimeClassName"}
_POD = {"containers", "volumes", "securityContext", "serviceAccountName", "automountServiceAccountToken"}
_POD |= _FOR_OTHERS | {"enableServiceLinks", "terminationGracePeriodSeconds"}
_PROBES = ("startup", "liveness", "readiness")
_CONTAINER = {"name", "image", "imagePullPolicy", "command", "args", "env", "ports", "resources", "volumeMounts"}
_CONTAINER |= {"securityContext", "lifecycle", *(f"{kind}Probe" for kind in _PROBES)}
_PROBE_FIELDS = {"httpGet", "tcpSocket", "periodSeconds", "timeoutSeconds", "failureThreshold", "successThreshold"}


class PodError(ValueError):
    """A pod that a kubelet would not start, or a field that is not known here; says which."""


class Image(msgspec.Struct, frozen=True):
    """What an image says of how it is run. ``user`` is UID or UID:GID."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    workdir: str = "/"
    user: str = "0"


class Probe(msgspec.Struct, frozen=True):
    """What is asked of a container: a GET of ``path``, or a connection where ``path`` is None."""

    port: int
    path: str | None
    scheme: str
    period_s: int
    timeout_s: int
    failures: int


class Volume(msgspec.Struct, frozen=True):
    """One volume: the claim ``claim``, or else a folder of the pod's own with ``files``.

    ``memory_size`` is the size of a volume in memory, as the manifest writes it; None for one on disk.
    """

    files: Mapping[str, bytes] = {}
    mode: int = _DEFAULT_MODE
    memory_size: str | None = None
    claim: str | None = None
    is_fixed: bool = False


class Mount(msgspec.Struct, frozen=True):
    """Where a container sees a volume, or the part of it at ``sub_path``."""

    volume: str
    path: str
    sub_path: str
    is_read_only: bool


class ContainerPlan(msgspec.Struct, frozen=True):
    """A container as it is run.

    ``probes`` are those that it has, of startup, liveness and readiness. ``pre_stop_s`` is how long its hook sleeps
    before SIGTERM.
    """

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    workdir: str
    uid: int
    gid: int
    is_root_read_only: bool
    may_gain_privileges: bool
    mounts: tuple[Mount, ...]
    ports: Mapping[str, int]
    probes: Mapping[str, Probe]
    pre_stop_s: int


class PodPlan(msgspec.Struct, frozen=True):
    """A pod as it is run, of one container. ``files_gid`` is the group that its volumes belong to."""

    name: str
    labels: Mapping[str, str]
    container: ContainerPlan
    volumes: Mapping[str, Volume]
    files_gid: int | None
    grace_s: int
    has_api_access: bool

    def with_files(self, volume: str, path: str, files: Mapping[str, bytes], **variables: str) -> PodPlan:
        """And this volume of files, mounted at ``path``, with variables that say so."""
        mounts = (*self.container.mounts, Mount(volume, path, "", is_read_only=True))
        environment = {**self.container.environment, **variables}
        container = msgspec.structs.replace(self.container, mounts=mounts, environment=environment)
        volumes = {**self.volumes, volume: Volume(files, is_fixed=True)}
        return msgspec.structs.replace(self, container=container, volumes=volumes)


class Stored(msgspec.Struct, frozen=True):
    """What a namespace holds that pods refer to: ConfigMaps and Secrets by name, each with its values by key."""

    config_maps: Mapping[str, Mapping[str, bytes]]
    secrets: Mapping[str, Mapping[str, bytes]]
    claims: frozenset[str]

    def with_secret(self, name: str, **values: str) -> Stored:
        """And this Secret, as ``kubectl create secret generic`` makes one."""
        made = {key: value.encode() for key, value in values.items()}
        return Stored(self.config_maps, {**self.secrets, name: made}, self.claims)

    def with_claim(self, name: str) -> Stored:
        """And this PersistentVolumeClaim."""
        return Stored(self.config_maps, self.secrets, self.claims | {name})


def stored(manifests: Iterable[Manifest]) -> Stored:
    """What these manifests put into their namespace."""
    config_maps: dict[str, Mapping[str, bytes]] = {}
    secrets: dict[str, Mapping[str, bytes]] = {}
    claims = set()
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "ConfigMap":
            config_maps[name] = {key: value.encode() for key, value in manifest.get("data", {}).items()}
        elif manifest["kind"] == "Secret":
            coded = {key: base64.b64decode(value, validate=True) for key, value in manifest.get("data", {}).items()}
            plain = {key: value.encode() for key, value in manifest.get("stringData", {}).items()}
            secrets[name] = coded | plain
        elif manifest["kind"] == "PersistentVolumeClaim":
            claims.add(name)
    return Stored(config_maps, secrets, frozenset(claims))


def image_of(stage: Stage) -> Image:
    """What a stage of our Dockerfile makes."""
    entrypoint, command = stage.last("ENTRYPOINT"), stage.last("CMD")
    return Image(
        tuple(entrypoint.words) if entrypoint else (),
        tuple(command.words) if command else (),
        stage.environment,
        stage.workdir,
        stage.user,
    )


def plan(pod: Pod, name: str, images: Mapping[str, Image], objects: Stored) -> PodPlan:
    """What a kubelet makes of a pod that is called ``name``. ``images`` are by repository, without tag.

    Raises ``PodError``.
    """
    spec = pod.spec
    _refuse_unknown(f"pod {name}", spec, _POD)
    if len(spec["containers"]) != 1:
        raise PodError(f"pod {name} has {len(spec['containers'])} containers; only one is known here")
    volumes = {volume["name"]: _volume(volume, objects, f"pod {name}") for volume in spec.get("volumes", ())}
    volumes |= {claimed: Volume(claim=f"{claimed}-{name}") for claimed in pod.claimed}
    security = spec.get("securityContext", {})
    container = _container(spec["containers"][0], security, images, objects, name)
    for mount in container.mounts:
        if mount.volume not in volumes:
            raise PodError(f"pod {name}: {mount.path} is of the volume {mount.volume!r}, which there is not")
    return PodPlan(
        name,
        pod.labels,
        container,
        volumes,
        security.get("fsGroup"),
        spec.get("terminationGracePeriodSeconds", _DEFAULT_GRACE_S),
        bool(spec.get("automountServiceAccountToken", True)),
    )


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` is the variable's value, or stays where there is none; ``$$`` is a dollar sign."""
    return _REFERENCE.sub(lambda found: variables.get(found[1], found[0]) if found[1] else "$", text)


def endpoint_slice(service: Manifest, endpoints: Sequence[Fields], ports: Mapping[str, int]) -> Manifest:
    """What the EndpointSlice controller makes of a Service. ``ports`` are those of its pods, by name."""
    metadata = service["metadata"]
    labels = {
        **metadata.get("labels", {}),
        "kubernetes.io/service-name": metadata["name"],
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
    }
    named = [
        {"name": port["name"], "port": _number(port.get("targetPort", port["port"]), ports, metadata["name"])}
        for port in (service["spec"]["ports"] if endpoints else ())
    ]
    for port, asked in zip(named, service["spec"]["ports"], strict=False):
        if port["port"] != asked["port"]:
            raise PodError(f"Service {metadata['name']}: {asked['port']} leads to {port['port']}; not known here")
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{metadata['name']}-1", "namespace": metadata["namespace"], "labels": labels},
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [{**port, "protocol": "TCP"} for port in named],
    }


def names_of(service: Manifest, addresses: Sequence[str]) -> dict[str, list[str]]:
    """What the cluster's DNS says of a Service; one with an address of its own leads to its pods all the same."""
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    begin = f"{name}.{namespace}"
    return {known: list(addresses) for known in (name, begin, f"{begin}.svc", f"{begin}.svc.cluster.local")}


def selects(service: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether pods with these labels are the Service's."""
    selector: Mapping[str, str] = service["spec"].get("selector", {})
    return bool(selector) and selector.items() <= labels.items()


def _container(spec: Fields, pod_security: Fields, images: Mapping[str, Image], objects: Stored, pod: str) -> (
    ContainerPlan
):  # fmt: skip
    where = f"pod {pod}, container {spec['name']}"
    _refuse_unknown(where, spec, _CONTAINER)
    repository = re.sub(r"(@sha256:\w+|:[\w.-]+)$", "", spec["image"])
    if repository not in images:
        raise PodError(f"{where}: the image {spec['image']} cannot be pulled; there are {', '.join(images)}")
    image = images[repository]
    environment = _environment(spec.get("env") or (), image, objects, where) | {"HOSTNAME": pod}
    ports = {port["name"]: port["containerPort"] for port in spec.get("ports", ())}
    security = {**pod_security, **spec.get("securityContext", {})}
    uid = int(security.get("runAsUser", image.user.partition(":")[0]))
    if security.get("runAsNonRoot") and uid == 0:
        raise PodError(f"{where} may not run as root, and would")
    return ContainerPlan(
        spec["name"],
        _argv(spec, image, environment),
        environment,
        image.workdir,
        uid,
        int(security.get("runAsGroup", image.user.partition(":")[2] or 0)),
        bool(security.get("readOnlyRootFilesystem")),
        bool(security.get("allowPrivilegeEscalation", True)),
        tuple(
            Mount(m["name"], m["mountPath"], m.get("subPath", ""), bool(m.get("readOnly")))
            for m in spec.get("volumeMounts", ())
        ),
        ports,
        {kind: _probe(spec[f"{kind}Probe"], ports, f"{where}, {kind}") for kind in _PROBES if f"{kind}Probe" in spec},
        _pre_stop_s(spec.get("lifecycle", {}), where),
    )


def _argv(spec: Fields, image: Image, environment: Mapping[str, str]) -> tuple[str, ...]:
    """``command`` stands for ENTRYPOINT and leaves no CMD; ``args`` stands for CMD."""
    command = spec.get("command")
    begin = image.entrypoint if command is None else command
    end = spec.get("args", image.command if command is None else ())
    return tuple(expand(word, environment) for word in (*begin, *end))


def _environment(given: Iterable[Fields], image: Image, objects: Stored, where: str) -> dict[str, str]:
    variables = dict(image.environment)
    for variable in given:
        _refuse_unknown(f"{where}, env {variable['name']}", variable, {"name", "value", "valueFrom"})
        if "valueFrom" in variable:
            value = _value_from(variable["valueFrom"], objects, f"{where}, env {variable['name']}")
        else:
            value = expand(variable.get("value", ""), variables)
        variables[variable["name"]] = value
    return variables


def _value_from(source: Fields, objects: Stored, where: str) -> str:
    _refuse_unknown(where, source, {"secretKeyRef", "configMapKeyRef"})
    if "secretKeyRef" in source:
        reference, among, kind = source["secretKeyRef"], objects.secrets, "Secret"
    else:
        reference, among, kind = source["configMapKeyRef"], objects.config_maps, "ConfigMap"
    return _values(among, kind, reference["name"], [reference["key"]], where)[reference["key"]].decode()


def _volume(spec: Fields, objects: Stored, pod: str) -> Volume:
    where = f"{pod}, volume {spec['name']}"
    _refuse_unknown(where, spec, {"name", "configMap", "secret", "emptyDir", "persistentVolumeClaim"})
    if "configMap" in spec:
        source = spec["configMap"]
        return _files(source, objects.config_maps, "ConfigMap", source["name"], where)
    if "secret" in spec:
        source = spec["secret"]
        return _files(source, objects.secrets, "Secret", source["secretName"], where)
    if "emptyDir" in spec:
        empty = spec["emptyDir"]
        return Volume(memory_size=empty.get("sizeLimit", "50%") if empty.get("medium") == "Memory" else None)
    claim = spec["persistentVolumeClaim"]["claimName"]
    if claim not in objects.claims:
        raise PodError(f"{where}: there is no PersistentVolumeClaim {claim!r}")
    return Volume(claim=claim)


def _files(source: Fields, among: Mapping[str, Mapping[str, bytes]], kind: str, name: str, where: str) -> Volume:
    _refuse_unknown(where, source, {"name", "secretName", "items", "defaultMode"})
    items = source.get("items")
    paths = {item["key"]: item["path"] for item in items} if items is not None else None
    values = _values(among, kind, name, paths, where)
    files = {(paths[key] if paths is not None else key): value for key, value in values.items()}
    return Volume(files, source.get("defaultMode", _DEFAULT_MODE), is_fixed=True)


def _values(
    among: Mapping[str, Mapping[str, bytes]], kind: str, name: str, keys: Iterable[str] | None, where: str
) -> Mapping[str, bytes]:
    """These keys of a ConfigMap or Secret, or all of them."""
    if name not in among:
        raise PodError(f"{where}: there is no {kind} {name!r}; there are {', '.join(among) or 'none'}")
    held = among[name]
    for key in keys or ():
        if key not in held:
            raise PodError(f"{where}: {kind} {name!r} has no key {key!r}; it has {', '.join(held)}")
    return held if keys is None else {key: held[key] for key in keys}


def _probe(spec: Fields, ports: Mapping[str, int], where: str) -> Probe:
    _refuse_unknown(where, spec, _PROBE_FIELDS)
    asked = spec.get("httpGet") or spec["tcpSocket"]
    _refuse_unknown(where, asked, {"path", "port", "scheme"} if "httpGet" in spec else {"port"})
    return Probe(
        _number(asked["port"], ports, where),
        asked.get("path", "/") if "httpGet" in spec else None,
        asked.get("scheme", "HTTP").lower(),
        spec.get("periodSeconds", 10),
        spec.get("timeoutSeconds", 1),
        spec.get("failureThreshold", 3),
    )


def _number(port: str | int, ports: Mapping[str, int], where: str) -> int:
    if isinstance(port, int):
        return port
    if port not in ports:
        raise PodError(f"{where}: there is no port {port!r}; there are {', '.join(ports) or 'none'}")
    return ports[port]


def _pre_stop_s(lifecycle: Fields, where: str) -> int:
    _refuse_unknown(where, lifecycle, {"preStop"})
    hook = lifecycle.get("preStop", {"sleep": {"seconds": 0}})
    _refuse_unknown(f"{where}, preStop", hook, {"sleep"})
    return int(hook["sleep"]["seconds"])


def _refuse_unknown(where: str, given: Fields, known: set[str]) -> None:
    unknown = given.keys() - known
    if unknown:
        raise PodError(f"{where}: unknown here: {', '.join(sorted(unknown))}")
