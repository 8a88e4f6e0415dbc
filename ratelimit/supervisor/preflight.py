"""What must hold before a stack is started: its state folder is its own, its ports are free,
and its SLOs can be met.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
from collections.abc import Iterator
from pathlib import Path

from ratelimit.config import Config, GatewayConfig
from ratelimit.feasibility import feasibility_problems
from ratelimit.statefile import private_folder


class StackError(RuntimeError):
    """Why the stack cannot come up, and what to do about it."""


@contextlib.contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """Hold the state folder's lock, so that two stacks never share one. Raises ``StackError``."""
    private_folder(state_dir)
    with (state_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"another `penstock up` uses {state_dir}; stop it, or set another state_dir") from error
        yield


def check_ports_free(gateway: GatewayConfig) -> None:
    """Raise ``StackError`` for the first port that the gateway cannot have."""
    ports = {gateway.port: "gateway.port"}
    ports |= {gateway.admin_port + worker: "gateway.admin_port" for worker in range(gateway.workers)}
    for port, setting in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((gateway.host, port))
            except OSError as error:
                raise StackError(
                    f"port {port} ({setting}) on {gateway.host} cannot be used: {error.strerror}; "
                    f"stop what listens there or set another {setting}"
                ) from error


async def check_feasible(config: Config) -> None:
    """Raise ``StackError`` where no load meets an SLO: its limits would be missing, and nobody would know why."""
    problems = await asyncio.to_thread(feasibility_problems, config)
    if problems:
        raise StackError("\n".join(problems))
