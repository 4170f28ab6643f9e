"""A kernel overlay that is changed and looked at from a process of its own, in a mount namespace of its own.

`Overlays` starts this module as a program below unshare(1). It is told over a pipe what to mount, what to do there and when
to tell what it sees; whatever happens to it, its mounts end with it. The process that runs the tests touches no mount.

Not here: what should be seen.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self

from tests.support.mounted import Seen, look_here

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SECONDS = 60
"""Seconds after which it is taken to hang."""


class Act(NamedTuple):
    """Something done below the mount: the name of a function here, and its arguments."""

    function: str
    arguments: tuple[Any, ...]


class Overlays:
    """The process, ready to mount. Use as a context manager."""

    def __init__(self) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        """Nothing to do: it runs."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End it, and its mounts."""
        self._process.kill()
        self._process.communicate()

    def changed(self, lower: Path, place: Path, acts: Sequence[Act] = (), *, options: str = "") -> dict[bytes, Seen]:
        """Mount an overlay of ``place``/upper above ``lower``, do ``acts``, and tell what is there. What an act cannot do
        it leaves undone. The upper directory is made like the lower's root if it is not there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((os.fsencode(lower), os.fsencode(place), list(map(tuple, acts)), options), self._process.stdin)
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        if not ready:
            self._process.kill()
            raise AssertionError("the process that changes an overlay hangs")
        found = pickle.load(self._process.stdout)  # noqa: S301 (from our own process)
        assert isinstance(found, dict), found
        return {path: Seen(*values) for path, values in found.items()}


# -- in that process: acts -----------------------------------------------------------------------------------------


def write(path: bytes, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def append(path: bytes, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def touch(path: bytes) -> None:
    """Open for writing and leave as it is: copied up, and nothing changed."""
    os.close(os.open(path, os.O_RDWR))


def sparse(path: bytes, size: int, at: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(at)
        file.write(b"data in the middle of nothing")


def rmtree(path: bytes) -> None:
    shutil.rmtree(path)


def replace_tree(path: bytes) -> None:
    """Remove a directory and make a new one of its name: an opaque one."""
    shutil.rmtree(path)
    os.mkdir(path)


def node(path: bytes, mode: int, device: int) -> None:
    os.mknod(path, mode, device)


def utime(path: bytes, time_ns: int) -> None:
    os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


def chown(path: bytes, uid: int, gid: int) -> None:
    os.lchown(path, uid, gid)


def setxattr(path: bytes, name: bytes, value: bytes) -> None:
    os.setxattr(path, name, value, follow_symlinks=False)


def listen(path: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)


ACTS: dict[str, Callable[..., object]] = {
    "write": write,
    "append": append,
    "touch": touch,
    "sparse": sparse,
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
    "rmtree": rmtree,
    "replace_tree": replace_tree,
    "unlink": os.unlink,
    "rename": os.rename,
    "link": os.link,
    "symlink": os.symlink,
    "node": node,
    "chmod": os.chmod,
    "chown": chown,
    "utime": utime,
    "setxattr": setxattr,
    "listen": listen,
}


# -- in that process: the rest -------------------------------------------------------------------------------------


def serve(asked: BinaryIO, told: BinaryIO) -> None:
    while True:
        try:
            lower, place, acts, options = pickle.load(asked)  # noqa: S301 (from our own process)
        except EOFError:
            return
        try:
            answer: Any = one(lower, place, acts, options)
        except Exception as error:  # noqa: BLE001 (the other side shows it)
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, told)
        told.flush()


def one(lower: bytes, place: bytes, acts: list[tuple[str, tuple[Any, ...]]], options: str) -> dict[bytes, Any]:
    upper, work, merged = (os.path.join(place, name) for name in (b"upper", b"work", b"merged"))
    if not os.path.isdir(upper):
        os.mkdir(upper)
        status = os.stat(lower)
        os.chown(upper, status.st_uid, status.st_gid)
        os.chmod(upper, status.st_mode & 0o7777)
        os.utime(upper, ns=(status.st_mtime_ns, status.st_mtime_ns))
    for directory in (work, merged):
        os.makedirs(directory, exist_ok=True)
    said = b"lowerdir=%s,upperdir=%s,workdir=%s" % (lower, upper, work) + (f",{options}" if options else "").encode()
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", said, merged], check=True)
    try:
        for function, arguments in acts:
            with contextlib.suppress(OSError):
                os.chdir(merged)
                ACTS[function](*arguments)
        # As plain tuples: in this process the class is another module's.
        return {path: tuple(values) for path, values in look_here(merged).items()}
    finally:
        os.chdir("/")
        subprocess.run(["umount", merged], check=True)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
