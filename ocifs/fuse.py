"""FUSE protocol adapters: pyfuse3's calls to the views' answers; types and errnos, nothing else.

Two things can be served: an image (`Adapter`), or the files that the kernel's EROFS is mounted from (`DeviceAdapter`).

An image is served as a *forest*: several trees below one root, since a process can hold one FUSE session only. An inode
number is ``tree number * 2**40 + nid``; the image itself is tree 0, so its inode numbers are the nids of its tree file.

Nothing served here ever changes, so the kernel may keep everything for ever: entry, attribute and negative-entry
timeouts of 10⁹ seconds, ``keep_cache``, a constant generation. (Short timeouts would also make an overlayfs above the
mount answer ESTALE.) A name that does not exist is answered with inode 0 and that timeout rather than with ENOENT, which
the kernel would not remember. Permissions are checked by the kernel (``default_permissions``), so ``access`` only arrives
for what it does not check itself.

pyfuse3 facts this is built on (3.5.0): ``read`` gets nothing but the file handle, so the handle is the inode number; any
exception other than FUSEError ends the file system, so `answering` turns the rest into EIO and a log line (but never
BaseException: trio's Cancelled must pass); READDIRPLUS is always on, so attributes objects are reused.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from ocifs.devices import DeviceFile
from ocifs.erofs.layout import NAME_MAX
from ocifs.errors import OcifsError
from ocifs.rootfs import RootFS
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.erofs import DirectoryEntry, Inode

_log = logging.getLogger(__name__)

TREE_SHIFT = 40
"""Bits of an inode number below the tree number: nids are 32-byte slots, so a tree of 2**45 bytes fits."""

FOREVER = 10**9
"""Seconds (32 years) for which the kernel may believe an answer. pyfuse3 splits it into seconds and nanoseconds."""

ATTRIBUTES_KEPT = 64 << 10
"""EntryAttributes objects kept for reuse: 295 bytes each, 19 MB at most."""

COMPLAINTS_KEPT = 1000
"""Different failures that are told apart, so that each is logged at its 1st, 2nd, 4th, 8th, … time only."""

BLKSIZE = 128 << 10
"""st_blksize: what stdio and cp take as their buffer, and the largest read the kernel sends without being asked."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_A = TypeVar("_A", bound="_ReadOnly")


