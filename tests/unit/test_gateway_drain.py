"""The end of the time that open requests have."""

from __future__ import annotations

import asyncio

import pytest

from ratelimit.gateway.drain import Drain

LONG_S = 30.0


async def waits(drain: Drain, deadline: float | None) -> str:
    """Wait for ever inside; how that ended."""
    try:
        async with drain.until(deadline):
            await asyncio.Event().wait()
    except TimeoutError:
        return "cut off" if drain.is_over else "its own deadline"
    return "ended"


async def test_everything_open_is_cut_off_at_once() -> None:
    """With a deadline of its own or without one, and also what begins later."""
    drain = Drain()
    far = asyncio.get_running_loop().time() + 1e6
    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(waits(drain, deadline)) for deadline in (far, None)]
        await asyncio.sleep(0)
        drain.cut_off()
        waiting.append(tasks.create_task(waits(drain, far)))
    assert {task.result() for task in waiting} == {"cut off"}


async def test_a_deadline_that_has_passed_is_left_alone() -> None:
    """What is ending by its own deadline in this very turn is not ended twice, and does not keep the rest from it."""
    drain = Drain()
    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
        own, other = (tasks.create_task(waits(drain, deadline)) for deadline in (0.0, None))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(drain.cut_off)
    assert (own.result(), other.result()) == ("cut off", "cut off")


async def test_before_the_end_it_is_a_plain_timeout() -> None:
    """A deadline that passes raises, one that does not is forgotten, and an end that has begun changes nothing."""
    drain = Drain()
    drain.begin()
    async with asyncio.timeout(LONG_S):
        assert await waits(drain, 0.0) == "its own deadline"
    async with drain.until(None):
        pass
    drain.cut_off()
    with pytest.raises(TimeoutError):
        async with drain.until(None):
            await asyncio.sleep(LONG_S)
