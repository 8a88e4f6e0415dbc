"""Whether the current task is to end: a cancellation that meets Redis traffic may be swallowed there.

It is kept in the task's count all the same, so loops that talk to Redis ask for it instead of going on for ever.
"""

from __future__ import annotations

import asyncio


def is_cancelled() -> bool:
    """Whether the task that asks was cancelled, also where the exception was lost."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
