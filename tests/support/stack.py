"""A real ``penstock up`` as a subprocess, and what tests ask of it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtests.stack import free_ports as neighbouring_free_ports
from tests.support.waiting import eventually

PENSTOCK = (sys.executable, "-m", "ratelimit.cli")
MODEL = "llama-3.1-8b"

CONFIG = """\
state_dir: state
redis: embedded
gateway: {{port: {port}, admin_port: {admin_port}, workers: {workers}, redis_timeout_ms: 5000}}
pools:
  - model: llama-3.1-8b
    slo: {{ttft_ms: 1000, tpot_ms: 50}}
    mix: {{name: chat, scale: 0.125}}
    default_max_output: 64
    raise_after_s: 1
    stuck_after_s: 3
    engines: [{{device: virtual, profile: h100-llama-3.1-8b, count: {count}, slowdown: 2, port: {engine_port}}}]
tiers:
  - {{name: pro, share: 0.6, ceiling: 1.0, priority: 0, burst_s: 5}}
  - {{name: free, share: 0.2, priority: 1, burst_s: 5}}
  - {{name: tiny, share: 0.004, ceiling: 0.004, holds: maximum, priority: 2, burst_s: 5}}
orgs:
  - {{name: acme}}
"""


def free_ports(count: int) -> list[int]:
    """``count`` neighbouring ports that nothing listens on; tests in other processes look elsewhere first."""
    return neighbouring_free_ports(count, first=20_000 + 32 * (os.getpid() % 256))


def write_config(folder: Path, count: int = 1, workers: int = 1, text: str = CONFIG) -> Path:
    """A config in ``folder`` for ``count`` virtual GPUs and ``workers`` gateways, on free ports."""
    ports = free_ports(3 + workers + 4)
    path = folder / "penstock.yaml"
    path.write_text(
        text.format(port=ports[0], admin_port=ports[1], workers=workers, count=count, engine_port=ports[1 + workers])
    )
    return path


def penstock(*args: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run([*PENSTOCK, *map(str, args)], capture_output=True, text=True, timeout=timeout_s, check=False)


class Stack:
    """A running ``penstock up --json``."""

    def __init__(self, config_path: Path, start_timeout_s: float = 150) -> None:
        self.config_path = config_path
        self._log = (config_path.parent / "up.log").open("w")
        self.process = subprocess.Popen(
            [*PENSTOCK, "up", "--config", str(config_path), "--json"],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.ready = self._read_ready(start_timeout_s)
        self.url: str = self.ready["url"]
        self.admin_url: str = self.ready["admin_url"]
        self.key: str = self.ready["key"]

    def _read_ready(self, timeout_s: float) -> Any:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.stop()
            raise AssertionError(f"penstock up did not come up:\n{self.log()}")
        return json.loads(line)

    def log(self) -> str:
        """What it has said on standard error."""
        return (self.config_path.parent / "up.log").read_text()

    def descendants(self) -> list[psutil.Process]:
        """Every process below it that is alive."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def key_rows(self) -> Any:
        """Every key as `penstock keys list` shows it."""
        return json.loads(penstock("keys", "list", "--json", "--config", self.config_path).stdout)

    def create_key(self, tier: str, name: str = "") -> str:
        """A new key, once the gateways know it."""
        options = ("--org", "acme", "--tier", tier, "--name", name, "--json")
        made = penstock("keys", "create", *options, "--config", self.config_path)
        assert made.returncode == 0, made.stderr
        key: str = json.loads(made.stdout)["key"]
        eventually(lambda: self.get("/v1/models", key).status_code == 200, 5, "a new key's acceptance")
        return key

    def get(self, path: str, key: str) -> httpx.Response:
        """GET from the data port."""
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {key}"}, timeout=30)

    def limits(self, key: str) -> dict[str, Any]:
        """The key's own limits by name."""
        return {limit["name"]: limit for limit in self.get("/v1/limits", key).json()["limits"]}

    def admin_headers(self) -> dict[str, str]:
        """What the admin port asks for."""
        token = Path(self.ready["admin_token_file"]).read_text().strip()
        return {"authorization": f"Bearer {token}"}

    def publication(self) -> Any:
        """The limits in force."""
        return httpx.get(self.admin_url + "/limits", headers=self.admin_headers(), timeout=10).json()

    def tier(self, name: str) -> Any:
        """What is published of one tier."""
        return next(tier for tier in self.publication()["tiers"] if tier["tier"] == name)

    def tier_limits(self, name: str) -> Any:
        """The published limits of one tier's keys."""
        return self.tier(name)["limits"]

    def replica_urls(self) -> set[str]:
        """The replicas that count."""
        return {replica["url"] for replica in self.publication()["pools"][0]["replicas"]}

    def stop(self, signum: signal.Signals = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Send the signal and wait for the end; the exit status."""
        self.process.send_signal(signum)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._log.close()


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those of the processes that still run."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def metric(exposition: str, name: str, /, **labels: str) -> float:
    """The sum of a metric's series that have these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in exposition.splitlines()
        if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in wanted)
    )
