"""A cluster of one machine that runs our chart's pods: what kubelet, DNS and the EndpointSlice controller do for them.

Only what is asked for happens: a pod starts when the test says so, and readiness, names and EndpointSlices are brought
up to date by ``settle``. Everything else is as rendered.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from ratelimit.embedded_redis import redis_server_executable
from tests.support.chart import Manifest, Pod, of_kind
from tests.support.dockerfile import parse
from tests.support.node import ADDRESS, REPOSITORY, Container, Node
from tests.support.pods import Image, PodPlan, Probe, Stored, endpoint_slice, image_of, names_of, plan, selects, stored
from tests.support.servers import valkey_server_executable
from tests.support.waiting import eventually

_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
_API_TIMEOUT_S = 10.0
_KILL_S = 10.0
_BASE_PATH = "/usr/local/bin:/usr/bin:/bin"
_PROGRAMS = "/programs"
_PATH = {"PATH": f"{_PROGRAMS}:{_BASE_PATH}"}
_REDIS = Image(environment=_PATH, workdir="/data")
_VLLM = Image(entrypoint=("vllm", "serve"), environment=_PATH)


def images() -> dict[str, Image]:
    """The images that the chart's values name, by repository: ours as their Dockerfile says, and others'."""
    stages = {stage.name: stage for stage in parse((REPOSITORY / "Dockerfile").read_text(), {"PATH": _BASE_PATH})}
    ours = {"penstock": "penstock", "penstock-loadtest": "loadtest", "penstock-virtual-gpu": "virtual-gpu"}
    made = {f"ghcr.io/penstock/{name}": image_of(stages[target]) for name, target in ours.items()}
    return made | {"valkey/valkey": _REDIS, "redis": _REDIS, "vllm/vllm-openai": _VLLM}


class RunningPod:
    """A pod on the machine. ``is_ready`` is what its readiness probe last said."""

    def __init__(self, node: Node, spec: PodPlan, address: str, container: Container, host: str) -> None:
        self.plan = spec
        self.address = address
        self.host = host
        self.container = container
        self.is_ready = False
        self.is_ending = False
        self._node = node

    def url(self, port: str) -> str:
        """Where this test reaches one of its ports, by name."""
        return f"http://127.0.0.1:{self._node.reached(self.address, self.plan.container.ports[port])}"

    def passes(self, probe: Probe) -> bool:
        """Ask it as a kubelet does."""
        if probe.path is None:
            return self._node.accepts(self.address, probe.port, probe.timeout_s)
        port = self._node.reached(self.address, probe.port)
        url = f"{probe.scheme}://127.0.0.1:{port}{probe.path}"
        try:
            return 200 <= httpx.get(url, timeout=probe.timeout_s).status_code < 400
        except httpx.TransportError:
            return False

    def until_started(self) -> None:
        """Wait until its startup probe passes, no longer than the manifest allows."""
        probe = self._probe("startup")
        self._until(probe, probe.period_s * probe.failures, "startup")

    def until_ready(self, within_s: float) -> None:
        """Wait until its readiness probe passes."""
        self._until(self._probe("readiness"), within_s, "readiness")

    def is_live(self) -> bool:
        """Whether its liveness probe passes now."""
        return self.passes(self._probe("liveness"))

    def ask_ready(self) -> bool:
        """Ask its readiness probe; a pod without one is ready while it runs."""
        probe = self.plan.container.probes.get("readiness")
        self.is_ready = self.container.status is None and (probe is None or self.passes(probe))
        return self.is_ready

    def _probe(self, kind: str) -> Probe:
        assert kind in self.plan.container.probes, f"{self.plan.name} has no {kind} probe"
        return self.plan.container.probes[kind]

    def _until(self, probe: Probe, within_s: float, what: str) -> None:
        def asked() -> bool:
            assert self.container.status is None, f"{self.plan.name} has ended, status {self.container.status}"
            return self.passes(probe)

        try:
            eventually(asked, within_s, f"the {what} of {self.plan.name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.container.log()}") from None


class Cluster:
    """One release, installed while its block runs. Raises ``PodError`` where a kubelet would refuse a pod."""

    def __init__(self, folder: Path, manifests: list[Manifest]) -> None:
        self.manifests = manifests
        self.objects: Stored = stored(manifests)
        self.pods: list[RunningPod] = []
        self._images = images()
        environment = Path(self._images["ghcr.io/penstock/penstock"].environment["PATH"].partition(":")[0]).parent
        programs = {
            "valkey-server": Path(valkey_server_executable()),
            "redis-server": Path(redis_server_executable()),
            "vllm": _stand_in(folder),
        }
        shown = [(path, f"{_PROGRAMS}/{name}") for name, path in programs.items()]
        self._node = Node(folder, [(Path(sys.prefix), str(environment)), *shown])
        self._kubeconfig = folder / "kubeconfig"
        self._names: dict[str, int] = {}

    def __enter__(self) -> Cluster:
        self._node.__enter__()
        try:
            api = [sys.executable, "-m", "tests.support.kube_api", "--host", ADDRESS]
            process = self._node.serve([*api, "--kubeconfig", str(self._kubeconfig)])
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(b":")[2])
            self._api = f"http://127.0.0.1:{self._node.reached(ADDRESS, port)}"
        except BaseException:
            self._node.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._node.__exit__(kind, error, trace)

    def start(self, pod: Pod) -> RunningPod:
        """Run one more pod of a workload, as its controller would."""
        workload = pod.owner.rpartition("/")[2]
        number = self._names[workload] = self._names.get(workload, -1) + 1
        spec = self._with_access(plan(pod, f"{workload}-{number}", self._images, self.objects), pod.namespace)
        address, sandbox = self._node.connected()
        started = RunningPod(self._node, spec, address, self._node.start(spec, sandbox), f"node-{len(self.pods) + 1}")
        self.pods.append(started)
        return started

    def settle(self) -> None:
        """Ask every pod whether it is ready, and have DNS and EndpointSlices say so."""
        for pod in self.pods:
            pod.ask_ready()
        names: dict[str, list[str]] = {}
        for service in of_kind(self.manifests, "Service"):
            behind = [pod for pod in self.pods if pod.container.status is None and selects(service, pod.plan.labels)]
            unready_too = bool(service["spec"].get("publishNotReadyAddresses"))
            names |= names_of(service, [pod.address for pod in behind if unready_too or _serves(pod)])
            self._put(endpoint_slice(service, [_endpoint(pod, unready_too) for pod in behind], _ports(behind)))
        self._node.name_hosts(names)

    def begin_end(self, pod: RunningPod) -> float:
        """Delete it as a kubelet does, up to SIGTERM; gives the seconds that it has left before it is killed."""
        pod.is_ending = True
        self.settle()
        pre_stop_s = pod.plan.container.pre_stop_s
        time.sleep(pre_stop_s)  # the hook as rendered
        left_s = float(max(pod.plan.grace_s - pre_stop_s, 0))
        killed = threading.Timer(left_s, pod.container.signal, ("KILL",))
        killed.daemon = True
        killed.start()
        pod.container.signal("TERM")
        return left_s

    def end(self, pod: RunningPod) -> int:
        """Delete it; its exit status, -9 where it outlived its grace and was killed."""
        status = pod.container.wait(self.begin_end(pod) + _KILL_S)
        self.settle()
        return status

    def logs(self) -> str:
        """What every pod has said last."""
        return "\n".join(f"--- {pod.plan.name}\n{pod.container.log()[-3000:]}" for pod in self.pods)

    def _put(self, made: Manifest) -> None:
        metadata = made["metadata"]
        path = f"/apis/discovery.k8s.io/v1/namespaces/{metadata['namespace']}/endpointslices/{metadata['name']}"
        httpx.put(self._api + path, json=made, timeout=_API_TIMEOUT_S).raise_for_status()

    def _with_access(self, spec: PodPlan, namespace: str) -> PodPlan:
        """With its service account's files, and the address of the API server, where it is to have them."""
        if not spec.has_api_access:
            return spec
        files = {"namespace": namespace.encode(), "kubeconfig": self._kubeconfig.read_bytes()}
        return spec.with_files("kube-api-access", _SERVICE_ACCOUNT, files, KUBECONFIG=f"{_SERVICE_ACCOUNT}/kubeconfig")


def _stand_in(folder: Path) -> Path:
    """The command `vllm` of an image for GPUs, which cannot run here."""
    path = folder / "vllm"
    path.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
    path.chmod(0o755)
    return path


def _serves(pod: RunningPod) -> bool:
    return pod.is_ready and not pod.is_ending


def _endpoint(pod: RunningPod, unready_too: bool) -> Mapping[str, Any]:
    conditions = {"ready": unready_too or _serves(pod), "serving": pod.is_ready, "terminating": pod.is_ending}
    return {"addresses": [pod.address], "conditions": conditions, "nodeName": pod.host}


def _ports(behind: Sequence[RunningPod]) -> Mapping[str, int]:
    return behind[0].plan.container.ports if behind else {}
