"""The shell commands of a Markdown page, word by word, for tests that hold a page to what is there. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

import msgspec

_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"^cat > (\S+) <<('?)EOF'?\n(.*?)^EOF$", re.MULTILINE | re.DOTALL)
#: What ends one command and begins another.
_BETWEEN = {"&&", "||", "|", ";", "&"}
#: What stands before a command without being part of it.
_KEYWORDS = {"until", "while", "do", "done"}


class Page(msgspec.Struct, frozen=True):
    """The commands in order, each a list of words; and the files that its heredocs write, by name."""

    commands: list[list[str]]
    files: dict[str, str]

    def of(self, *begin: str) -> list[list[str]]:
        """The commands that begin so."""
        return [command for command in self.commands if command[: len(begin)] == list(begin)]


def read_page(text: str, variables: Mapping[str, str]) -> Page:
    """Every ```bash block of a page. ``variables`` are those that the reader has set; ``export`` adds to them.

    Raises ``KeyError`` for a variable that nobody has set.
    """
    known = dict(variables)
    commands: list[list[str]] = []
    files: dict[str, str] = {}
    for block in _BLOCK.findall(text):
        known |= dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^export (.*)$", block, re.MULTILINE))))
        for name, quote, body in _HEREDOC.findall(block):
            files[name] = body if quote else filled(body, known)
        for line in re.sub(r"\\\n\s*", " ", _HEREDOC.sub("", block)).splitlines():
            commands += split(filled(line, known))
    return Page(commands, files)


def split(line: str) -> Iterator[list[str]]:
    """The commands of one line, without redirections' targets."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    command: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in _BETWEEN:
            if command:
                yield command
            command = []
        elif not command and word in _KEYWORDS:
            continue
        elif set(word) <= {"<", ">"}:
            rest.pop(0)
        else:
            command.append(word)
    if command:
        yield command


def filled(text: str, variables: Mapping[str, str]) -> str:
    """With the variables' values; `$(…)` stands for some value."""
    text = re.sub(r"\$\([^)]*\)", "output", text)
    return re.sub(r"\$\{?(\w+)\}?", lambda found: variables[found[1]], text)


def options(command: Sequence[str], *names: str) -> list[str]:
    """The values of an option by any of its names, in order, as `--name value` or `--name=value`."""
    values = [command[index + 1] for index, word in enumerate(command[:-1]) if word in names]
    return values + [word.partition("=")[2] for word in command if word.partition("=")[0] in names and "=" in word]
