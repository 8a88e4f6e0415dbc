"""Readings of limits that are reused: how often the store is asked, and how long what it said is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from ratelimit.gateway import readings
from ratelimit.gateway.readings import FRESH_S, RecentReadings
from ratelimit.meter import Reading
from ratelimit.store import StoreUnavailableError


class Source:
    """A store that counts what it is asked, and the time it is asked at."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked = 0
        self.answers = asyncio.Event()
        self.fails = False

    async def read(self) -> Sequence[Reading]:
        """The next reading."""
        self.asked += 1
        await self.answers.wait()
        if self.fails:
            raise StoreUnavailableError("away")
        return (Reading("b", 0, self.asked, 0),)


async def test_the_store_is_asked_once_in_a_while() -> None:
    """Many calls at once and within the time share one reading; a later one, and another caller's, is new."""
    source = Source()
    recent = RecentReadings(lambda: source.now)
    together = [asyncio.create_task(recent.of("a", source.read)) for _ in range(50)]
    await asyncio.sleep(0)
    source.answers.set()
    assert {told[0].remaining for told in await asyncio.gather(*together)} == {1}
    source.now += FRESH_S / 2
    assert (await recent.of("a", source.read))[0].remaining == 1
    assert (await recent.of("b", source.read))[0].remaining == 2
    source.now += 2 * FRESH_S
    assert (await recent.of("a", source.read))[0].remaining == 3


async def test_a_failure_is_told_to_all_and_forgotten() -> None:
    """A store that is away is not asked more often, and one that is back is asked again."""
    source = Source()
    source.fails = True
    source.answers.set()
    recent = RecentReadings(lambda: source.now)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await recent.of("a", source.read)
    assert source.asked == 1
    source.now += 2 * FRESH_S
    source.fails = False
    assert (await recent.of("a", source.read))[0].remaining == 2


async def test_who_leaves_does_not_end_it_for_others() -> None:
    """The first caller may leave while the store is asked."""
    source = Source()
    recent = RecentReadings(lambda: source.now)
    first = asyncio.create_task(recent.of("a", source.read))
    second = asyncio.create_task(recent.of("a", source.read))
    await asyncio.sleep(0)
    first.cancel()
    source.answers.set()
    assert (await second)[0].remaining == 1


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest reading goes first."""
    monkeypatch.setattr(readings, "MAX_KEPT", 3)
    source = Source()
    source.answers.set()
    recent = RecentReadings(lambda: source.now)
    for name in "abcd":
        await recent.of(name, source.read)
    assert list(recent._kept) == ["b", "c", "d"]
