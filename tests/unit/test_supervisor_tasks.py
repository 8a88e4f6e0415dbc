from __future__ import annotations

import asyncio

import pytest

from ratelimit.supervisor.tasks import StoppedError, background, or_stop, until_stopped


async def forever() -> None:
    await asyncio.Event().wait()


async def failing() -> None:
    raise LookupError("the reason")


async def nothing() -> None:
    return


async def test_work_that_ends_is_done() -> None:
    """Without a stop the work's end is the end."""
    await or_stop(nothing(), asyncio.Event())


async def test_a_stop_gives_the_work_up() -> None:
    """Work that would wait for ever is cancelled when the stop comes."""
    stop = asyncio.Event()
    stop.set()

    with pytest.raises(StoppedError):
        await or_stop(forever(), stop)


async def test_an_error_beside_the_work_is_the_reason_told() -> None:
    """A start-up that waits for a task that has died says why it died, at once."""
    async with background(failing()) as tasks:
        with pytest.raises(LookupError, match="the reason"):
            await or_stop(forever(), asyncio.Event(), tasks)


async def test_a_background_failure_ends_the_wait_for_the_stop() -> None:
    """What runs for ever must not end silently."""
    async with background(forever(), failing()) as tasks:
        with pytest.raises(LookupError, match="the reason"):
            await until_stopped(tasks, asyncio.Event())


async def test_background_work_is_cancelled_with_its_block() -> None:
    """Nothing runs on once the block has ended."""
    async with background(forever(), forever()) as tasks:
        pass

    assert all(task.cancelled() for task in tasks)
