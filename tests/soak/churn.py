"""Processes that hold a tree or change it: ``python -m tests.soak.churn FUNCTION ROOT …``. Nothing of ocifs is used.

Not here: what should come of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import stat
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGEST = 1 << 20
"""Bytes of the largest file that is held or copied up: it is read again in each round."""


class Found(NamedTuple):
    """What a tree has, by path."""

    files: list[str]
    directories: list[str]
    others: list[str]


def look(root: str) -> Found:
    """List a tree, but for where a container's own file systems are mounted."""
    found = Found([], [], [])
    for folder, directories, names in os.walk(root):
        if folder == root:
            directories[:] = [name for name in directories if name not in {"proc", "dev", "sys"}]
        for name in sorted(directories + names):
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            kind = found.files if stat.S_ISREG(mode) else found.directories if stat.S_ISDIR(mode) else found.others
            kind.append(path)
    return found


def tell(line: str) -> None:
    """Say a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# -- held ----------------------------------------------------------------------------------------------------------


def hold(root: str, count: str) -> None:
    """Open so many files and directories, say so, and at each line of standard input see whether all are as they were."""
    found, order = look(root), random.Random(1)
    small = [path for path in found.files if os.lstat(path).st_size <= LARGEST]
    files = order.sample(small, min(int(count), len(small)))
    directories = order.sample(found.directories, min(int(count), len(found.directories)))
    held = [(path, os.open(path, os.O_RDONLY)) for path in files + directories]
    before = {path: content(fd) for path, fd in held}
    tell(f"{len(files)} files and {len(directories)} directories")
    for _ in sys.stdin:
        tell(next(wrong(held, before), "well"))


def wrong(held: list[tuple[str, int]], before: dict[str, str]) -> Iterator[str]:
    """What is not as it was, through what is held and by name."""
    for path, fd in held:
        try:
            if content(fd) != before[path]:
                yield f"{path} has changed for who holds it"
            again = os.open(path, os.O_RDONLY)
            if content(again) != before[path]:
                yield f"{path} has changed"
            os.close(again)
        except OSError as error:
            yield f"{path}: {error.strerror}"


def content(fd: int) -> str:
    """What is in an open file or directory, in few bytes."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        return hashlib.sha256("\0".join(sorted(os.listdir(fd))).encode(errors="surrogateescape")).hexdigest()
    digest, at = hashlib.sha256(), 0
    while piece := os.pread(fd, 1 << 20, at):
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()


def copy_up(root: str) -> None:
    """At each line of standard input have some files and directories copied up, and leave their contents as they are."""
    found, order = look(root), random.Random(2)
    small = [path for path in found.files if os.lstat(path).st_size <= LARGEST]
    tell("ready")
    for _ in sys.stdin:
        try:
            for path in order.sample(small, min(20, len(small))):
                os.close(os.open(path, os.O_RDWR))
            for path in order.sample(found.directories, min(20, len(found.directories))):
                os.chmod(path, stat.S_IMODE(os.lstat(path).st_mode))
            tell("well")
        except OSError as error:
            tell(f"{error.filename}: {error.strerror}")


# -- changed -------------------------------------------------------------------------------------------------------


def change(root: str, seed: str, count: str) -> None:
    """Do so many things at random to a tree; what cannot be done is left undone. Says how many were done."""
    order, found, done = random.Random(int(seed)), look(root), 0
    for number in range(int(count)):
        with contextlib.suppress(OSError, IndexError):  # there may be no file left to choose
            ACTS[number % len(ACTS)](order, found, number)
            done += 1
        if number % 100 == 99:  # what is gone by now must not be chosen for ever
            found = look(root)
    tell(str(done))


def _new(order: random.Random, found: Found, number: int) -> str:
    return os.path.join(order.choice(found.directories), f"new {number}\xe9")


def write(order: random.Random, found: Found, number: int) -> None:
    path = order.choice([_new(order, found, number), order.choice(found.files)])
    with open(path, "wb") as file:
        file.write(order.randbytes(order.choice([0, 1, 5000, 200_000])))
    found.files.append(path)


def append(order: random.Random, found: Found, _number: int) -> None:
    with open(order.choice(found.files), "ab") as file:
        file.write(b"more")


def make_directory(order: random.Random, found: Found, number: int) -> None:
    path = _new(order, found, number)
    os.mkdir(path)
    found.directories.append(path)


def remove(order: random.Random, found: Found, _number: int) -> None:
    os.unlink(order.choice(found.files + found.others))


def remove_tree(order: random.Random, found: Found, _number: int) -> None:
    path = order.choice(found.directories)
    if sum(len(names) + len(directories) for _, directories, names in os.walk(path)) > 20:  # something must be left
        return
    shutil.rmtree(path)
    if order.random() < 0.5:
        os.mkdir(path)  # an opaque one
        write(order, Found([os.path.join(path, "in it")], [path], []), 0)


def rename(order: random.Random, found: Found, number: int) -> None:
    os.rename(order.choice(found.files + found.others), _new(order, found, number))


def link(order: random.Random, found: Found, number: int) -> None:
    os.link(order.choice(found.files), _new(order, found, number), follow_symlinks=False)


def symlink(order: random.Random, found: Found, number: int) -> None:
    os.symlink(order.choice(["/etc/passwd", "nowhere", "../x"]), _new(order, found, number))


def node(order: random.Random, found: Found, number: int) -> None:
    kind = order.choice([stat.S_IFIFO, stat.S_IFCHR])
    os.mknod(_new(order, found, number), kind | 0o640, os.makedev(1, 5))


def chmod(order: random.Random, found: Found, _number: int) -> None:
    os.chmod(order.choice(found.files + found.directories), order.randrange(0o10000))


def chown(order: random.Random, found: Found, _number: int) -> None:
    os.lchown(order.choice([*found.files, *found.directories, *found.others]), order.randrange(70_000), 7)


def utime(order: random.Random, found: Found, _number: int) -> None:
    path = order.choice([*found.files, *found.directories, *found.others])
    os.utime(path, ns=(0, order.randrange(2 * 10**18)), follow_symlinks=False)


def attribute(order: random.Random, found: Found, _number: int) -> None:
    os.setxattr(order.choice(found.files + found.directories), f"user.{order.choice('ab')}", order.randbytes(9))


ACTS = (
    write,
    append,
    make_directory,
    remove,
    remove_tree,
    rename,
    link,
    symlink,
    node,
    chmod,
    chown,
    utime,
    attribute,
)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
