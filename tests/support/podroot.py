"""The root that a container sees, and the user that it is: words and shell text for ``tests/support/node.py``. Pure."""

from __future__ import annotations

import io
import shlex
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.support.pods import ContainerPlan, Volume

#: What the machine's /etc says in every pod: the users of our images and of Valkey's.
ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\npenstock:x:10001:10001::/:/bin/sh\nvalkey:x:999:999::/data:/bin/sh\n",
    "group": "root:x:0:\npenstock:x:10001:\nvalkey:x:999:\n",
    "nsswitch.conf": "hosts: files\n",
    "hosts": "",
}
#: A line of sh: its own process id as the machine counts, in ``$pid``.
SAY_PID = "read -r pid _ < /proc/self/stat"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_FOLDERS = ("dev/shm", "proc", "sys", "tmp")


def root_script(
    container: ContainerPlan, root: Path, shown: Sequence[tuple[Path, str]], volumes: Mapping[str, tuple[Path, bool]]
) -> str:
    """Makes the root at ``root`` in the mount namespace that it runs in, and becomes the command in ``$@``.

    ``shown`` are paths of this machine and where the image has them; ``volumes`` are the pod's by name: where they are,
    and whether they are fixed. The process id is written to the file in ``$0``.
    """
    lines = ["set -e", "umask 022", f"mount -t tmpfs -o mode=0755 tmpfs {root}", f"cd {root}"]
    lines += [
        f"mkdir -p {' '.join(_FOLDERS)} .{shlex.quote(container.workdir)}",
        "chmod 1777 tmp",
        *_system_lines(root),
    ]
    binds = [(target, source, True) for source, target in shown]
    for mount in container.mounts:
        place, is_fixed = volumes[mount.volume]
        binds.append((mount.path, place / mount.sub_path, mount.is_read_only or is_fixed))
    # A folder before what is in it: this repository may lie below a path that the pod has a volume at, such as /tmp.
    for target, source, is_read_only in sorted(binds, key=lambda bind: Path(bind[0]).parts):
        lines += _bind(source, root, target, is_read_only=is_read_only)
    if container.is_root_read_only:
        lines += [f"mount -o remount,bind,ro {root}"]
    return "\n".join([*lines, SAY_PID, 'echo "$pid" > "$0"', f'exec chroot {root} "$@"'])


def as_its_user(plan: ContainerPlan, groups: Sequence[int]) -> list[str]:
    """The words before a command that runs as the container does: with its environment and user alone."""
    variables = [f"{name}={value}" for name, value in plan.environment.items()]
    group_option = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    privileges = ["--bounding-set=-all", "--inh-caps=-all"] if plan.uid else []
    privileges += [] if plan.may_gain_privileges else ["--no-new-privs"]
    user = ["setpriv", f"--reuid={plan.uid}", f"--regid={plan.gid}", group_option, *privileges]
    return ["/usr/bin/env", "-i", f"--chdir={plan.workdir}", *variables, *user]


def packed(volume: Volume, gid: int) -> bytes:
    """The volume's first content as a tar, as a kubelet leaves it for pods of this group."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for member, content in _members(volume):
            member.gid = gid
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def _members(volume: Volume) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    yield _folder(".", 0o755 if volume.is_fixed else 0o2777), b""
    for path, content in volume.files.items():
        for parent in list(Path(path).parents)[-2::-1]:
            yield _folder(str(parent), 0o755), b""
        file = tarfile.TarInfo(path)
        file.size, file.mode = len(content), volume.mode
        yield file, content


def _folder(path: str, mode: int) -> tarfile.TarInfo:
    folder = tarfile.TarInfo(path)
    folder.type, folder.mode = tarfile.DIRTYPE, mode
    return folder


def _system_lines(root: Path) -> list[str]:
    """The machine's own programs and libraries, and the devices that a container has."""
    lines = _bind(Path("/usr"), root, "/usr", is_read_only=True)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            lines += [f"ln -s {path.readlink()} {name}"]
        elif path.is_dir():
            lines += _bind(path, root, f"/{name}", is_read_only=True)
    lines += ["mount -t proc proc proc", "mount --rbind /sys sys", "ln -s /proc/self/fd dev/fd"]
    for device in _DEVICES:
        lines += [f"touch dev/{device}", f"mount --bind /dev/{device} dev/{device}"]
    return [*lines, "mount -t tmpfs -o size=64m,mode=1777 tmpfs dev/shm"]


def _bind(source: Path, root: Path, target: str, *, is_read_only: bool) -> list[str]:
    place, path = shlex.quote(f"{root}{target}"), shlex.quote(str(source))
    made = f"if [ -d {path} ]; then mkdir -p {place}; else mkdir -p $(dirname {place}); touch {place}; fi"
    return [made, f"mount --bind {path} {place}", *([f"mount -o remount,bind,ro {place}"] if is_read_only else [])]
