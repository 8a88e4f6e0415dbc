"""How ``penstock up`` starts, fails to start, and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest

from tests.support.stack import PENSTOCK, Stack, alive, free_ports, penstock, write_config
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def mentions(folder: Path) -> list[psutil.Process]:
    """Every live process but this one whose command line or environment names ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            known = " ".join(process.cmdline()) + str(process.environ())
        except psutil.Error:
            continue
        if str(folder) in known and process.pid != os.getpid():
            found.append(process)
    return alive(found)


def test_sigkill_of_up_leaves_no_process_behind(tmp_path: Path) -> None:
    """Redis, engines and gateways end although their parent could not tell them to."""
    stack = Stack(write_config(tmp_path))
    family = stack.descendants()
    assert len(family) >= 6  # a guard and a child each for Redis, engine and gateway

    stack.stop(signal.SIGKILL)

    eventually(lambda: not alive(family), 15, "the end of every process")
    assert not mentions(tmp_path)


def test_ctrl_c_while_engines_start_stops_everything(tmp_path: Path) -> None:
    """An operator who changes their mind during the start gets their prompt back, and nothing stays."""
    with (tmp_path / "up.log").open("w") as log:
        process = subprocess.Popen(
            [*PENSTOCK, "up", "--config", str(write_config(tmp_path))], stderr=log, start_new_session=True
        )
    family = psutil.Process(process.pid)
    eventually(lambda: len(family.children(recursive=True)) >= 4, 60, "the start of an engine")
    children = family.children(recursive=True)

    process.send_signal(signal.SIGINT)

    assert process.wait(30) == 0
    eventually(lambda: not alive(children), 10, "the end of every process")


def test_a_busy_port_is_named_with_the_setting_to_change(tmp_path: Path) -> None:
    """Nothing is started when the gateway's port is taken, and the message says which setting that is."""
    config = write_config(tmp_path)
    port = int(config.read_text().split("port: ")[1].split(",")[0])
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        result = penstock("up", "--config", config)

    assert result.returncode == 1
    assert f"port {port} (gateway.port)" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_busy_engine_port_is_named(tmp_path: Path) -> None:
    """The same for the port of an engine."""
    config = write_config(tmp_path)
    port = int(config.read_text().split("slowdown: 2, port: ")[1].split("}")[0])
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        result = penstock("up", "--config", config)

    assert result.returncode == 1
    assert str(port) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_dead_redis_at_start_is_said_plainly(tmp_path: Path) -> None:
    """`up` ends with the address that did not answer, not with a trace."""
    config = write_config(tmp_path)
    port = free_ports(9)[8]
    config.write_text(config.read_text().replace("redis: embedded", f"redis: redis://127.0.0.1:{port}/0"))

    result = penstock("up", "--config", config)

    assert result.returncode == 1
    assert f"127.0.0.1:{port}" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_vllm_is_said_with_what_to_install(tmp_path: Path) -> None:
    """On a machine without vLLM `up` says so, and how to get it."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("vllm", "_", "distutils")):
            (site / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    environment = os.environ | {"PYTHONPATH": f"{site}:{Path(__file__).parents[2]}"}

    result = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-m", "ratelimit.cli", "up", "--config", str(write_config(tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )

    assert result.returncode == 1
    assert "has no vLLM" in result.stderr
    assert "install" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_stacks_do_not_share_a_state_folder(stack: Stack) -> None:
    """A second `up` on the same state folder is refused before it touches anything."""
    text = stack.config_path.read_text()
    other = stack.config_path.with_name("other.yaml")
    ports = free_ports(12)
    gateway = text.split("gateway: ")[1].splitlines()[0]
    other.write_text(text.replace(gateway, f"{{port: {ports[8]}, admin_port: {ports[9]}}}"))

    result = penstock("up", "--config", other)

    assert result.returncode == 1
    assert "another `penstock up` uses" in result.stderr
