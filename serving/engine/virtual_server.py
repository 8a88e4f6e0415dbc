"""vLLM's API server as a virtual GPU runs it: the same server, its engine core forked rather than spawned.

vLLM spawns the engine core of a CPU build, which imports everything a second time. Nothing here needs that, since no
device is opened, so the fork halves a replica's start-up and memory. Run in place of vLLM's module, same options.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
from multiprocessing.context import BaseContext


def main() -> None:
    """Serve until stopped."""
    from vllm.v1.engine import utils  # noqa: PLC0415 - seconds of imports, for this process alone

    utils.get_mp_context = _fork_context
    # A signal to the child would otherwise wake the parent's event loop, whose descriptor the child inherits.
    os.register_at_fork(before=gc.freeze, after_in_child=lambda: signal.set_wakeup_fd(-1))
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def _fork_context() -> BaseContext:
    return multiprocessing.get_context("fork")


if __name__ == "__main__":
    main()
