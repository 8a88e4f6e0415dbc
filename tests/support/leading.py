"""A leader that nobody contests, for tests of what a leader does."""

from __future__ import annotations

from redis.asyncio import Redis

from ratelimit.leadership import Draft, Word


class SoleLeader:
    """Executes what a leader writes in one transaction, with no lease."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def check(self) -> None:
        """It always leads."""

    async def write(self, *commands: tuple[Word, ...]) -> None:
        """All of the commands, or none."""
        async with self._redis.pipeline(transaction=True) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            await pipe.execute()

    async def replace(self, hash_key: str, draft: Draft, *commands: tuple[Word, ...]) -> None:
        """The hash becomes the draft, with all of the commands."""
        change = [("RENAME", draft.key, hash_key), ("PERSIST", hash_key)] if draft.fields else []
        await self.write(("DEL", hash_key), *change, *commands)
