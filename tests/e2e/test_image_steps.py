"""The Dockerfile's own steps for two of its images, run in a clean root, and what they make, run as a container is.

This proves that the steps work with what they ask for and nothing else (no compiler, no network but the locked
packages), that the result needs no write to its root and no privilege, and that it starts, serves and stops as user
10001. It does not prove that the base image on a registry is as the stand-in (see ``cleanroot``), nor that an engine
reads the file as this reader does. The virtual GPU's own installations (torch, vLLM) are not run here for their size.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from ratelimit.embedded_redis import redis_server_executable
from serving.engine.guard import GuardedProcess
from tests.support.cleanroot import (
    BASE_ENVIRONMENT,
    CleanBuild,
    StepError,
    entered,
    fetch_wheels,
    make_base,
    unshare_options,
)
from tests.support.dockerfile import Stage, lineage, parse
from tests.support.engines import free_port
from tests.support.stack import free_ports
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(unshare_options() is None, reason="no root and no user namespaces with subordinate ids here"),
    pytest.mark.skipif(
        shutil.which("dpkg-query") is None, reason="the stand-in for the base image is made of Debian's"
    ),
]

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "Dockerfile").read_text()
TARGET, LOAD_TEST = "penstock", "loadtest"
CONFIG = """\
state_dir: /var/lib/penstock/state
redis: redis://127.0.0.1:{redis}/0
gateway: {{port: {port}, admin_port: {admin}}}
pools:
  - {{model: llama-3.1-8b, replicas: [{{url: "http://127.0.0.1:9", profile: h100-llama-3.1-8b}}]}}
tiers: [{{name: pro, share: 0.5}}]
orgs: [{{name: acme}}]
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the targets' lock files name."""
    stages = [stage for target in (TARGET, LOAD_TEST) for stage in lineage(parse(TEXT, BASE_ENVIRONMENT), target)]
    words = {word for stage in stages for copy in stage.all("COPY") for word in copy.words}
    folder = tmp_path_factory.mktemp("wheels")
    fetch_wheels([REPOSITORY / word for word in sorted(words) if word.endswith(".lock")], folder)
    return folder


class Image:
    """What was built: a tree, and how the Dockerfile says that it is run."""

    def __init__(self, tree: Path, stage: Stage) -> None:
        self.tree = tree
        self.stage = stage

    def command(self, *arguments: str, config: Path | None = None) -> list[str]:
        """The entry point with these arguments, on a read-only root with a writable /tmp and state folder."""
        entry = self.stage.last("ENTRYPOINT")
        assert entry
        return self.entered([*entry.words, *arguments], config)

    def entered(self, inner: list[str], config: Path | None = None) -> list[str]:
        """Any command, inside."""
        mounts = {config: "/etc/penstock"} if config else {}
        writable = ["/tmp", "/var/lib/penstock"]  # noqa: S108 - the container's own, not this machine's
        stage = self.stage
        return entered(
            self.tree, inner, stage.environment, stage.workdir, mounts, network=True, user=stage.user, writable=writable
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the base image."""
    tree = tmp_path_factory.mktemp("base") / "root"
    make_base(tree)
    return tree


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, base: Path, wheels: Path) -> Iterator[CleanBuild]:
    """The stages that the targets below share."""
    folder = tmp_path_factory.mktemp("image")
    yield CleanBuild(REPOSITORY, folder, base, wheels)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(build: CleanBuild) -> Image:
    """The gateway's image, built by its own steps."""
    return built(build, TARGET)


def built(build: CleanBuild, target: str) -> Image:
    """A target's image."""
    stages = parse(TEXT, BASE_ENVIRONMENT)
    return Image(build.build(stages, target), next(stage for stage in stages if stage.name == target))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_runs_and_holds_what_the_package_holds(image: Image) -> None:
    """`penstock --version` is the package's, and profiles, mixes and Lua scripts are in the wheel that was built."""
    assert run(image.command("--version")).stdout.startswith("penstock 0.")
    listed = run(image.command("profiles", "list", "--json"))
    assert listed.returncode == 0, listed.stderr
    assert "gb200-llama-3.1-70b" in listed.stdout
    imported = run(image.entered(["python", "-c", "import ratelimit.gateway.app, ratelimit.store, kubernetes.aio"]))
    assert imported.returncode == 0, imported.stderr


def test_nothing_can_be_written_but_where_it_is_meant_to(image: Image) -> None:
    """The process is user 10001, its root is read-only, and /tmp and the state folder are its own."""
    script = "id -u; id -g; for f in / /opt/penstock /etc /var/lib/penstock /tmp; do touch $f/x && echo $f; done"
    said = run(image.entered(["sh", "-c", script])).stdout.split()
    assert said == ["10001", "10001", "/var/lib/penstock", "/tmp"]  # noqa: S108 - as above


def test_no_compiler_and_no_installer_is_left(image: Image) -> None:
    """Neither pip nor a compiler is anywhere in the tree, nor the sources and locks of the build."""
    names = {path.name for path in image.tree.rglob("*") if path.is_file() and os.access(path, os.X_OK)}
    assert not names & {"pip", "pip3", "gcc", "cc", "g++", "clang", "ld", "make", "uv"}
    assert not list(image.tree.glob("build/*"))
    assert not list(image.tree.rglob("gateway.lock"))
    assert not [path for path in image.tree.rglob("site-packages/*") if path.name in ("pip", "hatchling")]


def test_a_config_is_checked_inside(image: Image, tmp_path: Path) -> None:
    """`penstock check` reads a mounted config, and says what is wrong with one."""
    (tmp_path / "penstock.yaml").write_text(CONFIG.format(redis=6379, port=8080, admin=9090))
    tmp_path.chmod(0o755)
    good = run(image.command("check", "/etc/penstock/penstock.yaml", config=tmp_path))
    assert good.returncode == 0, good.stderr
    (tmp_path / "penstock.yaml").write_text("tiers: []\n")
    assert run(image.command("check", "/etc/penstock/penstock.yaml", config=tmp_path)).returncode == 1


def test_the_gateway_starts_and_ends_on_its_stop_signal(image: Image, tmp_path: Path) -> None:
    """As the container's first process it answers on both ports, refuses who has no key, and SIGTERM ends it with 0."""
    port, admin = free_ports(2)
    with local_redis(tmp_path / "redis") as redis_port:
        config = tmp_path / "config"
        config.mkdir()
        (config / "penstock.yaml").write_text(CONFIG.format(redis=redis_port, port=port, admin=admin))
        command = image.stage.last("CMD")
        assert command
        with (tmp_path / "log").open("w") as log:
            outer = subprocess.Popen(image.command(*command.words, config=config), stdout=log, stderr=log)
        try:
            eventually(lambda: outer.poll() is not None or answers(f"http://127.0.0.1:{admin}/health"), 60, "its start")
            assert outer.poll() is None, (tmp_path / "log").read_text()
            assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).status_code == 401
            (inner,) = psutil.Process(outer.pid).children()
            assert inner.uids().effective != 0
            inner.send_signal(signal.SIGTERM)
            assert outer.wait(30) == 0, (tmp_path / "log").read_text()
        finally:
            outer.kill()
            outer.wait()


