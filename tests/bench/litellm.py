"""LiteLLM's proxy with its limiter (v3) on Redis, in an environment of its own.

The environment is made once, in the user's cache, from ``litellm.lock``: it needs a package index the first time.
LiteLLM reads keys from a database of its own; here a hook gives every key the limits of the bench. Everything else is
its default, but for what would leave the machine: the list of models' prices, and telemetry.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import msgspec

from tests.support.gateway import MODEL
from tests.support.stack import free_ports
from tests.support.waiting import eventually

VERSION = "1.109.1"
LOCK = Path(__file__).with_name("litellm.lock")
INSTALL_TIMEOUT_S, START_TIMEOUT_S, STOP_TIMEOUT_S = 600, 90, 10
MASTER_KEY = "sk-bench-master"

_CONFIG = f"""\
model_list:
  - model_name: {MODEL}
    litellm_params: {{{{model: hosted_vllm/{MODEL}, api_base: "{{upstream}}/v1", api_key: none}}}}
litellm_settings: {{{{num_retries: 0}}}}
general_settings:
  master_key: {MASTER_KEY}
  custom_auth: bench_auth.user_api_key_auth
  token_rate_limit_type: output
"""
_AUTH = """\
from litellm.proxy._types import UserAPIKeyAuth


async def user_api_key_auth(request, api_key):
    return UserAPIKeyAuth(api_key=api_key, tpm_limit={tokens_per_minute}, rpm_limit={requests_per_minute})
"""


class LitellmUnavailableError(RuntimeError):
    """LiteLLM cannot be installed or started; the message says why."""


class KeyLimits(msgspec.Struct, frozen=True):
    """The limits of every key. Tokens are output tokens."""

    requests_per_minute: int
    tokens_per_minute: int


def installed() -> Path:
    """The environment's folder, made if it is not there. Raises LitellmUnavailableError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "penstock" / f"litellm-{VERSION}"
    done = folder / "installed"
    if done.exists() and done.read_bytes() == LOCK.read_bytes():
        return folder
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps", "--requirement", LOCK)
    for command in ((sys.executable, "-m", "venv", "--clear", folder), pip):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            raise LitellmUnavailableError(f"LiteLLM {VERSION} cannot be installed: {error.stderr[-500:]}") from error
        except subprocess.TimeoutExpired as error:
            raise LitellmUnavailableError(f"LiteLLM {VERSION} was not installed in {INSTALL_TIMEOUT_S} s") from error
    done.write_bytes(LOCK.read_bytes())
    return folder


class LitellmProxy:
    """One proxy process before ``upstream_url``. Use as a context manager; raises LitellmUnavailableError."""

    def __init__(self, upstream_url: str, redis_port: int, limits: KeyLimits) -> None:
        self._upstream_url = upstream_url
        self._redis_port = redis_port
        self._limits = limits
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> LitellmProxy:
        command = installed() / "bin" / "litellm"
        self._folder = tempfile.TemporaryDirectory(prefix="pn-litellm-")
        folder = Path(self._folder.name)
        (folder / "config.yaml").write_text(_CONFIG.format(upstream=self._upstream_url))
        (folder / "bench_auth.py").write_text(_AUTH.format(**msgspec.structs.asdict(self._limits)))
        environment = {
            **os.environ,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(self._redis_port),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "CRITICAL",
        }
        address = ("--host", "127.0.0.1", "--port", str(self._port))
        argv = [str(command), "--config", "config.yaml", "--telemetry", "False", *address]
        self._log = (folder / "log").open("w+")
        self.process = subprocess.Popen(argv, cwd=folder, env=environment, stdout=self._log, stderr=self._log)
        try:
            eventually(self._serves, START_TIMEOUT_S, "LiteLLM's start")
        except AssertionError as error:
            self._log.seek(0)
            said = self._log.read()[-2000:]
            self.__exit__()
            raise LitellmUnavailableError(f"{error}: {said}") from error
        return self

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"LiteLLM exited with {self.process.returncode}")
        try:
            return httpx.get(self.url + "/health/liveliness", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
        self._log.close()
        self._folder.cleanup()