def answering(
    operation: Callable[Concatenate[_A, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[_A, _P], Coroutine[Any, Any, _R]]:
    """Make an operation answer with an errno whatever happens: the session must survive every request."""

    @functools.wraps(operation)
    async def answered(self: _A, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self.requests[operation.__name__] += 1
        try:
            return await operation(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OcifsError as error:
            self.errors += 1
            self.complain(f"{operation.__name__}: {error}")
            raise pyfuse3.FUSEError(error.errno) from error
        except Exception as error:
            self.errors += 1
            _log.exception("%s failed in a way that was not foreseen", operation.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return answered


class _ReadOnly(pyfuse3.Operations):
    """What all our file systems have in common.

    ``requests`` counts requests by their names, but for those that need no answer of ours (opening and closing directories,
    closing files), ``read_bytes`` what READ was answered with, ``errors`` the requests that failed for a reason of ours.
    """

    enable_writeback_cache = False
    supports_dot_lookup = True

    def __init__(self) -> None:
        super().__init__()
        self.requests: Counter[str] = Counter()
        self.read_bytes = 0
        self.errors = 0
        self._complaints: OrderedDict[str, int] = OrderedDict()

    def complain(self, message: str) -> None:
        """Log a failure; one that comes again and again (anybody can read a damaged file in a loop) ever more rarely."""
        count = self._complaints.pop(message, 0) + 1
        self._complaints[message] = count
        if len(self._complaints) > COMPLAINTS_KEPT:
            self._complaints.popitem(last=False)
        if count == 1:
            _log.error("%s", message)
        elif count & (count - 1) == 0:
            _log.error("%s (%d times)", message, count)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """FORGET: nothing to do, inode numbers are for ever."""

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """OPENDIR: the handle is the inode number."""
        return pyfuse3.FileHandleT(inode)

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """RELEASEDIR: nothing is held."""

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """FLUSH: the kernel stops asking after one ENOSYS."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """RELEASE: nothing is held."""

    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """ACCESS: the kernel has checked the mode bits already; what is left is that nothing can be written."""
        return not mode & os.W_OK

    async def _refused(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (stands for a dozen signatures)
        raise pyfuse3.FUSEError(errno.EROFS)

    # The kernel refuses these itself on a mount with `ro`; a mount remounted without it still cannot be written.
    create = mknod = mkdir = unlink = rmdir = symlink = rename = link = setattr = write = _refused
    setxattr = removexattr = _refused


class Served(Protocol):
    """A tree that can be served; `ocifs.rootfs.RootFS` is one and says what each method gives."""

    def inode(self, ino: int) -> Inode:
        """Attributes of an inode."""
        ...

    def lookup(self, directory: int, name: bytes) -> int | None:
        """The inode that a name is in a directory; None if there is no such name."""
        ...

    def readdir(self, directory: int, position: int = 0) -> Iterator[DirectoryEntry]:
        """Entries from a position on."""
        ...

    def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""
        ...

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """Extended attributes by full name."""
        ...

    def check_readable(self, ino: int) -> None:
        """Raise what opening a file fails with."""

    async def read(self, ino: int, offset: int, size: int) -> bytes | memoryview:
        """Bytes of a file; fewer at its end."""
        ...


class Adapter(_ReadOnly):
    """A forest of views as a read-only FUSE file system."""

    def __init__(self, trees: Sequence[RootFS]) -> None:
        """Serve ``trees``; the first is the image, whose root is the mount's root."""
        super().__init__()
        if trees[0].root != pyfuse3.ROOT_INODE:
            message = f"the root of an image tree is nid {trees[0].root}; FUSE wants {pyfuse3.ROOT_INODE}"
            raise ValueError(message)
        self._trees = tuple(trees)
        self._attributes: OrderedDict[int, pyfuse3.EntryAttributes] = OrderedDict()
        self._missing = pyfuse3.EntryAttributes()
        self._missing.st_ino = pyfuse3.InodeT(0)
        self._missing.entry_timeout = FOREVER
        self._has_xattrs = any(tree.tree.metadata.any_xattr for tree in trees)

    def _at(self, inode: int) -> tuple[Served, int, int]:
        """The view, the nid in it, and what to add to its nids."""
        number = inode >> TREE_SHIFT
        return self._trees[number], inode & ((1 << TREE_SHIFT) - 1), number << TREE_SHIFT

    def _attr(self, inode: int) -> pyfuse3.EntryAttributes:
        kept = self._attributes.get(inode)
        if kept is not None:
            return kept
        view, nid, _ = self._at(inode)
        found = view.inode(nid)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.generation = 0
        entry.entry_timeout = FOREVER
        entry.attr_timeout = FOREVER
        entry.st_mode = pyfuse3.ModeT(found.mode)
        entry.st_nlink = found.nlink
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_rdev = os.makedev(*found.rdev) if found.kind in (Kind.CHAR, Kind.BLOCK) else 0
        entry.st_size = found.size
        entry.st_blksize = BLKSIZE
        entry.st_blocks = (found.size + 511) // 512
        entry.st_atime_ns = entry.st_ctime_ns = entry.st_mtime_ns = found.mtime_ns
        self._attributes[inode] = entry
        if len(self._attributes) > ATTRIBUTES_KEPT:
            self._attributes.popitem(last=False)
        return entry

    # -- names ---------------------------------------------------------------------------------------------------

    @answering
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """LOOKUP."""
        if len(name) > NAME_MAX:  # the kernel lets FUSE have longer ones
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        view, nid, base = self._at(parent_inode)
        found = view.lookup(nid, name)
        return self._missing if found is None else self._attr(base | found)

    @answering
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        return self._attr(inode)

    @answering
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        """READLINK."""
        view, nid, _ = self._at(inode)
        return pyfuse3.FileNameT(view.readlink(nid))

    @answering
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """READDIRPLUS from position ``start_id`` until the reply is full."""
        view, nid, base = self._at(fh)
        attr, reply = self._attr, pyfuse3.readdir_reply
        for name, child, _, following in view.readdir(nid, start_id):
            if not reply(token, name, attr(base | child), following):
                break

    # -- data ----------------------------------------------------------------------------------------------------

    @answering
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """OPEN for reading: the handle is the inode number, and cached pages stay valid."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EROFS)
        view, nid, _ = self._at(inode)
        view.check_readable(nid)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    @answering
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """READ."""
        view, nid, _ = self._at(fh)
        data = await view.read(nid, off, size)
        self.read_bytes += len(data)
        return data  # type: ignore[return-value] # pyfuse3 says bytes and takes anything with the buffer protocol

    # -- the rest ------------------------------------------------------------------------------------------------

    @answering
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """STATFS: what the image holds, and no room for more."""
        about = self._trees[0].tree.metadata
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = BLKSIZE
        answer.f_frsize = 512
        answer.f_blocks = (about.data_size + 511) // 512
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = about.inode_count
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = NAME_MAX
        return answer

    @answering
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """GETXATTR: ENOSYS, so that the kernel stops asking, only if no inode has any."""
        if not self._has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        view, nid, _ = self._at(inode)
        value = view.xattrs(nid).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @answering
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        """LISTXATTR."""
        if not self._has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        view, nid, _ = self._at(inode)
        return [pyfuse3.XAttrNameT(name) for name in view.xattrs(nid)]


class DeviceAdapter(_ReadOnly):
    """Device files in one flat directory, for the kernel's EROFS: the first is called ``0``, the next ``1``, and so on.

    Inode 1 is the directory, inode N + 2 the file called N.
    """

    def __init__(self, files: Sequence[DeviceFile]) -> None:
        """Serve ``files``."""
        super().__init__()
        self._files = tuple(files)

    def _attr(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.entry_timeout = entry.attr_timeout = FOREVER
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o700)
            entry.st_nlink = 2
        else:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o400)
            entry.st_nlink = 1
            entry.st_size = self._files[inode - 2].size
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.st_blksize = BLKSIZE
        return entry

    @answering
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """LOOKUP."""
        if not name.isdigit() or int(name) >= len(self._files) or name != b"%d" % int(name):
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attr(int(name) + 2)

    @answering
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        return self._attr(inode)

    @answering
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """READDIRPLUS."""
        for number in range(start_id, len(self._files)):
            name = pyfuse3.FileNameT(b"%d" % number)
            if not pyfuse3.readdir_reply(token, name, self._attr(number + 2), number + 1):
                break

    @answering
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """OPEN: cached pages stay valid."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    @answering
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """READ."""
        file = self._files[fh - 2]
        size = min(size, file.size - off)
        data = await file.read(off, size) if size > 0 else b""
        self.read_bytes += len(data)
        return data  # type: ignore[return-value] # as in `Adapter.read`

    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """GETXATTR: the kernel stops asking after one ENOSYS."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        """LISTXATTR, likewise."""
        raise pyfuse3.FUSEError(errno.ENOSYS)
