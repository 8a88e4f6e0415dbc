"""The guard: a small process that starts one child, watches it, and clears it away however its parent ends.

Run by file path in an isolated interpreter, so that it is up in tens of milliseconds; ``guard.GuardedProcess`` is the
parent's side. It leads a session of its own and starts the child in another, so that a Ctrl-C meant for the parent
reaches neither. It ends the child's whole process group

- when the parent asks for it (``stop SECONDS`` on stdin), or is gone (end of file on stdin), or on SIGTERM:
  SIGTERM to the group, SIGKILL to what is left after the grace;
- when the child has ended by itself: SIGKILL to what it left behind, since nobody is there to end it in good order.

Then it reports ``exit STATUS`` on stdout and ends. As the subreaper of its descendants (Linux) it is told of orphans,
so an empty group is known and not guessed. Should the guard itself be killed, the kernel kills the child (Linux).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

#: How long the kernel may take to remove what SIGKILL has hit.
KILL_WAIT_S = 5.0

_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(argv: list[str]) -> int:
    """``guard_process.py GRACE_S COMMAND...``: one report line for the start, one for the end."""
    grace_s, command = float(argv[1]), argv[2:]
    wakeup_fd = _wake_on_signals()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = _start(command)
    except OSError as error:
        _report(f"error {error.strerror}: {error.filename or command[0]}")
        return 1
    _report(f"pid {child.pid}")
    requested_grace_s = _watch(child, wakeup_fd, grace_s)
    status = _clear(child, requested_grace_s)
    _report(f"exit {status}")
    return 0


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    guard_pid = os.getpid()

    def die_with_guard() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard_pid:  # the guard died before the kernel was told
            os.kill(os.getpid(), signal.SIGKILL)

    return subprocess.Popen(  # noqa: S603 - the parent's own command, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        stderr=sys.stderr.fileno(),
        start_new_session=True,
        preexec_fn=die_with_guard,  # noqa: PLW1509 - the guard has one thread
    )


def _watch(child: subprocess.Popen[bytes], wakeup_fd: int, grace_s: float) -> float | None:
    """Wait for the child's end (None) or for a reason to end it (the grace in seconds)."""
    stdin_fd = sys.stdin.fileno()
    while child.poll() is None:
        ready, _, _ = select.select([stdin_fd, wakeup_fd], [], [])
        if stdin_fd in ready:
            return _requested_grace_s(os.read(stdin_fd, 256), grace_s)
        if signal.SIGTERM in os.read(wakeup_fd, 256):
            return grace_s
        _reap_orphans(child.pid)
    return None


def _requested_grace_s(message: bytes, default_s: float) -> float:
    """Of the first ``stop SECONDS``; end of file means that the parent is no more."""
    return float(message.split()[1]) if message else default_s


def _clear(child: subprocess.Popen[bytes], grace_s: float | None) -> int:
    """End the child's group and return the child's status; a ``grace_s`` of None leaves out the SIGTERM."""

    def is_gone() -> bool:
        child.poll()
        _reap_orphans(child.pid)
        return not _signal_group(child.pid, 0)

    if grace_s is not None and _signal_group(child.pid, signal.SIGTERM) and _poll_until(is_gone, grace_s):
        return child.wait()
    _signal_group(child.pid, signal.SIGKILL)
    _poll_until(is_gone, KILL_WAIT_S)
    return child.wait()


def _signal_group(group: int, signal_number: int) -> bool:
    """Whether the group still had a member to signal."""
    try:
        os.killpg(group, signal_number)
    except ProcessLookupError:
        return False
    return True


def _poll_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def _reap_orphans(child_pid: int) -> None:
    """Collect the orphans that have ended, so that none counts as a member of the group; Popen collects the child."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == child_pid:
            return
        os.waitpid(ended.si_pid, 0)


def _wake_on_signals() -> int:
    """A descriptor that receives the number of each SIGCHLD and SIGTERM."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return read_fd


def _report(line: str) -> None:
    try:
        os.write(sys.stdout.fileno(), line.replace("\n", " ").encode() + b"\n")
    except BrokenPipeError:
        return  # the parent is gone, so nobody is left to be told


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
