"""Cells that left the config, and the controller that saw them: reaped and drained on until they are empty."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from ratelimit.knowncells import KEPT_S, KnownCells, cells_file
from ratelimit.meter import Charge
from ratelimit.reaper import Reaper
from ratelimit.statefile import StateFileError
from ratelimit.store import Store
from ratelimit.usagedrain import UsageDrain
from ratelimit.usagefiles import UsageFiles
from tests.support.usage import settle

SLOT = Charge("k:1:concurrency", cost=1, capacity=10, rate=0)


def kept(state_dir: Path) -> list[str]:
    """The names in the file."""
    return [cell.name for cell in cells_file(state_dir).read()]


async def test_a_cell_that_left_before_a_restart_is_reaped_and_drained(redis_client: Redis, tmp_path: Path) -> None:
    """The next controller, whose config never named it, ends its reservations and writes its records."""
    await KnownCells(redis_client, lambda: ["llama", "old"], tmp_path).round()
    old = Store(redis_client, "old", timeout_s=5)
    await settle(redis_client, "a", cell="old")
    await old.admit("dead", [SLOT], epoch=1, lease_ms=1)

    cells = KnownCells(redis_client, lambda: ["llama"], tmp_path)
    await cells.round()
    assert cells.names() == ["llama", "old"]
    for _ in range(100):
        await Reaper(redis_client, cells.names).round()
        if not (await old.peek([SLOT]))[0].used:
            break
    assert (await old.peek([SLOT]))[0].used == 0
    await UsageDrain(redis_client, cells.names, tmp_path).round()
    assert "a" in [line.id for line in UsageFiles(tmp_path).lines(0, 1 << 45)]


async def test_it_is_forgotten_when_it_is_empty_and_not_before(redis_client: Redis, tmp_path: Path) -> None:
    """Neither while gateways may not know that it left, nor while it holds a record or a reservation."""
    now_s, models = 0.0, ["llama", "old"]
    cells = KnownCells(redis_client, lambda: models, tmp_path, lambda: now_s)
    await cells.round()
    models.remove("old")
    await cells.round()
    assert kept(tmp_path) == ["llama", "old"]
    await settle(redis_client, "a", cell="old")
    now_s = KEPT_S
    await cells.round()
    assert kept(tmp_path) == ["llama", "old"]
    await redis_client.flushall()
    await Store(redis_client, "old", timeout_s=5).admit("open", [SLOT], epoch=1, lease_ms=600_000)
    await cells.round()
    assert kept(tmp_path) == ["llama", "old"]
    await redis_client.flushall()
    await cells.round()
    assert (kept(tmp_path), cells.names()) == (["llama"], ["llama"])


async def test_a_name_that_no_cell_can_have_is_damage(redis_client: Redis, tmp_path: Path) -> None:
    """It is told, and reaches no store; the models of the config are served on."""
    (tmp_path / "cells.json").write_text('{"schema_version": 1, "records": [{"name": "a}b"}]}')
    cells = KnownCells(redis_client, lambda: ["llama"], tmp_path)
    with pytest.raises(StateFileError, match="damaged"):
        await cells.round()
    assert cells.names() == ["llama"]
