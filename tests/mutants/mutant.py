"""What a mutant is."""

from __future__ import annotations

import msgspec


class Mutant(msgspec.Struct, frozen=True):
    """One rule broken once: the one ``old`` in ``file`` becomes ``new``, and ``test`` must fail."""

    rule: str
    file: str
    old: str
    new: str
    test: str

    def broken(self, text: str) -> str:
        """The file's text with the rule broken. Raises ValueError where ``old`` is not in it exactly once."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.file}: found {found} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)
