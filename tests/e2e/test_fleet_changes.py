"""What happens to the published limits when replicas come, go and freeze. Runs on the shared stack and mends it."""

from __future__ import annotations

import signal
import time
from threading import Thread

import httpx
import psutil
import pytest

from tests.support.stack import MODEL, Stack
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

#: The bound that the project states for a lost replica; a frozen one adds its pool's stuck_after_s (3 s here).
FALL_WITHIN_S = 2.0
STUCK_AFTER_S = 3.0
PROBE_ALLOWANCE_S = 2.5


def output_tokens_per_minute(stack: Stack) -> int:
    limit: int = stack.limits(stack.key)["output_tokens"]["per_minute"]
    return limit


def api_server(stack: Stack, url: str) -> psutil.Process:
    """The engine process that listens at ``url``."""
    port = int(url.rsplit(":", 1)[1])
    for process in stack.descendants():
        if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections()):
            return process
    raise AssertionError(f"nothing listens at {url}")


def engine_core(stack: Stack, url: str) -> psutil.Process:
    """The process that runs the scheduler of the engine at ``url``."""
    children = api_server(stack, url).children(recursive=True)
    return max(children, key=lambda process: process.memory_info().rss)


def test_killing_a_replica_lowers_limits_within_two_seconds_and_its_restart_raises_them(stack: Stack) -> None:
    """Capacity that is gone is not promised; when it is back and has stayed, it is promised again."""
    eventually(lambda: len(stack.replica_urls()) == 2, 60, "both replicas' presence")
    before = output_tokens_per_minute(stack)
    victim = min(stack.replica_urls())
    process = api_server(stack, victim)

    process.send_signal(signal.SIGKILL)
    killed_at_s = time.monotonic()
    eventually(lambda: output_tokens_per_minute(stack) < before, 10, "the fall of the limits")

    assert time.monotonic() - killed_at_s <= FALL_WITHIN_S
    assert output_tokens_per_minute(stack) == pytest.approx(before / 2, rel=0.05)
    assert stack.replica_urls() == {url for url in stack.replica_urls() if url != victim}

    eventually(lambda: output_tokens_per_minute(stack) == before, 120, "the rise of the limits")


def test_a_frozen_replica_is_found_within_its_stated_time_and_counts_again_when_it_moves(stack: Stack) -> None:
    """A frozen engine answers /health with 200: only its token counters tell, and they do."""
    eventually(lambda: len(stack.replica_urls()) == 2, 120, "both replicas' presence")
    before = output_tokens_per_minute(stack)
    victim = max(stack.replica_urls())
    core = engine_core(stack, victim)
    body = {"model": MODEL, "prompt": "water", "max_tokens": 400, "ignore_eos": True}
    held = Thread(target=lambda: httpx.post(victim + "/v1/completions", json=body, timeout=120))

    core.suspend()
    try:
        held.start()
        frozen_at_s = time.monotonic()
        eventually(lambda: output_tokens_per_minute(stack) < before, 30, "the fall of the limits")
        found_after_s = time.monotonic() - frozen_at_s
        assert httpx.get(victim + "/health", timeout=10).status_code == 200
    finally:
        core.resume()
        held.join()

    assert found_after_s <= STUCK_AFTER_S + PROBE_ALLOWANCE_S
    eventually(lambda: output_tokens_per_minute(stack) == before, 60, "the rise of the limits")


def test_a_changed_config_adds_a_replica_to_the_live_gateway_and_takes_it_away(stack: Stack) -> None:
    """One more engine in the file raises the limits while requests are served; one less lowers them again."""
    eventually(lambda: len(stack.replica_urls()) == 2, 120, "both replicas' presence")
    before = output_tokens_per_minute(stack)
    text = stack.config_path.read_text()

    stack.config_path.write_text(text.replace("count: 2", "count: 3"))
    try:
        eventually(lambda: len(stack.replica_urls()) == 3, 120, "the third replica's presence")
        assert output_tokens_per_minute(stack) == pytest.approx(before * 1.5, rel=0.05)
    finally:
        stack.config_path.write_text(text)

    eventually(lambda: output_tokens_per_minute(stack) == before, 30, "the fall of the limits")


def test_a_config_that_is_wrong_is_not_taken_up(stack: Stack) -> None:
    """The last good config stays, and the log says what is wrong with the new one."""
    text = stack.config_path.read_text()
    epoch = stack.publication()["epoch"]

    stack.config_path.write_text(text.replace("share: 0.6", "share: 6.0"))
    try:
        eventually(lambda: "not taken up" in stack.log(), 10, "the problem in the log")
    finally:
        stack.config_path.write_text(text)

    assert stack.publication()["epoch"] == epoch
