"""Start a process that cannot outlive us: one child under a guard of its own (see ``guard_process``).

Engines, Redis and gateways are all started through here, so that whatever ends this process, SIGKILL included, leaves
nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.engine import guard_process

#: Grace given to the child when the parent dies without a word.
ORPHAN_GRACE_S = 3.0
#: How long the guard may take to report that the child runs.
START_TIMEOUT_S = 30.0


class GuardError(RuntimeError):
    """The child could not be started; says why."""


class GuardedProcess:
    """One child under a guard process; dies with us however we die."""

    def __init__(self, guard: _Guard, pid: int, log_path: Path) -> None:
        self.pid = pid
        self.guard_pid = guard.process.pid
        self._guard = guard
        self._log_path = log_path
        self._status: int | None = None

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> GuardedProcess:
        """Start ``argv`` under a guard, its output appended to ``log_path``; ``env`` None inherits ours.

        Blocks for the tens of milliseconds that the guard needs. Raises ``GuardError`` when ``argv`` cannot be run.
        """
        guard = _start_guard(argv, log_path, env, cwd)
        try:
            return cls(guard, _started_pid(guard, argv, log_path), log_path)
        except GuardError:
            guard.process.kill()
            guard.close()
            raise

    def poll(self) -> int | None:
        """The child's exit status (−N: ended by signal N), None while it or any of its group runs."""
        if self._status is None and self._guard.has_report(0):
            self._status = self._final_status(self._guard.read_report())
            self._guard.close()
        return self._status

    async def wait(self) -> int:
        """Wait for the child and its group to end, and return its exit status."""
        while (status := self.poll()) is None:
            await self._guard.until_report()
        return status

    async def stop(self, grace_s: float = 3.0) -> None:
        """SIGTERM to the child's group, SIGKILL to what is left after ``grace_s``; idempotent."""
        if self.poll() is not None:
            return
        self._guard.request(f"stop {grace_s}")
        try:
            await asyncio.wait_for(self.wait(), grace_s + guard_process.KILL_WAIT_S + 1.0)
        except TimeoutError:
            self._guard.process.kill()
            await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the child's output."""
        with self._log_path.open(encoding="utf-8", errors="replace") as log:
            return "".join(deque(log, maxlen=lines))

    def _final_status(self, report: str) -> int:
        if report.startswith("exit "):
            return int(report.removeprefix("exit "))
        with contextlib.suppress(ProcessLookupError):  # the guard was killed: its work is ours
            os.killpg(self.pid, signal.SIGKILL)
        return -signal.SIGKILL


class _Guard:
    """The guard process and our ends of its two pipes."""

    def __init__(self, process: subprocess.Popen[bytes], request_fd: int, report_fd: int) -> None:
        self.process = process
        self._request_fd = request_fd
        self._report_fd = report_fd

    def request(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its report says how
            os.write(self._request_fd, line.encode() + b"\n")

    def has_report(self, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self._report_fd, select.POLLIN | select.POLLHUP)
        return bool(poller.poll(timeout_s * 1000))

    def read_report(self) -> str:
        """One line, "" when the guard is no more; lines are shorter than a pipe's atomic write."""
        line = b""
        while not line.endswith(b"\n") and (byte := os.read(self._report_fd, 1)):
            line += byte
        return line.decode(errors="replace").rstrip("\n")

    async def until_report(self) -> None:
        """Wait for a report; each waiter on its own descriptor, since a loop keeps one callback for each."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        descriptor = os.dup(self._report_fd)
        loop.add_reader(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        """Release the pipes of a guard that has reported the end, or was killed."""
        os.close(self._request_fd)
        os.close(self._report_fd)
        self.process.wait()


def _start_guard(argv: Sequence[str], log_path: Path, env: Mapping[str, str] | None, cwd: Path | None) -> _Guard:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    guard_stdin, request_fd = os.pipe()
    report_fd, guard_stdout = os.pipe()
    try:
        with log_path.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - the caller's own command, no shell
                [sys.executable, "-I", "-S", guard_process.__file__, str(ORPHAN_GRACE_S), *argv],
                stdin=guard_stdin,
                stdout=guard_stdout,
                stderr=log,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
    finally:
        os.close(guard_stdin)
        os.close(guard_stdout)
    return _Guard(process, request_fd, report_fd)


def _started_pid(guard: _Guard, argv: Sequence[str], log_path: Path) -> int:
    if not guard.has_report(START_TIMEOUT_S):
        raise GuardError(f"{argv[0]} was not started within {START_TIMEOUT_S:.0f} s; see {log_path}")
    report = guard.read_report()
    if not report.startswith("pid "):
        reason = report.removeprefix("error ").strip() or f"the guard ended; see {log_path}"
        raise GuardError(f"cannot start {argv[0]}: {reason}")
    return int(report.removeprefix("pid "))
