"""The view of one image tree: names, attributes, links, xattrs at once; file data when it is asked for.

This is the one place that says what an image looks like as a file system. `ocifs.fuse` turns its answers into protocol
replies, the commands that read an image without mounting it call it directly.

Everything but data comes from the mapped image tree and never waits. Data comes from `ocifs.spans`: `RootFS.read` is
asynchronous, `RootFS.read_blocking` works in the calling thread.

What is served never changes, so nothing is ever invalidated.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from ocifs.erofs import ROOT_NID, DirectoryEntry, Inode
from ocifs.errors import DamagedError, NotFoundError, OcifsError
from ocifs.image import Image
from ocifs.image_tree import ImageTree
from ocifs.spans import SpanCache, SpanReader
from ocifs.tree import Kind

PIECE_SIZE: Final = 1 << 20
"""Bytes that `RootFS.pieces` reads at a time: a quarter of a span or so, so that a span in the cache serves several."""

SYMLINK_LIMIT = 40
"""Symbolic links followed in one path before ELOOP: the kernel's MAXSYMLINKS (include/linux/namei.h)."""


class NotReadableError(DamagedError):
    """An entry that has no data to give: shown under examination where rules D6, H6 and L2 refuse."""


class SymlinkLoopError(OcifsError):
    """A path meets more symbolic links than `SYMLINK_LIMIT`."""

    exit_code = 3
    errno = errno.ELOOP


class NotADirectoryInImageError(NotFoundError):
    """A path goes on below something that is not a directory."""

    errno = errno.ENOTDIR


class RootFS:
    """One image tree with its data. Inode numbers are the tree's nids; the root is `root`."""

    def __init__(self, tree: ImageTree, spans: SpanReader) -> None:
        """Serve ``tree``, whose data lies in the layers of ``spans``."""
        self.tree = tree
        self.root = ROOT_NID
        self._image = tree.image
        self.spans = spans

    # -- names and attributes: at once ---------------------------------------------------------------------------

    def inode(self, ino: int) -> Inode:
        """Attributes of an inode."""
        return self._image.inode(ino)

    def lookup(self, directory: int, name: bytes) -> int | None:
        """The inode that ``name`` is in ``directory``; None if there is no such name. ``.`` and ``..`` are names too."""
        return self._image.lookup(directory, name)

    def readdir(self, directory: int, position: int = 0) -> Iterator[DirectoryEntry]:
        """Entries from ``position`` on, ``.`` and ``..`` among them; the order never changes."""
        return self._image.readdir(directory, position)

    def preorder(self) -> Iterator[tuple[bytes, Inode]]:
        """Everything below the root with its path, without a leading slash: each directory right before what is in it."""
        levels = [(b"", self.readdir(self.root))]
        while levels:
            prefix, entries = levels[-1]
            for name, ino, *_ in entries:
                if name in (b".", b".."):
                    continue
                found = self.inode(ino)
                path = prefix + name
                yield path, found
                if found.kind is Kind.DIR:
                    levels.append((path + b"/", self.readdir(ino)))
                    break
            else:
                levels.pop()

    def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link, as stored."""
        return self._image.readlink(ino)

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """Extended attributes by full name (``b"user.x"``)."""
        return self._image.xattrs(ino)

    def resolve(self, path: bytes, *, follow: bool = True) -> int:
        """The inode of ``path``, symbolic links followed inside the image and never outside.

        The last component is not followed if ``follow`` is false, as with lstat(2). Raises `NotFoundError`,
        `NotADirectoryInImageError` or `SymlinkLoopError`, each naming the path.
        """
        return self._walk(path, follow=follow)

    def _walk(self, path: bytes, *, follow: bool) -> int:
        todo = path.split(b"/")[::-1]
        here, links = self.root, 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                # A trailing slash asks for a directory, through a link if need be (path_resolution(7)).
                if self.inode(here).kind is not Kind.DIR:
                    raise NotADirectoryInImageError(_path_message(path, "is not a directory"))
                continue
            if self.inode(here).kind is not Kind.DIR:
                raise NotADirectoryInImageError(_path_message(path, "goes on below something that is not a directory"))
            found = self.lookup(here, name)
            if found is None:
                raise NotFoundError(_path_message(path, "does not exist in the image"))
            if self.inode(found).kind is Kind.SYMLINK and (todo or follow):
                links += 1
                if links > SYMLINK_LIMIT:
                    raise SymlinkLoopError(_path_message(path, "leads through too many symbolic links"))
                target = self.readlink(found)
                todo.extend(target.split(b"/")[::-1])
                if target.startswith(b"/"):
                    here = self.root
                continue
            here = found
        return here

    # -- data ----------------------------------------------------------------------------------------------------

    def check_readable(self, ino: int) -> None:
        """Raise `NotReadableError` if the inode's data is known to be missing, so that open(2) fails already."""
        if self.tree.unreadable(ino):
            message = (
                "no layer holds the data of this file: its layer breaks off (D6), or it is a link to nothing (H6, L2)"
            )
            raise NotReadableError(message)

    async def read(self, ino: int, offset: int, size: int) -> bytes | memoryview:
        """``size`` bytes of a file at ``offset``; fewer at its end. One span in the cache costs no copy and no thread."""
        parts = await self.spans.gather(self.tree.extents(ino, offset, size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_blocking(self, ino: int, offset: int, size: int) -> bytes | memoryview:
        """The same in the calling thread, for who runs no event loop."""
        parts: list[bytes | memoryview] = []
        for layer, layer_offset, length in self.tree.extents(ino, offset, size):
            parts += self.spans.read_blocking(layer, layer_offset, length) if layer else [bytes(length)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pieces(self, ino: int, *, start: int = 0, size: int | None = None) -> Iterator[bytes | memoryview]:
        """A file's bytes from ``start`` on, blocking, in pieces; `DamagedError` if there are fewer than its size says."""
        end = self.inode(ino).size if size is None else start + size
        while start < end:
            data = self.read_blocking(ino, start, min(PIECE_SIZE, end - start))
            if not data:
                raise DamagedError(f"the file of inode {ino} ends {end - start} bytes too early")
            yield data
            start += len(data)


def view(image: Image, cache: SpanCache | None = None) -> RootFS:
    """Look at an open image, keeping decoded spans in ``cache``."""
    return RootFS(image.tree, SpanReader([layer.data for layer in image.layers], cache, evidence=image.evidence))


def _path_message(path: bytes, what: str) -> str:
    return f"{path.decode(errors='backslashreplace')} {what}"