def test_the_load_test_has_what_it_and_measuring_need(build: CleanBuild) -> None:
    """Its own lock adds to the gateway's without contradicting it: Locust and SciPy load, `penstock measure` runs."""
    load_test = built(build, LOAD_TEST)
    loaded = run(load_test.entered(["python", "-c", "import scipy.optimize, ratelimit.gateway.app; import locust"]))
    assert loaded.returncode == 0, loaded.stderr
    assert "--rate" in run(load_test.command("--help")).stdout
    refused = run(load_test.entered(["penstock", "measure", "http://127.0.0.1:9", "--out", "/tmp/x.json"]))  # noqa: S108
    assert "SciPy" not in refused.stderr
    assert "127.0.0.1:9" in refused.stderr


def answers(url: str) -> bool:
    """Whether anybody speaks HTTP there."""
    try:
        httpx.get(url, timeout=5)
    except httpx.TransportError:
        return False
    return True


@contextmanager
def local_redis(folder: Path) -> Iterator[int]:
    """The port of a Redis on 127.0.0.1 that keeps nothing."""
    folder.mkdir()
    port = free_port()
    argv = [redis_server_executable(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    server = GuardedProcess.start(argv, log_path=folder / "log")
    try:
        yield port
    finally:
        asyncio.run(server.stop())


BROKEN = {
    "a package that no lock has": ("-r build.lock", "-r build.lock not-in-any-lock", "not-in-any-lock"),
    "a compiler": ("RUN pip install", "RUN gcc --version && pip install", "gcc: not found"),
    "a file that is not sent": ("COPY requirements/", "COPY tests/conftest.py requirements/", "kept back"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_step_that_asks_for_more_fails(what: str, tmp_path: Path, base: Path, wheels: Path) -> None:
    """The steps are the file's own: one that needs what a clean root has not is found."""
    old, new, complaint = BROKEN[what]
    stages = parse(TEXT.replace(old, new, 1), BASE_ENVIRONMENT)
    with pytest.raises(StepError, match=complaint):
        CleanBuild(REPOSITORY, tmp_path, base, wheels).build(stages, TARGET)
    shutil.rmtree(tmp_path / "stage-build")
