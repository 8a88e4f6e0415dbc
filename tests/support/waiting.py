"""Waiting for a condition, with a deadline, for tests of things that happen in other processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.02


def eventually(probe: Callable[[], T], within_s: float, what: str) -> T:
    """The first truthy value of ``probe``; fails the test, saying ``what`` did not happen, after ``within_s``."""
    deadline = time.monotonic() + within_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {within_s:g} s; last seen: {value!r}")
        time.sleep(_POLL_S)


async def eventually_async(probe: Callable[[], Awaitable[T]], within_s: float, what: str) -> T:
    """As ``eventually``, without holding up the event loop."""
    deadline = time.monotonic() + within_s
    while True:
        value = await probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {within_s:g} s; last seen: {value!r}")
        await asyncio.sleep(_POLL_S)
