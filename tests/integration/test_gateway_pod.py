"""What a gateway finds in a container: nothing that it may write to, files that are mounted, and no state folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
import pytest

from tests.support.stack import PENSTOCK, free_ports
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

TOKEN = "a-token-that-was-mounted"
LONG_S = 30.0

CONFIG = """\
state_dir: /proc/nowhere
redis: {redis}
gateway: {{port: {port}, admin_port: {admin_port}, admin_token_file: {token}}}
pools:
  - model: llama-3.1-8b
    replicas: [{{url: 'http://127.0.0.1:9', profile: h100-llama-3.1-8b}}]
tiers:
  - {{name: pro, share: 0.9}}
orgs:
  - {{name: acme}}
"""


def test_a_mounted_token_needs_no_state_folder(redis_url: str, tmp_path: Path) -> None:
    """With ``admin_token_file`` a gateway starts, though its state folder cannot exist; it writes no file anywhere."""
    token, config = tmp_path / "token", tmp_path / "penstock.yaml"
    token.write_text(TOKEN + "\n")
    port, admin_port = free_ports(2)
    config.write_text(CONFIG.format(redis=redis_url, port=port, admin_port=admin_port, token=token))
    admin = f"http://127.0.0.1:{admin_port}"
    argv = [*PENSTOCK, "gateway", "--config", str(config)]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as gateway:

        def lives() -> bool:
            assert gateway.poll() is None, gateway.communicate()
            try:
                return httpx.get(admin + "/live", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        try:
            eventually(lives, LONG_S, "the gateway's start")
            opened = httpx.get(admin + "/metrics", headers={"authorization": f"Bearer {TOKEN}"}, timeout=5)
            open_to_write = [
                path
                for path in Path(f"/proc/{gateway.pid}/fd").iterdir()
                if path.readlink().is_file() and "w" in _mode(gateway.pid, path.name)
            ]
        finally:
            gateway.terminate()
            said, _ = gateway.communicate(timeout=LONG_S)
    assert (opened.status_code, open_to_write) == (200, [])
    assert gateway.returncode == 0, said
    assert {path.name for path in tmp_path.iterdir()} == {"token", "penstock.yaml"}


def _mode(pid: int, descriptor: str) -> str:
    """How a process has opened a file: "r" or "w"."""
    (flags,) = (line for line in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines() if "flags" in line)
    return "w" if int(flags.split()[1], 8) & 0o3 else "r"
