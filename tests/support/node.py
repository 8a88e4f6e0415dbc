"""A machine of a cluster, made of Linux namespaces: pods with an address, a root and a user of their own, as processes.

Nothing of a manifest has to be rewritten: paths, ports and names are as in the container. A pod's root is read-only, or
as its image's user may write it, and holds this machine's /usr, this interpreter with its packages, and our packages;
no more of the repository. A container is the first process of its own, has no privileges, and reaches other pods over
a bridge that leads nowhere else.

What it is not: the image's own files (``tests/e2e/test_image_steps.py`` builds those), limits of CPU and memory,
seccomp, and NetworkPolicies.

Needs Linux with util-linux and iproute2, and root or user namespaces with subordinate ids (``newuidmap``).
"""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.cleanroot import unshare_options
from tests.support.podroot import ETC, SAY_PID, as_its_user, packed, root_script
from tests.support.pods import ContainerPlan, PodPlan, Volume
from tests.support.waiting import eventually

REPOSITORY = Path(__file__).parents[2]
#: What our images hold of this repository.
PACKAGES = ("serving", "ratelimit", "loadtests")
ADDRESS = "10.244.0.1"
_POD_ADDRESSES = "10.244.0."
_LOADER_CACHE = Path("/etc/ld.so.cache")
_START_S = 20.0
_END_S = 10.0
_NODE = f"""\
set -e
ip link set lo up
ip link add br0 type bridge forward_delay 0
ip link set br0 up
ip addr add {ADDRESS}/24 dev br0
mount -t tmpfs -o mode=0755 tmpfs "$0"
mkdir "$0/claims" "$0/pods" "$0/root"
{SAY_PID}
echo "$pid"
exec cat > /dev/null
"""
_PAUSE = f'{SAY_PID}; echo "$pid"; exec cat > /dev/null'
_CONNECT = f"""\
set -e
ip link add "veth$1" type veth peer name eth0 netns "$0"
ip link set "veth$1" master br0 up
exec nsenter --target "$0" --net sh -ec 'ip link set lo up
ip addr add {_POD_ADDRESSES}$0/24 dev eth0
ip link set eth0 up' "$1"
"""


class NodeError(AssertionError):
    """A machine or a pod that could not be made; says what the system said."""


def why_not() -> str | None:
    """Why there can be no such machine here; None where there can."""
    missing = [name for name in ("ip", "nsenter", "setpriv", "tar") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed here"
    return None if unshare_options() is not None else "no root and no user namespaces with subordinate ids here"


class Container:
    """A container that runs, or has run; ``pid`` is its first process, as this machine counts."""

    def __init__(
        self, plan: ContainerPlan, enter: Sequence[str], process: subprocess.Popen[bytes], files: Path
    ) -> None:
        self.plan = plan
        self._enter = enter
        self._process = process
        self._pid_file = files.with_suffix(".pid")
        self._log = files.with_suffix(".log")
        self.pid = eventually(self._read_pid, _START_S, f"the start of {plan.name}")

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal's number; None while it runs."""
        return self._process.poll()

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more."""
        return self.status is not None

    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text(errors="replace")

    def wait(self, within_s: float) -> int:
        """Its exit status, once it has ended by itself. Raises ``AssertionError`` where it goes on."""
        eventually(lambda: self.has_ended, within_s, f"the end of {self.plan.name}")
        return self._process.returncode

    def signal(self, name: str) -> None:
        """Send its first process a signal; nothing happens where it has ended."""
        if self.has_ended:
            return
        subprocess.run(
            [*self._enter, "kill", "-s", name, str(self.pid)], capture_output=True, check=False, timeout=_END_S
        )

    def execute(self, *argv: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command in it to its end, as `kubectl exec` does."""
        into = ["nsenter", f"--target={self.pid}", *_user_option(), "--net", "--mount", "--pid", "--root"]
        words = [*into, *as_its_user(self.plan, ()), *argv]
        return subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=False
        )

    def _read_pid(self) -> int:
        if self.status is not None:
            raise NodeError(f"{self.plan.name} did not start, status {self.status}:\n{self.log()}")
        text = self._pid_file.read_text() if self._pid_file.exists() else ""
        return int(text) if text.endswith("\n") else 0


