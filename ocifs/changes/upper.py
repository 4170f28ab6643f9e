"""The upper directory of a kernel overlay, name by name, and what overlayfs has noted there for itself.

overlayfs keeps its notes as extended attributes, ``trusted.overlay.*``, or ``user.overlay.*`` where the overlay was mounted
with ``userxattr`` (without privileges). Which of the two is its own must be known: the other is anybody's to write, so a
process in the container could make up notes there.

=================  ====================================================================================================
a char device 0:0  a whiteout: the name is gone
``opaque`` = y     on a directory: nothing lower is left of it
``opaque`` = x     on a directory: there may be files with ``whiteout`` in it; nothing is hidden
``whiteout``       on an empty file: a whiteout too, also where its directory has no ``opaque`` = x (tried on Linux 6.18:
                   such a name is listed and cannot be opened)
``redirect``       on a directory, or a file with ``metacopy``: where in the lower tree it was before it was renamed
``metacopy``       on a file: only its attributes are here, its data is still below
``nlink``          on a file or a link: with ``index=on`` further names below show it too, unless it is ``U-1``, which says
                   that there are as many as the upper directory has (fs/overlayfs/inode.c, ovl_set_nlink_common)
the rest           ``origin``, ``impure``, ``upper``, ``uuid``, ``protattr``: of no meaning without the overlay
=================  ====================================================================================================

The container may be running. What changes between two looks is noticed by size, mtime and ctime, and refused: a layer of
which half is older than the other never existed as a state of anything. So when all has been read, all is looked at once
more: what did not change from the first look to the last was so at one moment, that in which the reading ended. (A store
to a mapped page that was written before and is not on disk yet changes none of the three. No other reader notices either.)

Nothing is opened that is not known to be a file or a directory: to open a device may set something off.

Deep trees: one descriptor is open, for the directory that names are relative to. On the way up ``..`` is opened, and it
must be the directory that was come from.

Not here: what the overlay shows (`merged`).
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, Self

import msgspec

from ocifs.errors import BusyError, MachineError, NotFoundError
from ocifs.sources.blob import shown
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLACE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOATIME
_CAP_SYS_ADMIN: Final = 21
"""linux/capability.h."""
_ALL_IDS: Final = 2**32 - 1
_PAGE: Final = 4096
_PIECE: Final = 1 << 20

_KNOWN_NOTES: Final = frozenset(
    {
        b"opaque",
        b"redirect",
        b"origin",
        b"impure",
        b"nlink",
        b"upper",
        b"uuid",
        b"metacopy",
        b"protattr",
        b"whiteout",
    }
)
"""fs/overlayfs/overlayfs.h, ``OVL_XATTR_…_POSTFIX``."""

OF_THIS_MACHINE: Final = frozenset(
    {b"security.selinux", b"security.SMACK64", b"security.apparmor", b"security.ima", b"security.evm"}
)
"""Labels and measurements that the kernel gives every new file here. They are nothing the container changed."""


class Namespace(enum.Enum):
    """Where overlayfs keeps its notes; the value is what their names begin with."""

    TRUSTED = b"trusted.overlay."
    USER = b"user.overlay."


class ChangedWhileReadError(BusyError):
    """Something in the upper directory changed between two looks at it."""


class Notes(msgspec.Struct, frozen=True):
    """What overlayfs has noted on one inode."""

    opaque: bool = False
    redirect: bytes | None = None
    metacopy: bool = False
    whiteout: bool = False
    linked: bool = False
    """Whether names that are still below show the same inode."""


class Entry(msgspec.Struct, frozen=True):
    """One name of an upper directory."""

    kind: Kind | None
    """None: a socket, which no layer can hold."""
    status: os.stat_result
    notes: Notes
    xattrs: tuple[tuple[bytes, bytes], ...]
    """Sorted; without overlayfs's and without labels of this machine."""
    left_out: tuple[bytes, ...] = ()
    """Names of attributes that somebody in the container gave and that are called as overlayfs's are."""
    target: bytes = b""
    """Of a SYMLINK."""

    @property
    def is_whiteout(self) -> bool:
        """Whether it says that its name is gone (fs/overlayfs/util.c, ovl_path_is_whiteout)."""
        if self.kind is Kind.CHAR:
            return self.status.st_rdev == 0
        return self.kind is Kind.FILE and self.notes.whiteout and self.status.st_size == 0

    @property
    def rdev(self) -> tuple[int, int]:
        """(major, minor) of a device."""
        return os.major(self.status.st_rdev), os.minor(self.status.st_rdev)


