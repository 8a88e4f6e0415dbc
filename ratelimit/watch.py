"""Follows a config file: a changed file is taken up whole, or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from ratelimit.config import Config, ConfigError, load_config
from ratelimit.configcheck import changes_at_restart, live_change_problems
from serving.profile import ProfileError

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.25

_Signature = tuple[int, int, int]


class ConfigWatch:
    """The last good config of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _signature(path)
        self.config = load_config(path)

    def poll(self) -> Config | None:
        """The new config if the file has changed to a good one since the last call, else ``None``.

        A file that is wrong is said once in the log, problem by problem; the last good config stays.
        """
        signature = _signature(self._path)
        if signature == self._seen:
            return None
        self._seen = signature
        try:
            config = load_config(self._path)
        except ConfigError as error:
            for problem in error.problems:
                log.error("config not taken up, the last good one stays: %s", problem)
            return None
        if config == self.config:
            return None
        if problems := live_change_problems(self.config, config):
            for problem in problems:
                log.error("config not taken up, the last good one stays: %s", problem)
            return None
        for change in changes_at_restart(self.config, config):
            log.warning("%s", change)
        self.config = config
        return config


async def follow(watch: ConfigWatch, adopt: Callable[[Config], None]) -> None:
    """Hand every new good config to ``adopt``, until cancelled.

    One whose profiles ``adopt`` can no longer read is not taken up either: a file may change after it was checked.
    """
    while True:
        await asyncio.sleep(POLL_INTERVAL_S)
        before, config = watch.config, watch.poll()
        if config is None:
            continue
        try:
            adopt(config)
        except ProfileError as error:
            log.error("config not taken up, the last good one stays: %s", error)
            watch.config = before


def _signature(path: Path) -> _Signature | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