class Node:
    """The machine, while its block runs; all of its processes end with it, and with the test's.

    ``folder`` holds the logs. ``shown`` are files and folders of this machine, each with where the images have it;
    this interpreter, its packages and ours are shown where they are.
    """

    def __init__(self, folder: Path, shown: Sequence[tuple[Path, str]]) -> None:
        self._folder = folder
        self._space = folder / "node"
        self._etc = folder / "etc"
        own = [Path(sys.base_prefix), Path(sys.prefix), *(REPOSITORY / name for name in PACKAGES)]
        etc = [(self._etc / name, f"/etc/{name}") for name in (*ETC, _LOADER_CACHE.name)]
        self._shown = [*((path, str(path)) for path in own), *shown, *etc]
        self._pods = 1
        self._claims: set[str] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Node:
        options = unshare_options()
        if options is None:
            raise NodeError("no root and no user namespaces here; see the module's first lines")
        self._space.mkdir()
        self._etc.mkdir()
        for name, text in ETC.items():
            (self._etc / name).write_text(text)
        shutil.copyfile(_LOADER_CACHE, self._etc / _LOADER_CACHE.name)
        space = ["unshare", *options, "--net", "--mount", "--pid", "--fork", "--kill-child"]
        self._pid = self._hold([*space, "sh", "-c", _NODE, str(self._space)])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            if process.stdout is not None:
                process.stdout.close()
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def name_hosts(self, addresses: Mapping[str, Sequence[str]]) -> None:
        """What every pod's resolver says from now on."""
        lines = [f"{address} {name}" for name, found in addresses.items() for address in found]
        (self._etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def connected(self) -> tuple[str, int]:
        """A pod's sandbox, with loopback and an address: the address, and the process that holds it."""
        self._pods += 1
        pid = self._hold([*self._enter("--net", "--mount", "--pid"), "unshare", "--net", "sh", "-c", _PAUSE])
        self._do("sh", "-c", _CONNECT, str(pid), str(self._pods))
        return f"{_POD_ADDRESSES}{self._pods}", pid

    def start(self, pod: PodPlan, sandbox_pid: int) -> Container:
        """Lay out its volumes and start its container."""
        base = self._space / "pods" / pod.name
        for name, volume in pod.volumes.items():
            self._lay_out(self._place(base, name, volume), volume, pod.files_gid)
        places = {name: (self._place(base, name, volume), volume.is_fixed) for name, volume in pod.volumes.items()}
        script = root_script(pod.container, self._space / "root", self._shown, places)
        files = self._folder / pod.name
        enter = ["nsenter", f"--target={sandbox_pid}", *_user_option(), "--net", "--mount", "--pid"]
        space = [*enter, "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]
        inner = [*as_its_user(pod.container, () if pod.files_gid is None else (pod.files_gid,)), *pod.container.argv]
        with files.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [*space, str(files.with_suffix(".pid")), *inner], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)
        return Container(pod.container, self._enter(), process, files)

    def reached(self, address: str, port: int) -> int:
        """A port of 127.0.0.1 that leads to this one, until the machine ends."""
        if (address, port) not in self._sockets:
            with socket.create_server(("127.0.0.1", 0)) as listening:
                self._sockets[address, port] = listening.getsockname()[1]
                argv = [sys.executable, "-m", "tests.support.relay", str(listening.fileno()), address, str(port)]
                self.serve(argv, listening.fileno())
        return self._sockets[address, port]

    def serve(self, argv: Sequence[str], *descriptors: int) -> subprocess.Popen[bytes]:
        """Run a helper of the tests with this repository and the machine's network; it ends with the machine."""
        process = subprocess.Popen(
            [*self._enter("--net", "--pid"), *argv], pass_fds=descriptors, stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        self._processes.append(process)
        return process

    def accepts(self, address: str, port: int, timeout_s: float) -> bool:
        """Whether somebody takes connections there."""
        argv = [
            *self._enter("--net"),
            "timeout",
            str(timeout_s),
            "bash",
            "-c",
            ": < /dev/tcp/$0/$1",
            address,
            str(port),
        ]
        return subprocess.run(argv, capture_output=True, check=False, timeout=timeout_s + _END_S).returncode == 0

    def _enter(self, *namespaces: str) -> list[str]:
        user = _user_option()
        return ["nsenter", f"--target={self._pid}", *user, *namespaces] if user or namespaces else []

    def _do(self, *argv: str, data: bytes = b"") -> None:
        done = subprocess.run(
            [*self._enter("--net", "--mount"), *argv], input=data, capture_output=True, check=False, timeout=_START_S
        )
        if done.returncode != 0:
            raise NodeError(f"{shlex.join(argv)}: status {done.returncode}: {done.stderr.decode()}")

    def _hold(self, argv: Sequence[str]) -> int:
        """Start what lives until its input ends, and read its process id."""
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise NodeError(f"{shlex.join(argv)}: {process.stderr.read().decode()}")
        process.stderr.close()
        return int(line)

    def _place(self, base: Path, name: str, volume: Volume) -> Path:
        return base / name if volume.claim is None else self._space / "claims" / volume.claim

    def _lay_out(self, folder: Path, volume: Volume, gid: int | None) -> None:
        if volume.claim in self._claims:
            return
        if volume.claim is not None:
            self._claims.add(volume.claim)
        self._do("mkdir", "--parents", str(folder))
        if volume.memory_size is not None:
            size = volume.memory_size.removesuffix("i").lower()
            self._do("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        content = packed(volume, gid or 0)
        self._do("tar", "--extract", "--same-owner", "--same-permissions", "--directory", str(folder), data=content)


def _user_option() -> list[str]:
    return ["--user"] if unshare_options() else []
