"""Mounts an EROFS image in a mount namespace of its own and reports what another process sees there.

``look(source, devices, directory)`` starts this module as a program below unshare(1). Whatever happens to it, its mount
ends with it. Not here: what should be seen.
"""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from ocifs import kernel
from ocifs.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SECONDS = 120
READ_LIMIT = 1 << 20


class Seen(NamedTuple):
    """One path of a mounted tree, as system calls tell it; ``data`` is an error number if reading fails."""

    mode: int
    ino: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: tuple[int, int]
    names: tuple[bytes, ...] | None
    target: bytes | None
    data: bytes | int | None
    holes: tuple[tuple[int, int], ...] | None
    """(start, end) of each stretch that SEEK_DATA finds."""
    xattrs: dict[bytes, bytes | int]


def why_not() -> str:
    """Why this machine cannot mount EROFS from files; empty if it can."""
    if os.geteuid():
        return "mounting needs root"
    with open("/proc/filesystems", encoding="ascii") as listed:
        if "\terofs\n" not in listed.read():
            return "this kernel has no EROFS"
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 12):
        return "file-backed EROFS needs Linux 6.12"
    return ""


def look(source: Path, devices: Sequence[Path], target: Path) -> dict[bytes, Seen] | str:
    """Mount, look at everything from another process, unmount. A string is the message of a refused mount."""
    target.mkdir(exist_ok=True)
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", __name__]
    arguments = [str(source), str(target), *map(str, devices)]
    done = subprocess.run([*command, *arguments], capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    found: dict[bytes, tuple[Any, ...]] | str = pickle.loads(done.stdout)  # noqa: S301 — from our own process
    return found if isinstance(found, str) else {path: Seen(*values) for path, values in found.items()}


def seen(path: bytes) -> Seen:
    stat = os.lstat(path)
    names = target = data = holes = None
    if stat.st_mode >> 12 == 0o04:
        names = tuple(os.listdir(path))
    elif stat.st_mode >> 12 == 0o12:
        target = os.readlink(path)
    elif stat.st_mode >> 12 == 0o10:
        data, holes = content(path, stat.st_size)
    xattrs: dict[bytes, bytes | int] = {}
    for name in os.listxattr(path, follow_symlinks=False):
        try:
            xattrs[os.fsencode(name)] = os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            xattrs[os.fsencode(name)] = error.errno or 0
    return Seen(
        stat.st_mode,
        stat.st_ino,
        stat.st_nlink,
        stat.st_uid,
        stat.st_gid,
        stat.st_size,
        stat.st_mtime_ns,
        (os.major(stat.st_rdev), os.minor(stat.st_rdev)),
        names,
        target,
        data,
        holes,
        xattrs,
    )


def content(path: bytes, size: int) -> tuple[bytes | int, tuple[tuple[int, int], ...]]:
    descriptor = os.open(path, os.O_RDONLY)
    holes: list[tuple[int, int]] = []
    try:
        at = 0
        while at < size:
            try:
                start = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                break
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            holes.append((start, at))
        os.lseek(descriptor, 0, os.SEEK_SET)
        data = b"".join(iter(lambda: os.read(descriptor, READ_LIMIT), b"")) if size <= READ_LIMIT else b""
    except OSError as error:
        return error.errno or 0, ()
    else:
        return data, tuple(holes)
    finally:
        os.close(descriptor)


def look_here(root: bytes) -> dict[bytes, Seen]:
    """Everything below a directory, by path from there, not recursive."""
    found: dict[bytes, Seen] = {}
    os.chdir(root)  # so that long paths stay short enough for system calls
    todo = [b""]
    while todo:
        path = todo.pop()
        here = found[path] = seen(b"." + path)
        todo.extend(path + b"/" + name for name in here.names or ())
    return found


def main() -> None:
    if sys.argv[1] == "--look":
        # As plain tuples: in this process the class is one of __main__.
        found = {path: tuple(values) for path, values in look_here(os.fsencode(sys.argv[2])).items()}
        sys.stdout.buffer.write(pickle.dumps(found))
        return
    source, target, *devices = map(os.fsencode, sys.argv[1:])
    try:
        kernel.mount_erofs(source, devices, target)
    except MachineError as error:
        sys.stdout.buffer.write(pickle.dumps(str(error)))
        return
    try:
        subprocess.run(
            [sys.executable, "-m", __spec__.name, "--look", os.fsdecode(target)], check=True, timeout=SECONDS
        )
    finally:
        kernel.unmount(target)


if __name__ == "__main__":
    main()
