"""What a kubelet makes of a pod, by the words of Kubernetes' API reference."""

from __future__ import annotations

import base64
import copy
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import Pod
from tests.support.podroot import as_its_user, packed, root_script
from tests.support.pods import (
    Image,
    PodError,
    PodPlan,
    Stored,
    Volume,
    endpoint_slice,
    expand,
    names_of,
    plan,
    selects,
    stored,
)

IMAGES = {
    "registry.example/app": Image(("serve",), ("--help",), {"PATH": "/bin", "HOME": "/home"}, "/srv/app", "10001:10002")
}
OBJECTS = Stored({"settings": {"a.yaml": b"a", "b.yaml": b"b"}}, {"token": {"key": b"secret"}}, frozenset({"state"}))
CONTAINER: dict[str, Any] = {
    "name": "app",
    "image": "registry.example/app:1.0",
    "ports": [{"name": "http", "containerPort": 8080}],
}


def planned(container: dict[str, Any] | None = None, **spec: Any) -> PodPlan:
    """The plan of a pod with one container, which has these fields beside its usual ones."""
    whole = {"containers": [CONTAINER | (container or {})], **spec}
    return plan(Pod("Deployment/app", "default", {"app": "app"}, whole), "app-0", IMAGES, OBJECTS)


@pytest.mark.parametrize(
    ("fields", "argv"),
    [
        ({}, ("serve", "--help")),
        ({"args": ["--port", "1"]}, ("serve", "--port", "1")),
        ({"command": ["sh"]}, ("sh",)),
        ({"command": ["sh"], "args": ["-c"]}, ("sh", "-c")),
    ],
)
def test_command_and_args_replace_what_the_image_says(fields: dict[str, Any], argv: tuple[str, ...]) -> None:
    """Args stand for CMD alone; a command stands for both."""
    assert planned(fields).container.argv == argv


def test_variables_are_filled_in() -> None:
    """A variable sees those before it, arguments see all, and what is not set or escaped stays."""
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)2"}, {"name": "C", "value": "$(D)"}]
    container = planned({"env": env, "args": ["$(B)", "$$(B)", "$(D)", "$B"]}).container

    assert container.argv[1:] == ("12", "$(B)", "$(D)", "$B")
    assert container.environment == {
        "PATH": "/bin",
        "HOME": "/home",
        "A": "1",
        "B": "12",
        "C": "$(D)",
        "HOSTNAME": "app-0",
    }
    assert expand("$$$(A)", {"A": "1"}) == "$1"


def test_values_come_from_secrets_and_config_maps() -> None:
    """A variable has the value of the key that it refers to."""
    env = [
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "token", "key": "key"}}},
        {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "a.yaml"}}},
    ]
    environment = planned({"env": env}).container.environment
    assert (environment["KEY"], environment["A"]) == ("secret", "a")


def test_volumes_have_their_files_where_items_say() -> None:
    """All keys under their names, or the items' at their paths; claims and memory are told apart."""
    volumes = planned(
        volumes=[
            {"name": "all", "configMap": {"name": "settings"}},
            {"name": "some", "configMap": {"name": "settings", "items": [{"key": "b.yaml", "path": "sub/b"}]}},
            {"name": "token", "secret": {"secretName": "token", "defaultMode": 0o440}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "state", "persistentVolumeClaim": {"claimName": "state"}},
        ]
    ).volumes

    assert volumes["all"].files == {"a.yaml": b"a", "b.yaml": b"b"}
    assert volumes["some"].files == {"sub/b": b"b"}
    assert (volumes["token"].mode, volumes["token"].is_fixed) == (0o440, True)
    assert (volumes["shm"].memory_size, volumes["tmp"].memory_size) == ("64Mi", None)
    assert (volumes["state"].claim, volumes["tmp"].is_fixed) == ("state", False)


def test_probes_have_named_ports_and_kubernetes_defaults() -> None:
    """A port's name is its number; what a probe does not say is Kubernetes' default."""
    probes = planned(
        {
            "startupProbe": {"httpGet": {"path": "/live", "port": "http"}, "periodSeconds": 2, "failureThreshold": 30},
            "livenessProbe": {"tcpSocket": {"port": 9000}},
        }
    ).container.probes

    startup, liveness = probes["startup"], probes["liveness"]
    assert (startup.path, startup.port, startup.scheme, startup.timeout_s) == ("/live", 8080, "http", 1)
    assert (startup.period_s, startup.failures) == (2, 30)
    assert (liveness.path, liveness.port, liveness.period_s, liveness.failures) == (None, 9000, 10, 3)


def test_a_pods_user_is_the_manifests_before_the_images() -> None:
    """The container's word comes before the pod's, and that before the image's."""
    assert (planned().container.uid, planned().container.gid) == (10001, 10002)
    given = planned(
        {"securityContext": {"runAsUser": 5}}, securityContext={"runAsUser": 4, "runAsGroup": 3, "fsGroup": 2}
    )
    assert (given.container.uid, given.container.gid, given.files_gid) == (5, 3, 2)


def test_a_pod_ends_as_it_says() -> None:
    """The grace period is 30 s where nothing is said, and a hook that sleeps is part of it."""
    assert (planned().grace_s, planned().container.pre_stop_s) == (30, 0)
    ending = planned({"lifecycle": {"preStop": {"sleep": {"seconds": 7}}}}, terminationGracePeriodSeconds=40)
    assert (ending.grace_s, ending.container.pre_stop_s) == (40, 7)


