from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ratelimit import watch
from ratelimit.config import Config
from ratelimit.watch import ConfigWatch, follow
from serving.profile import ProfileError

CONFIG = """
pools:
  - model: m
    raise_after_s: {raise_after_s}
    engines: [{{device: virtual, profile: h100-llama-3.1-8b, port: 8100}}]
tiers: [{{name: pro, share: 0.5}}]
orgs: [{{name: acme}}]
"""


async def test_a_config_whose_profile_vanishes_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good config stays, and the next good one is taken up."""
    monkeypatch.setattr(watch, "POLL_INTERVAL_S", 0.01)
    path = tmp_path / "penstock.yaml"
    path.write_text(CONFIG.format(raise_after_s=1))
    watching, adopted, refused = ConfigWatch(path), asyncio.Event(), asyncio.Event()

    def adopt(config: Config) -> None:
        if config.pools[0].raise_after_s == 22:
            refused.set()
            raise ProfileError("cannot read profile x.json: No such file or directory")
        adopted.set()

    following = asyncio.create_task(follow(watching, adopt))
    try:
        path.write_text(CONFIG.format(raise_after_s=22))
        await asyncio.wait_for(refused.wait(), 10)
        assert watching.config.pools[0].raise_after_s == 1

        path.write_text(CONFIG.format(raise_after_s=333))
        await asyncio.wait_for(adopted.wait(), 10)
    finally:
        following.cancel()


def test_a_config_that_moves_the_state_is_not_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Keys made in a new state folder would never work while the controller reads the old one, so nothing changes."""
    path = tmp_path / "penstock.yaml"
    path.write_text(CONFIG.format(raise_after_s=1))
    watching = ConfigWatch(path)

    path.write_text("state_dir: elsewhere\n" + CONFIG.format(raise_after_s=2))

    assert watching.poll() is None
    assert watching.config.pools[0].raise_after_s == 1
    assert "state_dir" in caplog.text
