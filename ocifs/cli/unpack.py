"""Writes files, links and directory trees of an image to disk, so that nothing in the image can reach beyond them.

How it is safe
    Everything is made in a new directory beside the destination, mode 0700, so nobody else can put anything in the way,
    and every name is used relative to an open directory, created exclusively, and checked to be one name. When all is
    there it is renamed to where it belongs: the copy appears as a whole or not at all. A process that is killed leaves a
    directory ``.ocifs-cp-…`` behind and nothing else.

How deep trees are walked
    A hostile image can nest directories deeper than the system has descriptors or the interpreter has frames, so
    there is one descriptor, for the directory being filled: on the way up ``..`` is opened, and it must be the directory
    that was come from.

What is kept: modes, times to the nanosecond, hard links, holes, extended attributes as far as the file system takes
them; with privileges also owners, setuid, setgid and devices. Without privileges setuid and setgid bits are dropped: on
a file that belongs to whoever copies they would mean something else.

Not here: where to (`copying`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from ocifs.cli.output import decode
from ocifs.errors import BusyError, DamagedError, MachineError, UsageError
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.erofs import Inode
    from ocifs.rootfs import RootFS

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE: Final = 1
"""renameat2(2)."""
_TREE: Final = b"tree"
_LINKS: Final = b"links"
_IDS: Final = stat.S_ISUID | stat.S_ISGID
_SHOWN: Final = 10
"""Names that are shown of each end of a long path."""


class _Level(NamedTuple):
    """A directory being filled: what is still to come, and who it is on disk."""

    name: bytes
    ino: int
    entries: Iterator[tuple[bytes, int]]
    identity: tuple[int, int]


class Unpacker:
    """One copy of one inode and what is below it. ``left_out`` counts what could not be made, each reported once."""

    def __init__(self, view: RootFS, *, privileged: bool, report: Callable[[str], None]) -> None:
        """``report`` is given a sentence for each thing that is left out."""
        self._view = view
        self._privileged = privileged
        self._report = report
        self._linked: set[int] = set()
        self._links = -1
        self._path: list[bytes] = []
        self.left_out = 0
        self.damaged = 0
        self.lost_xattrs = 0

    def copy(self, ino: int, parent: int, name: bytes, *, replace: bool) -> None:
        """Copy inode ``ino`` to ``name`` in the directory open as ``parent``.

        An existing name is replaced only if ``replace`` says so, and never if it is a directory. Raises `BusyError` for
        that, `MachineError` for what the system refuses, `DamagedError` for data that is not what was indexed.
        """
        self._refuse_existing(parent, name, ino, replace=replace)
        self._path = [name]
        work = b".ocifs-cp-" + secrets.token_hex(8).encode()
        with self._sentence("write to the directory of"):
            os.mkdir(work, 0o700, dir_fd=parent)
        try:
            with contextlib.ExitStack() as stack:
                place = os.open(work, _DIRECTORY, dir_fd=parent)
                stack.callback(os.close, place)
                os.mkdir(_LINKS, 0o700, dir_fd=place)
                self._links = os.open(_LINKS, _DIRECTORY, dir_fd=place)
                stack.callback(os.close, self._links)
                self._copy_into(ino, place, parent, name, replace=replace)
        finally:
            with contextlib.suppress(OSError):
                remove_tree(parent, work)

    def _copy_into(self, ino: int, place: int, parent: int, name: bytes, *, replace: bool) -> None:
        found = self._view.inode(ino)
        if found.kind is not Kind.DIR:
            if self._make(place, _TREE, found):
                self._rename(place, parent, name, replace=replace)
            return
        with self._sentence("make"):
            os.mkdir(_TREE, 0o700, dir_fd=place)
            top = os.open(_TREE, _DIRECTORY, dir_fd=place)
        try:
            self._fill(top, ino)
            # Renaming a directory to another parent needs write permission on it, so its own mode comes last.
            self._rename(place, parent, name, replace=replace)
            with self._sentence("set the attributes of"):
                self._dress(top, found)
        finally:
            os.close(top)

    # -- directories ---------------------------------------------------------------------------------------------

    def _fill(self, top: int, ino: int) -> None:
        fd = os.dup(top)
        try:
            levels = [_Level(b"", ino, self._entries(ino), _identity(fd))]
            while True:
                level = levels[-1]
                entry = next(level.entries, None)
                if entry is not None:
                    name, child = entry
                    self._path.append(name)
                    found = self._view.inode(child)
                    if found.kind is Kind.DIR:
                        with self._sentence("make"):
                            os.mkdir(name, 0o700, dir_fd=fd)
                            below = os.open(name, _DIRECTORY, dir_fd=fd)
                        os.close(fd)
                        fd = below
                        levels.append(_Level(name, child, self._entries(child), _identity(fd)))
                        continue
                    self._make(fd, name, found)
                    self._path.pop()
                    continue
                levels.pop()
                if not levels:
                    return
                with self._sentence("set the attributes of"):
                    above = os.open(b"..", _DIRECTORY, dir_fd=fd)
                    try:
                        if _identity(above) != levels[-1].identity:
                            self._fail("copy", OSError(errno.EBUSY, "somebody moved it meanwhile"))
                        self._dress(fd, self._view.inode(level.ino))
                    except BaseException:
                        os.close(above)
                        raise
                os.close(fd)
                fd = above
                self._path.pop()
        finally:
            os.close(fd)

    def _entries(self, ino: int) -> Iterator[tuple[bytes, int]]:
        for name, child, *_ in self._view.readdir(ino):
            if name in (b".", b".."):
                continue
            if not name or b"/" in name or b"\0" in name:
                raise DamagedError(f"the image tree has a name that none can be: {decode(name)!r}")
            yield name, child

    # -- everything else -----------------------------------------------------------------------------------------

    def _make(self, directory: int, name: bytes, found: Inode) -> bool:
        """Make anything but a directory. False if it was left out."""
        key = b"%d" % found.ino
        if found.ino in self._linked:
            with self._sentence("link"):
                os.link(key, name, src_dir_fd=self._links, dst_dir_fd=directory, follow_symlinks=False)
            return True
        if found.kind is Kind.FILE and self._view.tree.unreadable(found.ino):
            self._leave_out("no layer holds its data (rules D6, H6 and L2)")
            self.damaged += 1
            return False
        if found.kind is Kind.FILE:
            with self._sentence("write"):
                fd = os.open(name, _NEW_FILE, 0o600, dir_fd=directory)
                try:
                    self._write(fd, found)
                    self._dress(fd, found)
                finally:
                    os.close(fd)
        elif not self._make_special(directory, name, found):
            return False
        if found.nlink > 1:
            with self._sentence("link"):
                os.link(name, key, src_dir_fd=directory, dst_dir_fd=self._links, follow_symlinks=False)
            self._linked.add(found.ino)
        return True

    def _make_special(self, directory: int, name: bytes, found: Inode) -> bool:
        with self._sentence("make"):
            if found.kind is Kind.SYMLINK:
                os.symlink(self._view.readlink(found.ino), name, dir_fd=directory)
            elif found.kind is Kind.FIFO:
                os.mkfifo(name, 0o600, dir_fd=directory)
            else:
                try:
                    os.mknod(name, found.kind << 12 | 0o600, os.makedev(*found.rdev), dir_fd=directory)
                except PermissionError:
                    self._leave_out("making a device needs root")
                    return False
            if self._privileged:
                os.chown(name, found.uid, found.gid, dir_fd=directory, follow_symlinks=False)
            # setxattr(2) knows no directory descriptors; the path through /proc means the same directory.
            self._set_xattrs(b"/proc/self/fd/%d/%s" % (directory, name), found)
            if found.kind is not Kind.SYMLINK:
                os.chmod(name, self._mode(found), dir_fd=directory)
            times = (found.mtime_ns, found.mtime_ns)
            os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
        return True

    def _write(self, fd: int, found: Inode) -> None:
        """Write a file's data; what is a hole in the image stays one."""
        offset = 0
        for piece in self._view.tree.extents(found.ino, 0, found.size):
            if piece.layer:
                for data in self._view.pieces(found.ino, start=offset, size=piece.size):
                    _pwrite_all(fd, data, offset)
                    offset += len(data)
            else:
                offset += piece.size
        os.ftruncate(fd, found.size)

    def _dress(self, fd: int, found: Inode) -> None:
        """Set the attributes of an open file or directory, each after those that would undo it.

        Changing the owner clears setuid bits and capabilities; attributes cannot be set on a file that its mode forbids
        to write; anything may change the time.
        """
        if self._privileged:
            os.fchown(fd, found.uid, found.gid)
        self._set_xattrs(fd, found)
        os.fchmod(fd, self._mode(found))
        os.utime(fd, ns=(found.mtime_ns, found.mtime_ns))

    def _mode(self, found: Inode) -> int:
        mode = found.mode & 0o7777
        return mode if self._privileged else mode & ~_IDS

    def _set_xattrs(self, where: int | bytes, found: Inode) -> None:
        for name, value in self._view.xattrs(found.ino).items():
            try:
                os.setxattr(where, name, value, follow_symlinks=isinstance(where, int))
            except OSError as error:
                if error.errno not in (
                    errno.EPERM,
                    errno.EACCES,
                    errno.ENOTSUP,
                    errno.E2BIG,
                    errno.ENOSPC,
                    errno.ERANGE,
                ):
                    raise
                self.lost_xattrs += 1

    # -- the end -------------------------------------------------------------------------------------------------

    def _refuse_existing(self, parent: int, name: bytes, ino: int, *, replace: bool) -> None:
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not replace:
            raise BusyError(f"{decode(name)} exists already; say --force to replace it")
        if stat.S_ISDIR(there.st_mode):
            raise BusyError(f"{decode(name)} is a directory, and directories are never replaced; remove it first")
        if self._view.inode(ino).kind is Kind.DIR:
            raise BusyError(f"{decode(name)} is no directory, and none can replace it; remove it first")

    def _rename(self, place: int, parent: int, name: bytes, *, replace: bool) -> None:
        with self._sentence("put in its place"):
            if replace:
                os.rename(_TREE, name, src_dir_fd=place, dst_dir_fd=parent)
            elif not _rename_new(place, parent, name):
                raise BusyError(f"{decode(name)} exists now: somebody else made it meanwhile")

    # -- failures ------------------------------------------------------------------------------------------------

    def _shown(self) -> str:
        path = self._path
        if len(path) > 2 * _SHOWN:
            path = [*path[:_SHOWN], "…".encode(), *path[-_SHOWN:]]
        return decode(b"/".join(path))

    def _leave_out(self, why: str) -> None:
        self.left_out += 1
        self._report(f"left out {self._shown()}: {why}")

    @contextlib.contextmanager
    def _sentence(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._fail(doing, error)

    def _fail(self, doing: str, error: OSError) -> NoReturn:
        advice = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise MachineError(f"cannot {doing} {self._shown()}: {error.strerror}{advice}") from error


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _rename_new(place: int, parent: int, name: bytes) -> bool:
    """Rename the finished tree unless the name exists; False if it does."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(place, ctypes.c_char_p(_TREE), parent, ctypes.c_char_p(name), _RENAME_NOREPLACE) == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            return False
        if number not in (errno.EINVAL, errno.ENOSYS):  # EINVAL: this file system cannot promise it
            raise OSError(number, os.strerror(number))
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=parent, follow_symlinks=False)
        return False
    os.rename(_TREE, name, src_dir_fd=place, dst_dir_fd=parent)
    return True


def remove_tree(parent: int, name: bytes) -> None:
    """Remove a directory tree of ours, however deep, with two descriptors. Raises OSError."""
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    names: list[bytes] = [name]
    try:
        while names:
            os.fchmod(fd, 0o700)
            below = _remove_files(fd)
            if below is not None:
                child = os.open(below, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = child
                names.append(below)
                continue
            gone = names.pop()
            above = os.open(b"..", _DIRECTORY, dir_fd=fd) if names else os.dup(parent)
            os.close(fd)
            fd = above
            os.rmdir(gone, dir_fd=fd)
    finally:
        os.close(fd)


def _remove_files(directory: int) -> bytes | None:
    """Remove what is no directory; give the name of one that is left."""
    below = None
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                below = os.fsencode(entry.name)
            else:
                os.unlink(entry.name, dir_fd=directory)
    return below


def check_name(name: bytes) -> bytes:
    """The last part of a destination; `UsageError` if it is no name."""
    if name in (b"", b".", b".."):
        raise UsageError("name the destination in full: the copy needs a name")
    return name