@pytest.mark.parametrize(
    ("container", "spec", "message"),
    [
        ({"image": "other:1"}, {}, "other:1 cannot be pulled"),
        ({"livenessProbe": {"httpGet": {"port": "htpp"}}}, {}, "no port 'htpp'; there are http"),
        (
            {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "tokn", "key": "key"}}}]},
            {},
            "no Secret 'tokn'",
        ),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "token", "key": "k"}}}]}, {}, "has no key 'k'"),
        ({}, {"volumes": [{"name": "v", "configMap": {"name": "none"}}]}, "no ConfigMap 'none'"),
        (
            {},
            {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "no"}}]},
            "no PersistentVolumeClaim 'no'",
        ),
        ({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, {}, "the volume 'v', which there is not"),
        ({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}, {}, "may not run as root"),
        ({"envFrom": []}, {}, "unknown here: envFrom"),
        ({"lifecycle": {"preStop": {"exec": {}}}}, {}, "unknown here: exec"),
        ({"livenessProbe": {"exec": {}}}, {}, "unknown here: exec"),
        ({}, {"initContainers": []}, "unknown here: initContainers"),
        ({}, {"volumes": [{"name": "v", "nfs": {}}]}, "unknown here: nfs"),
    ],
)
def test_what_cannot_start_is_refused(container: dict[str, Any], spec: dict[str, Any], message: str) -> None:
    """What a kubelet would not start, or what is not known here, is told by name."""
    with pytest.raises(PodError, match=message):
        planned(container, **spec)


def test_what_a_release_stores_is_read_decoded() -> None:
    """Secrets' data is base64, their stringData is not."""
    data = {"key": base64.b64encode(b"secret").decode()}
    manifests = [
        {"kind": "Secret", "metadata": {"name": "token"}, "data": data, "stringData": {"plain": "text"}},
        {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "b"}},
        {"kind": "PersistentVolumeClaim", "metadata": {"name": "state"}},
    ]
    found = stored(manifests)
    assert found == Stored(
        {"settings": {"a": b"b"}}, {"token": {"key": b"secret", "plain": b"text"}}, frozenset({"state"})
    )


SERVICE: dict[str, Any] = {
    "metadata": {"name": "app", "namespace": "default", "labels": {"penstock.io/pool": "chat"}},
    "spec": {"selector": {"app": "app"}, "ports": [{"name": "http", "port": 8080, "targetPort": "http"}]},
}


def test_a_slice_has_its_services_labels_and_its_pods_ports() -> None:
    """Labels are the Service's, ports those of the pods; without pods there are none."""
    ready = {"addresses": ["10.0.0.1"], "conditions": {"ready": True}}
    made = endpoint_slice(SERVICE, [ready], {"http": 8080})

    assert (
        made["metadata"]["labels"].items() >= {"penstock.io/pool": "chat", "kubernetes.io/service-name": "app"}.items()
    )
    assert (made["endpoints"], made["ports"]) == ([ready], [{"name": "http", "port": 8080, "protocol": "TCP"}])
    assert endpoint_slice(SERVICE, [], {})["ports"] == []
    other = copy.deepcopy(SERVICE)
    other["spec"]["ports"][0]["port"] = 80
    with pytest.raises(PodError, match="80 leads to 8080"):
        endpoint_slice(other, [ready], {"http": 8080})


def test_a_service_selects_and_is_named() -> None:
    """All labels of the selector must be there; no selector is nobody's. DNS knows the usual names."""
    assert selects(SERVICE, {"app": "app", "more": "x"})
    assert not selects(SERVICE, {"app": "other"})
    assert not selects({**SERVICE, "spec": {}}, {"app": "app"})
    assert "app.default.svc" in names_of(SERVICE, ["10.0.0.1"])


def test_a_volumes_files_are_as_a_kubelet_leaves_them() -> None:
    """Folders above a file are there; the group is the pod's and the mode the volume's."""
    with tarfile.open(fileobj=io.BytesIO(packed(Volume({"a/b/c": b"text"}, 0o440, is_fixed=True), 10001))) as archive:
        members = {member.name: member for member in archive.getmembers()}

    assert list(members) == [".", "a", "a/b", "a/b/c"]
    assert (members["a/b/c"].mode, {member.gid for member in members.values()}) == (0o440, {10001})
    assert members["."].mode == 0o755


def test_a_root_is_closed_after_its_mounts() -> None:
    """Mounts come outer first, read-only ones and at last the root are closed, and the user has no privileges."""
    container = planned(
        {
            "volumeMounts": [{"name": "v", "mountPath": "/a/b"}, {"name": "v", "mountPath": "/a", "readOnly": True}],
            "securityContext": {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False},
        },
        volumes=[{"name": "v", "emptyDir": {}}],
    ).container
    shown = [(Path("/a/code"), "/a/code")]
    lines = root_script(container, Path("/r"), shown, {"v": (Path("/v"), False)}).splitlines()

    assert lines.index("mount --bind /v /r/a") < lines.index("mount --bind /a/code /r/a/code")
    closed = lines.index("mount -o remount,bind,ro /r")
    assert lines.index("mount --bind /v /r/a") < lines.index("mount --bind /v /r/a/b") < closed < len(lines) - 1
    assert "mount -o remount,bind,ro /r/a" in lines
    assert "mount -o remount,bind,ro /r/a/b" not in lines
    words = as_its_user(container, (5,))
    assert {"--reuid=10001", "--groups=5", "--no-new-privs", "--bounding-set=-all"} <= set(words)
