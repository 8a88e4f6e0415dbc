"""One mistake of a config, and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ratelimit.yamlfile import Document, Where


class Finding(NamedTuple):
    """One mistake: where it is in the config, and what is wrong and would be right."""

    where: Where
    what: str

    def text(self, path: Path, document: Document) -> str:
        """``FILE:LINE: where: what``."""
        return f"{path}:{document.line(self.where)}: {dotted(self.where) or 'the file'}: {self.what}"


def dotted(where: Where) -> str:
    """``pools[0].engines[1].profile``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".")
