"""Work beside work, until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence


class StoppedError(Exception):
    """What was awaited was given up, because the stop came first."""


async def or_stop(
    work: Coroutine[None, None, None], stop: asyncio.Event, beside: Sequence[asyncio.Task[None]] = ()
) -> None:
    """Await the work, or give it up as soon as ``stop`` is set (``StoppedError``).

    It is given up too when a task that runs ``beside`` it ends: its error is then the reason why the work cannot end.
    """
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping, *beside), return_when=asyncio.FIRST_COMPLETED)
        for task in beside:
            if task.done():
                task.result()
        if not working.done():
            raise StoppedError
        working.result()
    finally:
        for own in (working, stopping):
            own.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


async def until_stopped(tasks: list[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Wait for ``stop``; a background task that ends before has failed, and its error is raised."""
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait((*tasks, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        stopping.cancel()


@contextlib.asynccontextmanager
async def background(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run coroutines beside the block; they are cancelled when it ends."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
