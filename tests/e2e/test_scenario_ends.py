"""The scenario cleans up behind itself, wherever it is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.stack import alive
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

STARTED = "1 replica, limiter off: waiting"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_scenario_leaves_no_process(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    """Ctrl-C with the stack up ends every process and says so by its status; SIGKILL ends them by their guards."""
    # A suite that runs in a shell's background ignores Ctrl-C, and its children would too.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    told = tmp_path / "told.log"
    with told.open("w") as log:
        scenario = subprocess.Popen(
            [sys.executable, "-m", "loadtests.scenario_01_added_capacity", "--out", str(tmp_path / "out")],
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    try:
        eventually(lambda: STARTED in told.read_text() or scenario.poll() is not None, 180, "the start of the stack")
        family = psutil.Process(scenario.pid).children(recursive=True)
        assert any("redis-server" in process.name() for process in family)
        scenario.send_signal(signum)

        assert scenario.wait(60) == status
        eventually(lambda: not alive(family), 30, "the end of every process of the scenario")
    finally:
        signal.signal(signal.SIGINT, ours)
        scenario.kill()
        scenario.wait()
