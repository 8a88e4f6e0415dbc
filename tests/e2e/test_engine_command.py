"""`penstock engine` on real vLLM: one process, as the only one of a container."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serving.profile import load_profile
from tests.support.cleanroot import unshare_options
from tests.support.engines import engine_core_of, free_port, prompt_of
from tests.support.stack import PENSTOCK, alive
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROFILE, MODEL, SLOWDOWN = "h100-llama-3.1-8b", "llama-3.1-8b", 4.0
START_S = 180.0
#: What a container's runtime gives it by default.
GRACE_S = 30.0
OUTPUT_TOKENS = 50


class Container:
    """The command as a runtime runs it: no write outside its own folder, its output where the runtime wants it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "log"
        home = folder / "tmp"
        home.mkdir()
        options = ("--profile", PROFILE, "--model", MODEL, "--host", "0.0.0.0", "--port", str(self.port))
        inner = [*PENSTOCK, "engine", *options, "--slowdown", str(SLOWDOWN)]
        environment = os.environ | {"HOME": str(home), "TMPDIR": str(home)}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                read_only(inner, home), stdout=log, stderr=log, cwd=home, env=environment, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until /health says so."""
        eventually(lambda: self.process.poll() is not None or self._is_healthy(), START_S, "the engine's start")
        assert self.process.poll() is None, self.log()

    def complete(self, tokens: int) -> dict[str, object]:
        """A completion of exactly so many tokens."""
        body = {"model": MODEL, "prompt": prompt_of(10), "max_tokens": tokens, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        usage: dict[str, object] = answer.json()["usage"]
        return usage

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def log(self) -> str:
        """All that it said."""
        return self._log.read_text()

    def end(self) -> None:
        """As a runtime does in the end."""
        self.process.kill()
        self.process.wait()

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


def read_only(inner: list[str], writable: Path) -> list[str]:
    """The command, by exec, where only that folder can be written; as it is where mounts cannot be had."""
    options = unshare_options()
    if options is None:
        return inner
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && cd "$0" && exec "$@"'
    return ["unshare", *options, "--mount", "sh", "-c", script, str(writable), *inner]


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    running = Container(tmp_path_factory.mktemp("container"))
    try:
        running.wait_ready()
        yield running
    finally:
        running.end()


def test_it_serves_at_its_profiles_speed(container: Container) -> None:
    """The tokens asked for come, never faster than the slowed-down profile makes its steps, nor much slower."""
    container.complete(1)
    start_s = time.monotonic()
    usage = container.complete(OUTPUT_TOKENS)
    took_s = time.monotonic() - start_s
    assert usage["completion_tokens"] == OUTPUT_TOKENS
    step_s = load_profile(PROFILE).step_time.base_s * SLOWDOWN
    assert 1.0 <= took_s / (OUTPUT_TOKENS * step_s) < 3.0


def test_the_process_is_vllm_itself(container: Container) -> None:
    """What the runtime signals is the API server, with its engine core below it and nothing above or beside."""
    family = container.family()
    assert engine_core_of(container.process.pid).ppid() == container.process.pid
    assert [process.pid for process in family if "virtual_server" in " ".join(process.cmdline())][:1] == [
        container.process.pid
    ]
    assert len(family) <= 3  # besides the two, Python's resource tracker


def test_sigterm_ends_it_within_the_grace_and_leaves_nothing(container: Container) -> None:
    """Idle, SIGTERM is enough: no SIGKILL, no orphan."""
    family = container.family()
    container.process.send_signal(signal.SIGTERM)
    assert container.process.wait(GRACE_S) in (0, -signal.SIGTERM)
    eventually(lambda: not alive(family), 10, "the end of every process")


def test_a_sigkill_in_mid_stream_leaves_nothing(tmp_path: Path) -> None:
    """With streams open a runtime has to kill it, and the engine core goes with its server."""
    container = Container(tmp_path)
    try:
        container.wait_ready()
        body = {"model": MODEL, "prompt": prompt_of(10), "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{container.url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
            family = container.family()
            container.process.kill()
            eventually(lambda: not alive(family), 10, "the end of every process")
    finally:
        container.end()
