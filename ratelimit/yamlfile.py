"""A YAML file as plain values, with the line of each, so that a mistake can be pointed at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml

MOST_BYTES = 1 << 20
LARGEST_INT = (1 << 63) - 1

Where = tuple[str | int, ...]


class YamlProblem(NamedTuple):
    """What is wrong in a YAML text, and on which line (from 1)."""

    line: int
    what: str


class YamlFileError(ValueError):
    """A file that cannot be read as one plain YAML document; ``problems`` has every reason found."""

    def __init__(self, problems: list[YamlProblem]) -> None:
        super().__init__("; ".join(f"line {problem.line}: {problem.what}" for problem in problems))
        self.problems = problems


class Document(NamedTuple):
    """The value of the whole file, and the line at which each part of it starts, by path."""

    value: object
    lines: Mapping[Where, int]

    def line(self, path: Where) -> int:
        """The line of a part, or of the nearest part around it that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases: a config of a page has no use for them, and they can grow without bound."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it bare
            raise yaml.composer.ComposerError(None, None, "aliases are not supported; write it out", event.start_mark)
        return super().compose_node(parent, index)


def read_document(path: Path) -> Document:
    """Read and parse a file. Raises ``YamlFileError``."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise YamlFileError([YamlProblem(1, f"cannot be read: {error.strerror}")]) from error
    if len(content) > MOST_BYTES:
        raise YamlFileError([YamlProblem(1, f"is larger than {MOST_BYTES} bytes; a config has a page or two")])
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise YamlFileError([YamlProblem(line, "is not UTF-8 text")]) from error
    return parse_document(text)


def parse_document(text: str) -> Document:
    """Parse one YAML document. Raises ``YamlFileError``."""
    try:
        loader = _PlainLoader(text)
        reading = _Reading(loader)
        node = loader.get_single_node()
        value = None if node is None else reading.value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise YamlFileError([YamlProblem(line, f"is not valid YAML: {error.problem or error.context}")]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlFileError([YamlProblem(line, f"is not valid YAML: {error.reason}")]) from error
    except RecursionError as error:
        raise YamlFileError([YamlProblem(1, "is nested too deeply")]) from error
    if reading.problems:
        raise YamlFileError(reading.problems)
    return Document(value, MappingProxyType(reading.lines))


class _Reading:
    """One walk over the nodes of a document."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self.lines: dict[Where, int] = {}
        self.problems: list[YamlProblem] = []

    def value(self, node: yaml.Node, path: Where) -> object:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, position)) for position, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Where) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(YamlProblem(line, "a name must be plain text, not a list or a mapping"))
                continue
            key = key_node.value
            if key in result:
                first = self.lines[(*path, key)]
                self.problems.append(YamlProblem(line, f"{key!r} is given twice, first on line {first}; keep one"))
                continue
            self.lines[(*path, key)] = line
            result[key] = self.value(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.Node) -> object:
        try:
            value = self._loader.construct_object(node, deep=True)
        except (ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # 2026-13-45 looks like a date to YAML, and is none; a tag such as !!int fails in ways of its own.
            self.problems.append(YamlProblem(node.start_mark.line + 1, f"{node.value!r}: {error}; quote it"))
            return None
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            # Python refuses to print much larger ones, so no message could name them.
            self.problems.append(YamlProblem(node.start_mark.line + 1, f"a number is above {LARGEST_INT}; lower it"))
            return None
        return value
