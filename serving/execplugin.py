"""Runs a command for so long and no longer: ``python execplugin.py SECONDS COMMAND [ARGUMENT ...]``.

The Kubernetes client waits for a credential plugin of a kubeconfig without an end, and lets it run on when it is itself
told to stop. Under this program a plugin that hangs is ended, with all that it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

#: What ``timeout`` of the coreutils exits with.
TIMED_OUT = 124


def bounded(command: list[str], within_s: float) -> list[str]:
    """The command that runs this one and ends it after so many seconds."""
    return [sys.executable, "-I", __file__, f"{within_s:g}", *command]


def main(within_s: float, command: list[str]) -> int:
    """Run the command; its exit status, or ``TIMED_OUT``. What it prints goes where this program's own would."""
    # The command is that of the operator's own kubeconfig.
    with subprocess.Popen(command, start_new_session=True) as plugin:  # noqa: S603
        try:
            return plugin.wait(within_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(plugin.pid, signal.SIGKILL)
            return TIMED_OUT


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
