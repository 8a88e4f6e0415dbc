"""Fields of a decoded document, taken out with a clear word about each that is missing or makes no sense. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from serving.importers.results import RunRefusedError

#: No benchmark counts further; what does is no count.
MOST_COUNT = 10**15
#: Names and commands are cut here.
MOST_TEXT = 500

_MENDING = "run the benchmark again, and import the file as the tool wrote it"


class Fields:
    """One object of a document. ``name`` is where it stands, for the messages; empty at the top.

    Every getter raises ``RunRefusedError`` for what is of the wrong type, not finite, or negative.
    """

    def __init__(self, values: Mapping[str, object], name: str = "") -> None:
        self._values = values
        self._name = name

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def keys(self) -> Sequence[str]:
        """Names of what is there."""
        return [str(key) for key in self._values]

    def optional(self, key: str) -> float | None:
        """A number that is zero or above; None where it is absent or null."""
        value = self._values.get(key)
        return None if value is None else _number(value, self._path(key))

    def number(self, key: str) -> float:
        """A number that is zero or above."""
        value = self.optional(key)
        if value is None:
            raise RunRefusedError(f"{self._path(key)} is missing; {_MENDING}")
        return value

    def positive(self, key: str) -> float:
        """A number above zero."""
        value = self.number(key)
        if value == 0:
            raise RunRefusedError(f"{self._path(key)} is 0, it must be above it; {_MENDING}")
        return value

    def count(self, key: str) -> int:
        """A whole number that is zero or above; a float that is one, too."""
        return self._whole(key, self.number(key))

    def optional_count(self, key: str) -> int:
        """The same, and 0 where it is absent or null."""
        value = self.optional(key)
        return 0 if value is None else self._whole(key, value)

    def is_true(self, key: str) -> bool:
        """Whether a flag is there and set."""
        return self._values.get(key) is True

    def text(self, key: str) -> str:
        """Text without control characters, cut at a bound; empty where it is absent, null or no text."""
        value = self._values.get(key)
        return plain_text(value) if isinstance(value, str) else ""

    def child(self, key: str) -> Fields:
        """The object under a key."""
        return _object(self._values.get(key), self._path(key))

    def list(self, key: str) -> Sequence[object]:
        """The list under a key."""
        value = self._values.get(key)
        if not isinstance(value, list):
            raise RunRefusedError(f"{self._path(key)} is {'missing' if value is None else 'no list'}; {_MENDING}")
        return value

    def children(self, key: str) -> Sequence[Fields]:
        """The objects in the list under a key."""
        return [_object(item, f"{self._path(key)}[{number}]") for number, item in enumerate(self.list(key))]

    def numbers(self, key: str) -> Sequence[float]:
        """The list of numbers under a key."""
        return numbers_of(self.list(key), self._path(key))

    def _whole(self, key: str, value: float) -> int:
        if value != int(value) or value > MOST_COUNT:
            raise RunRefusedError(f"{self._path(key)} is {value:g}, it must be a whole number; {_MENDING}")
        return int(value)

    def _path(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key


def numbers_of(items: object, path: str) -> Sequence[float]:
    """The numbers of a list. Raises ``RunRefusedError`` where it is none."""
    if not isinstance(items, list):
        raise RunRefusedError(f"{path} is no list; {_MENDING}")
    return [_number(item, f"{path}[{number}]") for number, item in enumerate(items)]


def plain_text(text: str) -> str:
    """The text's printable characters, cut at a bound."""
    return "".join(character for character in text[:MOST_TEXT] if character.isprintable())


def _object(value: object, path: str) -> Fields:
    if not isinstance(value, Mapping):
        raise RunRefusedError(f"{path} is {'missing' if value is None else 'no object'}; {_MENDING}")
    return Fields(value, path)


def _number(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RunRefusedError(f"{path} is {plain_text(repr(value))[:40]}, it must be a number; {_MENDING}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise RunRefusedError(f"{path} is {number}: the tool could not compute it; {_MENDING}")
    if number < 0:
        raise RunRefusedError(f"{path} is {number:g}, it must not be negative; {_MENDING}")
    return number