class _Level(NamedTuple):
    """A directory on the way to the current one: its name, and what it was when it was entered."""

    name: bytes
    status: os.stat_result


class Upper:
    """An upper directory and a place in it: the directory that names are relative to. Begins at the top."""

    def __init__(self, path: bytes, namespace: Namespace) -> None:
        """Open the directory ``path``. NotFoundError if there is none, MachineError if its notes cannot be seen."""
        self.path = path
        self._namespace = namespace
        if namespace is Namespace.TRUSTED and not _sees_trusted():
            raise MachineError(
                f"the notes of overlayfs in {shown(path)} (trusted.overlay.*) can be seen by root only: run this as root, "
                "or say --userxattr if the overlay was mounted with that"
            )
        try:
            self._fd = os.open(path, _DIRECTORY & ~os.O_NOFOLLOW)
        except FileNotFoundError:
            raise NotFoundError(f"there is no upper directory {shown(path)}") from None
        except OSError as error:
            raise MachineError(f"cannot open the upper directory {shown(path)}: {error.strerror}") from error
        try:
            self.top = self._entry(b"/proc/self/fd/%d/." % self._fd, os.fstat(self._fd))
        except BaseException:
            os.close(self._fd)
            raise
        self._levels = [_Level(b"", self.top.status)]
        self._looks = array("q")
        """Hashes of what was seen of every name, in order."""

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        """Nothing to do: it is open already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    # -- the current directory -----------------------------------------------------------------------------------

    def names(self) -> list[bytes]:
        """The names in the current directory, bytewise sorted."""
        with self._sentence("list", b"."):
            return sorted(map(os.fsencode, os.listdir(self._fd)))

    def entry(self, name: bytes) -> Entry:
        """What ``name`` is in the current directory."""
        with self._sentence("look at", name):
            status = self._status(name)
            # xattrs have no calls with directory descriptors; this path means the same directory.
            return self._entry(b"/proc/self/fd/%d/%s" % (self._fd, name), status)

    def _status(self, name: bytes) -> os.stat_result:
        status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        self._looks.append(hash((name, signature(status))))
        return status

    def enter(self, name: bytes, seen: os.stat_result) -> None:
        """Make the directory ``name``, which was ``seen`` before, the current one."""
        with self._sentence("enter", name):
            below = os.open(name, _DIRECTORY, dir_fd=self._fd)
            os.close(self._fd)
            self._fd = below
        self._levels.append(_Level(name, seen))
        self._check_unchanged(os.fstat(self._fd), seen, b".")

    def leave(self) -> None:
        """Go back up; refused if the directory is not as it was when it was entered."""
        self._check_unchanged(os.fstat(self._fd), self._levels[-1].status, b".")
        self._levels.pop()
        if not self._levels:
            return
        with self._sentence("go up to", b"."):
            above = os.open(b"..", _DIRECTORY, dir_fd=self._fd)
            os.close(self._fd)
            self._fd = above
        found, before = os.fstat(self._fd), self._levels[-1].status
        if (found.st_dev, found.st_ino) != (before.st_dev, before.st_ino):
            self.fail_changed(b".")

    @contextmanager
    def opened(self, name: bytes, entry: Entry) -> Iterator[int]:
        """A file of the current directory, open for reading; refused if it is not all the time what ``entry`` says."""
        with self._sentence("open", name):
            place = os.open(name, _PLACE, dir_fd=self._fd)
            try:
                self._check_unchanged(os.fstat(place), entry.status, name)
                fd = _opened(b"/proc/self/fd/%d" % place)
            finally:
                os.close(place)
        try:
            with self._sentence("read", name):
                yield fd
            self._check_unchanged(os.fstat(fd), entry.status, name)
        finally:
            os.close(fd)

    def check_unchanged(self) -> None:
        """Look at everything once more, after `entry` has told of every name in order: refused if anything has changed."""
        before, self._looks = self._looks, array("q")
        self._levels = [_Level(b"", self.top.status)]
        ways = [iter(self.names())]
        while ways:
            name = next(ways[-1], None)
            if name is None:
                ways.pop()
                self.leave()
                continue
            with self._sentence("look at", name):
                status = self._status(name)
            if self._looks[-1:] != before[len(self._looks) - 1 : len(self._looks)]:
                self.fail_changed(name)
            if stat.S_ISDIR(status.st_mode):
                self.enter(name, status)
                ways.append(iter(self.names()))

    # -- one inode -----------------------------------------------------------------------------------------------

    def _entry(self, path: bytes, status: os.stat_result) -> Entry:
        kind = Kind(stat.S_IFMT(status.st_mode) >> 12) if not stat.S_ISSOCK(status.st_mode) else None
        notes: dict[bytes, bytes] = {}
        xattrs: list[tuple[bytes, bytes]] = []
        left_out: list[bytes] = []
        prefix = self._namespace.value
        for name in sorted(map(os.fsencode, _listxattr(path))):
            if name.startswith(prefix) and name[len(prefix) :] in _KNOWN_NOTES:
                notes[name[len(prefix) :]] = os.getxattr(path, name, follow_symlinks=False)
            elif name.startswith((Namespace.TRUSTED.value, Namespace.USER.value)):
                left_out.append(name)
            elif name not in OF_THIS_MACHINE:
                xattrs.append((name, os.getxattr(path, name, follow_symlinks=False)))
        return Entry(
            kind,
            status,
            Notes(
                opaque=notes.get(b"opaque") == b"y",
                redirect=notes.get(b"redirect"),
                metacopy=b"metacopy" in notes,
                whiteout=b"whiteout" in notes,
                linked=not notes.get(b"nlink", b"U-").startswith(b"U-"),
            ),
            tuple(xattrs),
            tuple(left_out),
            os.readlink(path) if kind is Kind.SYMLINK else b"",
        )

    # -- failures ------------------------------------------------------------------------------------------------

    def _check_unchanged(self, found: os.stat_result, before: os.stat_result, name: bytes) -> None:
        if signature(found) != signature(before):
            self.fail_changed(name)

    def fail_changed(self, name: bytes) -> NoReturn:
        """Refuse ``name`` of the current directory because it is not what it was."""
        raise ChangedWhileReadError(
            f"{self._where(name)} changed while it was read: pause or stop what runs there, and try again"
        )

    def _where(self, name: bytes) -> str:
        names = [level.name for level in self._levels[1:]] + ([] if name == b"." else [name])
        return shown(b"/".join([self.path, *names]))

    @contextmanager
    def _sentence(self, doing: str, name: bytes) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENODATA, errno.ESTALE):
                self.fail_changed(name)
            raise MachineError(f"cannot {doing} {self._where(name)}: {error.strerror}") from error


def _opened(path: bytes) -> int:
    try:
        return os.open(path, _FILE)
    except PermissionError:  # O_NOATIME is for the owner
        return os.open(path, _FILE & ~os.O_NOATIME)


def signature(status: os.stat_result) -> tuple[int, ...]:
    """What of a stat(2) changes when anything about the inode does. ctime alone would do; clocks may be coarse."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of what of an open file is no hole, between two offsets."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here to the end
                return
            raise
        if start < end:
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
            yield start, stop
            start = stop


def all_zeros(fd: int, start: int, end: int) -> bool:
    """Whether a part of an open file reads as a hole does; most that do not, say so in their first page."""
    size = _PAGE
    while start < end:
        data = os.pread(fd, min(size, end - start), start)
        if data.strip(b"\0"):
            return False
        start, size = start + size, _PIECE
    return True


def _listxattr(path: bytes) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []  # the file system has none
        raise


def _sees_trusted() -> bool:
    """Whether ``trusted.*`` attributes are shown to this process: with CAP_SYS_ADMIN over the whole machine (xattr(7))."""
    with open("/proc/self/status", "rb") as lines:
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith(b"CapEff:"))
    with open("/proc/self/uid_map", "rb") as mapped:
        outermost = [int(number) for number in mapped.read().split()] == [0, 0, _ALL_IDS]
    return bool(effective >> _CAP_SYS_ADMIN & 1) and outermost
