"""Work in a thread outlives its caller's cancellation, and the caller its work."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ratelimit.threads import to_its_end


async def test_a_cancellation_waits_for_the_end_of_the_thread() -> None:
    """However often it comes; what it was doing is whole then."""
    is_begun, may_end, written = threading.Event(), threading.Event(), list[str]()

    def write() -> None:
        is_begun.set()
        may_end.wait(10)
        written.append("whole")

    task = asyncio.create_task(to_its_end(write))
    await asyncio.to_thread(is_begun.wait, 10)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert written == ["whole"]


async def test_what_the_work_says_comes_back() -> None:
    """Its value, or its error."""
    assert await to_its_end(int, "7") == 7
    with pytest.raises(ValueError, match="invalid literal"):
        await to_its_end(int, "seven")


async def test_the_error_of_a_cancelled_work_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It is told, though nobody waits for it any more."""
    may_end = threading.Event()

    def fail() -> None:
        may_end.wait(10)
        raise OSError("the disk is full")

    task = asyncio.create_task(to_its_end(fail))
    await asyncio.sleep(0)
    task.cancel()
    may_end.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert "the disk is full" in caplog.text
