"""Runs a Dockerfile's own steps without a container engine: each in a fresh root of its own, by unshare and chroot.

The base image cannot be had without an engine, so one of its kind is made: the files of the Debian packages that every
Debian has (priority required), and this interpreter with pip and nothing else in /usr/local. There is no compiler in
it, no header and no network: packages come from a folder that was filled from the same lock files before. What a step
needs beyond that, it does not find.

Needs Linux, a Debian or Ubuntu, and root, or user namespaces with subordinate ids (``newuidmap``).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath

from tests.support.dockerfile import Stage, Step, is_sent, lineage

WHEELS = "/wheels"
#: The base image's, see https://github.com/docker-library/python.
BASE_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
#: pip finds the folder and no index.
_PIP_ENVIRONMENT = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": WHEELS, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
_LEFT_OUT_OF_PYTHON = shutil.ignore_patterns("site-packages", "test", "__pycache__", "config-*", "idlelib", "tkinter")
_STEP_TIMEOUT_S = 300.0


class StepError(AssertionError):
    """A step of the Dockerfile that failed here; says which, and what it said."""


@cache
def unshare_options() -> tuple[str, ...] | None:
    """How mounts and roots of our own can be had; None where they cannot."""
    forms = ([()] if os.geteuid() == 0 else []) + [("--user", "--map-root-user", "--map-auto")]
    for form in forms:
        trial = ["unshare", *form, "--mount", "--pid", "--fork", "chroot", "/", "chown", "--help"]
        if (
            shutil.which("unshare")
            and subprocess.run(trial, capture_output=True, check=False, timeout=30).returncode == 0
        ):
            return form
    return None


def fetch_wheels(locks: Sequence[Path], folder: Path) -> None:
    """Download what the lock files name, wheels alone and by their hashes, with pip as it is configured here."""
    for lock in locks:
        options = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--quiet"]
        _output(sys.executable, "-m", "pip", "download", *options, "--requirement", lock, "--dest", folder)


class CleanBuild:
    """The trees of one target's stages, built under ``folder`` on ``base`` from the working tree at ``repository``."""

    def __init__(self, repository: Path, folder: Path, base: Path, wheels: Path) -> None:
        self._repository = repository
        self._folder = folder
        self._base = base
        self._wheels = wheels
        self._trees: dict[str, Path] = {}
        self._ignore = (repository / ".dockerignore").read_text()

    def build(self, stages: list[Stage], target: str) -> Path:
        """Run the steps that make the target, but for stages that are built already; its tree. Raises ``StepError``."""
        for stage in lineage(stages, target):
            if stage.name not in self._trees:
                self._build(stage)
        return self._trees[target]

    def _build(self, stage: Stage) -> None:
        tree = self._folder / f"stage-{stage.name}"
        _output("cp", "--archive", "--reflink=auto", self._trees.get(stage.base, self._base), tree)
        for step in stage.steps:
            self._take(step, tree)
        self._trees[stage.name] = tree

    def _take(self, step: Step, tree: Path) -> None:
        if step.instruction == "WORKDIR":
            (tree / step.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.instruction == "COPY":
            self._copy(step, tree)
        elif step.instruction == "RUN":
            self._run(step, tree)

    def _copy(self, step: Step, tree: Path) -> None:
        *sources, last = step.words
        destination = tree / str(PurePosixPath(step.workdir) / last).lstrip("/")
        stage = self._trees.get(step.flags.get("from", ""))
        for source in sources:
            if stage is None and not is_sent(PurePosixPath(source), self._ignore):
                raise StepError(f"COPY {step.text}: {source} is kept back by .dockerignore")
            path = (stage or self._repository) / source.lstrip("/")
            into = destination / path.name if last.endswith("/") and not path.is_dir() else destination
            into.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                shutil.copy2(path, into)
            elif stage:
                _output("cp", "--archive", path, into)
            else:
                shutil.copytree(path, into, ignore=self._kept_back)

    def _kept_back(self, folder: str, names: list[str]) -> list[str]:
        relative = PurePosixPath(folder).relative_to(self._repository)
        return [name for name in names if not is_sent(relative / name, self._ignore)]

    def _run(self, step: Step, tree: Path) -> None:
        environment = step.environment | _PIP_ENVIRONMENT
        inner = ["/bin/sh", "-c", step.text]
        command = entered(tree, inner, environment, step.workdir, {self._wheels: WHEELS}, network=False)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_STEP_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            raise StepError(f"status {done.returncode}: RUN {step.text}\n{done.stdout}{done.stderr}")


def entered(
    tree: Path,
    inner: Sequence[str],
    environment: dict[str, str],
    workdir: str,
    mounts: dict[Path, str],
    *,
    network: bool,
    user: str = "0",
    writable: Sequence[str] | None = None,
) -> list[str]:
    """The command that runs ``inner`` with ``tree`` as its root, as the first process of its own.

    ``mounts`` are shown inside, read-only. ``writable`` None leaves the tree writable; else it is read-only but for
    these folders, which are empty and the user's. The user has no privileges and can get none.
    """
    options = unshare_options()
    if options is None:
        raise StepError("no root and no user namespaces here; see the module's first lines")
    root = shlex.quote(str(tree))
    script = ["set -e", f"mount --bind {root} {root}"]
    for source, target in mounts.items():
        script += [f"mkdir -p {root}{target}", f"mount --bind {shlex.quote(str(source))} {root}{target}"]
        script += [f"mount -o remount,bind,ro {root}{target}"]
    for folder in writable or ():
        script += [f"mkdir -p {root}{folder}"]
    if writable is not None:
        script += [f"mount -o remount,bind,ro {root}"]
    uid, _, gid = user.partition(":")
    for folder in writable or ():
        script += [f"mount -t tmpfs -o mode=0700,uid={uid},gid={gid or uid} tmpfs {root}{folder}"]
    script += [f"mount -t proc proc {root}/proc"]
    script += [f"mount --bind /dev/{device} {root}/dev/{device}" for device in _DEVICES]
    script += ['exec chroot "$0" "$@"']
    setpriv = ["setpriv", f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups", "--no-new-privs"]
    privileges = [*setpriv, "--bounding-set=-all", "--inh-caps=-all"] if uid != "0" else []
    variables = [f"{name}={value}" for name, value in environment.items()]
    chrooted = ["/usr/bin/env", "-i", f"--chdir={workdir}", *variables, *privileges, *inner]
    space = ["unshare", *options, "--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
    return [*space, "sh", "-c", "\n".join(script), str(tree), *chrooted]


_DEVICES = ("null", "zero", "random", "urandom")
_PACKAGE_ROW = "${Package} ${Priority} ${Essential}\\n"
#: By the required packages, and by apt, which every image of Debian has.
_DEPENDED_UPON = ("libc6", "libgcc-s1", "libstdc++6")
_LEFT_OUT_OF_DEBIAN = ("/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/")
#: Diverted, so listed under other names.
_SHELL = (Path("/bin/sh"), Path("/usr/bin/sh"))


def make_base(tree: Path) -> None:
    """A root like the base image's: Debian's required packages, and this interpreter with a fresh pip."""
    for folder in ("dev", "etc", "proc", "tmp", "usr/local/bin", "usr/local/lib", "var/lib"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    (tree / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if Path("/", name).is_symlink():  # to its like in /usr
            (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
            (tree / name).symlink_to(Path("/", name).readlink())
    for device in _DEVICES:
        (tree / "dev" / device).touch()
    _copy_files(_required_files(), tree)
    _copy_python(tree)
    for kind in ("passwd", "group"):
        shutil.copy2(f"/usr/share/base-passwd/{kind}.master", tree / "etc" / kind)
    setup = "ldconfig && pwconv && python3 -m ensurepip && ln -s pip3 /usr/local/bin/pip"
    command = entered(tree, ["/bin/sh", "-c", setup], dict(BASE_ENVIRONMENT), "/", {}, network=False)
    done = subprocess.run(command, capture_output=True, text=True, timeout=_STEP_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise StepError(f"the stand-in for the base image cannot be made: {done.stdout}{done.stderr}")


def _required_files() -> list[Path]:
    rows = map(str.split, _output("dpkg-query", "--show", "--showformat", _PACKAGE_ROW).splitlines())
    packages = [name for name, *marks in rows if {"required", "yes"} & set(marks)]
    listed = _output("dpkg-query", "--listfiles", *packages, *_DEPENDED_UPON).splitlines()
    files = {Path(line) for line in listed if line.startswith("/") and not line.startswith(_LEFT_OUT_OF_DEBIAN)}
    programs = [path for path in files if path.parent.name in ("bin", "sbin") and path.is_file()]
    return sorted({*files, *(path for path in _SHELL if path.exists()), *_linked(programs)})


def _linked(programs: Sequence[Path]) -> set[Path]:
    """The shared libraries that these programs load, by the names that they are asked for."""
    words = _output("ldd", *programs, may_fail=True).split()  # it does where one is a script
    return {Path(word) for word in words if word.startswith("/") and not word.endswith(":")}


def _output(*command: str | Path, may_fail: bool = False) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=_STEP_TIMEOUT_S, check=False)
    if done.returncode != 0 and not may_fail:
        raise StepError(f"status {done.returncode}: {' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def _copy_files(files: Sequence[Path], tree: Path) -> None:
    for path in files:
        target = tree / str(path).lstrip("/")
        if path.is_dir() and not path.is_symlink():
            target.mkdir(parents=True, exist_ok=True)
        elif os.access(path, os.R_OK) and not target.is_symlink() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=not path.is_symlink())
            if path.is_symlink() and not (tree / os.path.realpath(path).lstrip("/")).exists():
                _copy_files([Path(os.path.realpath(path))], tree)


def _copy_python(tree: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    executable = Path(sys.base_prefix, "bin", version)
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    local = tree / "usr/local"
    shutil.copytree(library, local / "lib" / version, ignore=_LEFT_OUT_OF_PYTHON, symlinks=True)
    shutil.copy2(executable, local / "bin" / version)
    for name in ("python", "python3"):
        (local / "bin" / name).symlink_to(version)
    linked = _linked([executable, *(library / "lib-dynload").glob("*.so")])
    own = {path for path in linked if path.is_relative_to(sys.base_prefix)}
    for path in own:
        shutil.copy2(path, local / "lib" / path.name)
    _copy_files(sorted(linked - own), tree)
