"""A Dockerfile as far as ours goes: its stages, instruction by instruction, with variables filled in. Pure.

Knows only what our file uses, and refuses the rest by name, so that nothing in it goes unchecked. Quoting follows the
shell, as Docker's does for ENV and LABEL.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import msgspec

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
#: Instructions whose text the image's own shell reads, so that Docker fills in nothing.
_FOR_THE_SHELL = frozenset({"RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK"})
_KNOWN = _FOR_THE_SHELL | {"ARG", "COPY", "ENV", "EXPOSE", "FROM", "LABEL", "STOPSIGNAL", "USER", "WORKDIR"}


class DockerfileError(ValueError):
    """An instruction that is not understood here; says which."""


class Step(msgspec.Struct, frozen=True):
    """One instruction of a stage. ``flags`` are its ``--name=value``; ``environment`` is what RUN has around it."""

    instruction: str
    text: str
    user: str
    workdir: str
    environment: dict[str, str]
    flags: dict[str, str] = {}

    @property
    def words(self) -> list[str]:
        """The words after the flags: of JSON where it is written so."""
        if self.text.startswith("["):
            words: list[str] = json.loads(self.text)
            return words
        return shlex.split(self.text)


class Stage(msgspec.Struct, frozen=True):
    """What one FROM begins. ``environment``, ``user`` and ``workdir`` are those that it ends with.

    ``arguments`` are its ARGs, which no later stage and no container sees.
    """

    name: str
    base: str
    steps: tuple[Step, ...]
    user: str
    workdir: str
    environment: dict[str, str]
    arguments: dict[str, str] = {}

    def last(self, instruction: str) -> Step | None:
        """The one that counts, where a later one replaces an earlier one."""
        return next((step for step in reversed(self.steps) if step.instruction == instruction), None)

    def all(self, instruction: str) -> list[Step]:
        """Every such step, in order."""
        return [step for step in self.steps if step.instruction == instruction]


def parse(text: str, base_environment: Mapping[str, str], arguments: Mapping[str, str] | None = None) -> list[Stage]:
    """The stages in order. ``base_environment`` is what the base image sets; ``arguments`` are --build-arg's."""
    given = dict(arguments or {})
    outer: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for instruction, body in _instructions(text):
        if instruction == "FROM":
            stage = _begin(body, outer, stages, base_environment)
        elif not stages:
            outer |= _argument(instruction, body, given)
            continue
        else:
            stage = _extended(list(stages.values())[-1], instruction, body, given)
        stages[stage.name] = stage
    return list(stages.values())


def lineage(stages: list[Stage], target: str) -> list[Stage]:
    """What building the target builds, in the order of the file: its bases and all that it copies from."""
    by_name = {stage.name: stage for stage in stages}
    wanted, found = [target], set()
    while wanted:
        stage = by_name[wanted.pop()]
        found.add(stage.name)
        wanted += [
            name
            for name in (stage.base, *(copy.flags.get("from", "") for copy in stage.all("COPY")))
            if name in by_name
        ]
    return [stage for stage in stages if stage.name in found]


def is_sent(path: PurePosixPath, ignore: str) -> bool:
    """Whether a file of the working tree is sent to the build: the last line of ``.dockerignore`` that matches says."""
    sent = True
    for line in filter(None, map(str.strip, ignore.splitlines())):
        pattern = line.removeprefix("!").strip("/")
        if any(_matches(part, pattern) for part in (path, *path.parents)):
            sent = line.startswith("!")
    return sent


def _matches(path: PurePosixPath, pattern: str) -> bool:
    """``*`` stays within a folder; a leading ``**/`` is any number of them."""
    if pattern.startswith("**/"):
        return fnmatchcase(path.name, pattern.removeprefix("**/"))
    parts, wanted = path.parts, pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction with its text, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for whole in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        instruction, _, body = whole.strip().partition(" ")
        if instruction not in _KNOWN:
            raise DockerfileError(f"unknown here: {whole}")
        yield instruction, body.strip()


def _begin(
    body: str, outer: Mapping[str, str], stages: Mapping[str, Stage], base_environment: Mapping[str, str]
) -> Stage:
    base, _, name = (word.strip() for word in _filled(body, outer).partition(" AS "))
    before = stages.get(base)
    if before is None:
        return Stage(name, base, (), "0", "/", dict(base_environment))
    return Stage(name, base, (), before.user, before.workdir, dict(before.environment))


def _extended(stage: Stage, instruction: str, body: str, given: Mapping[str, str]) -> Stage:
    environment, arguments = dict(stage.environment), dict(stage.arguments)
    user, workdir = stage.user, stage.workdir
    text = body if instruction in _FOR_THE_SHELL else _filled(body, arguments | environment)
    flags: dict[str, str] = {}
    while instruction != "RUN" and text.startswith("--"):
        flag, _, text = text.partition(" ")
        name, _, value = flag.removeprefix("--").partition("=")
        flags[name], text = value, text.strip()
    if instruction == "ARG":
        arguments |= _argument(instruction, body, given)
    elif instruction == "ENV":
        environment |= dict(word.split("=", 1) for word in shlex.split(text))
    elif instruction == "USER":
        user = text
    elif instruction == "WORKDIR":
        workdir = str(PurePosixPath(workdir) / text)
    step = Step(instruction, text, user, workdir, arguments | environment, flags)
    return Stage(stage.name, stage.base, (*stage.steps, step), user, workdir, environment, arguments)


def _argument(instruction: str, body: str, given: Mapping[str, str]) -> dict[str, str]:
    if instruction != "ARG":
        raise DockerfileError(f"before the first FROM: {instruction} {body}")
    name, _, default = body.partition("=")
    return {name: given.get(name, default)}


def _filled(text: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in variables:
            raise DockerfileError(f"no value for ${name} in: {text}")
        return variables[name]

    return _VARIABLE.sub(value, text)
