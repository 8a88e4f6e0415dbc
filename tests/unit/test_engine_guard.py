"""The guard: whatever ends the parent, the guard or the child, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from serving.engine.guard import GuardedProcess, GuardError

#: A child that ignores SIGTERM and has a grandchild that does too; writes both pids to its output.
STUBBORN = 'trap "" TERM; sleep 600 & echo $$ $!; while true; do wait; done'
#: A child that ends at once and leaves a grandchild behind.
DESERTER = "sleep 600 & echo $$ $!; exit 3"

Start = Callable[..., GuardedProcess]


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll until the condition holds; fail when it does not within the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def written_pids(log: Path) -> list[int]:
    def read() -> str:
        return log.read_text() if log.exists() else ""

    await eventually(lambda: read().endswith("\n"))
    return [int(word) for word in read().split()]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    started: list[GuardedProcess] = []

    def start_shell(script: str) -> GuardedProcess:
        started.append(GuardedProcess.start(["bash", "-c", script], log_path=tmp_path / "log"))
        return started[-1]

    yield start_shell
    for process in started:
        await process.stop(0.0)


async def test_exit_status_and_output_are_those_of_the_child(start: Start) -> None:
    """The parent learns how the child ended, and reads what it wrote."""
    process = start("echo one; echo two >&2; exit 7")
    assert await process.wait() == 7
    assert process.poll() == 7
    assert process.log_tail() == "one\ntwo\n"
    assert process.log_tail(1) == "two\n"


async def test_poll_is_none_while_the_child_runs(start: Start) -> None:
    """A live child has no status."""
    process = start("sleep 600")
    assert process.poll() is None
    assert is_alive(process.pid)


async def test_stop_lets_the_child_end_in_good_order(start: Start, tmp_path: Path) -> None:
    """SIGTERM comes first, so that a child may clean up and choose its status."""
    process = start('trap "exit 5" TERM; echo 1; sleep 600 & wait')
    await written_pids(tmp_path / "log")
    await process.stop(10.0)
    assert process.poll() == 5


async def test_stop_kills_a_stubborn_group_after_the_grace(start: Start, tmp_path: Path) -> None:
    """What ignores SIGTERM is killed with its own children, and stopping twice is harmless."""
    process = start(STUBBORN)
    pids = await written_pids(tmp_path / "log")
    await asyncio.gather(process.stop(0.1), process.stop(0.1))
    await process.stop()
    assert process.poll() == -signal.SIGKILL
    assert not any(map(is_alive, pids))


async def test_child_that_ends_leaves_no_grandchild(start: Start, tmp_path: Path) -> None:
    """When the child is gone, what it left in its group is killed before its status is told."""
    process = start(DESERTER)
    assert await process.wait() == 3
    assert not any(map(is_alive, await written_pids(tmp_path / "log")))


async def test_killed_guard_takes_the_child_with_it(start: Start, tmp_path: Path) -> None:
    """A SIGKILL of the guard itself leaves neither the child nor the grandchild."""
    process = start(STUBBORN)
    pids = await written_pids(tmp_path / "log")
    os.kill(process.guard_pid, signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    await eventually(lambda: not any(map(is_alive, pids)))


async def test_killed_parent_leaves_nothing(tmp_path: Path) -> None:
    """A SIGKILL of the parent ends the guard, a stubborn child and its children."""
    log = tmp_path / "log"
    parent_code = (
        "import sys, time; from pathlib import Path; from serving.engine.guard import GuardedProcess\n"
        "p = GuardedProcess.start(['bash', '-c', sys.argv[1]], log_path=Path(sys.argv[2]))\n"
        "print(p.guard_pid, flush=True); time.sleep(600)"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", parent_code, STUBBORN, str(log), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    guard_pid = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    pids = [guard_pid, *await written_pids(log)]
    assert all(map(is_alive, pids))
    parent.kill()
    await parent.wait()
    await eventually(lambda: not any(map(is_alive, pids)))


def test_missing_program_is_named(tmp_path: Path) -> None:
    """A command that cannot be run is an error that names it."""
    with pytest.raises(GuardError, match="cannot start /no/such/program: No such file"):
        GuardedProcess.start(["/no/such/program"], log_path=tmp_path / "log")
