"""What is decided, on disk: ``decided.json`` has the config, ``decided_keys.json`` the overrides and the keys.

They are two because the config grows with the fleet and changes seldom. Each is weighed as a change of its own, so that
after a death between the two writes at worst a change is weighed again.
"""

from __future__ import annotations

from pathlib import Path

from ratelimit.decided import Decided, KeptConfig, KeptKeys, kept_keys, resumed
from ratelimit.statefile import StateFile


class DecidedFiles:
    """Reads what was decided once, then keeps what is. Methods may raise ``StateFileError``."""

    def __init__(self, state_dir: Path) -> None:
        self._config_file = StateFile(state_dir / "decided.json", KeptConfig)
        self._keys_file = StateFile(state_dir / "decided_keys.json", KeptKeys)
        self._config: list[KeptConfig] = []
        self._keys: list[KeptKeys] = []

    def read(self) -> Decided | None:
        """What was kept; None where there is nothing."""
        self._config, self._keys = self._config_file.read(), self._keys_file.read()
        keys = self._keys[0] if self._keys else KeptKeys((), {}, ())
        return resumed(self._config[0].adopted, keys) if self._config else None

    def write(self, decided: Decided | None) -> None:
        """Keep it, or nothing: each file only where it differs, the keys first, for they say nothing alone."""
        keys = [kept_keys(decided)] if decided else []
        if keys != self._keys:
            with self._keys_file.changing() as records:
                records[:] = keys
            self._keys = keys
        config = [KeptConfig(decided.adopted)] if decided else []
        if config != self._config:
            with self._config_file.changing() as configs:
                configs[:] = config
            self._config = config
