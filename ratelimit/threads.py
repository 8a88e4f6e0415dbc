"""Work in a thread that nobody goes on without: a cancellation waits until the thread has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the work returns or raises, done in a thread. A cancellation is raised when that has ended, not before.

    A thread cannot be stopped: without this a leader would give its lease back and still be writing files. What a
    cancelled work raises is logged.
    """
    working = asyncio.create_task(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with suppress(asyncio.CancelledError):  # another one: the first is raised in the end
                await asyncio.wait((working,))
        if error := working.exception():
            log.error("while it was being stopped: %s", error)
        raise
