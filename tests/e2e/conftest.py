"""One running stack with two virtual GPUs and two gateways, shared by every end-to-end test of a run."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from tests.support.stack import Stack, alive, write_config
from tests.support.waiting import eventually


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """``penstock up`` on real vLLM; leaves no process behind, which is checked at the end."""
    running = Stack(write_config(tmp_path_factory.mktemp("stack"), count=2, workers=2))
    family = [psutil.Process(running.process.pid), *running.descendants()]
    yield running
    family += running.descendants()
    running.stop()
    eventually(lambda: not alive(family), 10, "the end of every process of the stack")
