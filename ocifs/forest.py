"""A mount with more than its image: views below one directory of the root, opened when somebody enters them.

`Forest` is the FUSE adapter of examined mounts. It serves the image as `ocifs.fuse.Adapter` does, and below the root a
directory `VIEWS` that is made of values: a `Folder` of names, a `Document` whose bytes somebody gives, a `Joined` tree.
What a document or a tree is, and where it comes from, is not known here; they are asked for it when they are first used.

Inode numbers (see `ocifs.fuse`): tree 0 is the image, tree 1 what is made of values, and joined tree N from 0 is N + 2, in
the order of the names, so numbers are the same at each mount. A joined tree's root has the number of its `Joined`: to the
kernel it is a directory of tree 1, with attributes that are ours and never change. So a listing of what is joined opens no
tree; whoever looks up a name in such a directory, or lists it, waits until its tree is there.

A document of unknown size is made when its attributes are asked for by themselves: a listing gives 0 bytes and tells the
kernel not to remember that.

The directory is found by name and stands in no listing, unless it is to be visible. If the image has that name in its
root, it is hidden: the views show it (``upto/NN``).

Concurrency: as `ocifs.fuse`, one event loop.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

import pyfuse3

from ocifs.erofs import ROOT_NID, DirectoryEntry, Inode
from ocifs.erofs.layout import NAME_MAX
from ocifs.errors import OcifsError
from ocifs.forensics.views import DIRECTORY
from ocifs.fuse import TREE_SHIFT, Adapter, Served, answering
from ocifs.tree import Kind

if TYPE_CHECKING:
    import trio

    from ocifs.rootfs import RootFS

VIEWS: Final = DIRECTORY
"""The directory's name."""

PROVENANCE: Final = b"user.ocifs."
"""What names of extended attributes that say where something comes from begin with. An image's own of such a name, which
could tell lies, are not shown."""

_VALUES: Final = 1
"""The number of the tree that is made of values."""
_VIEWS_INODE: Final = pyfuse3.InodeT(_VALUES << TREE_SHIFT | ROOT_NID)
_BEHIND: Final = 1 << 62
"""The position in the listing of the root behind all that the image has."""
_NID_MASK: Final = (1 << TREE_SHIFT) - 1

_T = TypeVar("_T")


class Once(Generic[_T]):
    """Something that is made when it is first asked for, once, whoever else asks meanwhile.

    An error is shared by those who wait, but not remembered.
    """

    def __init__(self, make: Callable[[], Awaitable[_T]]) -> None:
        self.made: _T | None = None
        self._make = make
        self._flight: _Flight | None = None

    async def get(self) -> _T:
        """Give it, made if need be."""
        import trio  # noqa: PLC0415 (see `ocifs.spans`)

        while self.made is None:
            flight = self._flight
            if flight is not None:
                await flight.landed.wait()
                if flight.error is not None:
                    raise flight.error
                continue  # it is there now; or its maker was cancelled
            flight = self._flight = _Flight(trio.Event())
            try:
                self.made = await self._make()
            except BaseException as error:
                flight.error = error if isinstance(error, OcifsError) else None
                raise
            finally:
                self._flight = None
                flight.landed.set()
        return self.made


class _Flight:
    def __init__(self, landed: trio.Event) -> None:
        self.landed = landed
        self.error: OcifsError | None = None


class Content(Protocol):
    """The bytes of a document."""

    size: int

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Give ``size`` bytes at ``offset``, all of them inside."""
        ...


class Document:
    """A file of a view. ``layer`` is the layer that it is about, 0 if none."""

    def __init__(self, make: Callable[[], Awaitable[Content]], *, size: int | None = None, layer: int = 0) -> None:
        """Have the content made by ``make`` when it is first needed: for its size too, if ``size`` is not given."""
        self.content = Once(make)
        self.layer = layer
        self._size = size

    @property
    def size(self) -> int | None:
        """Bytes; None as long as that is not known."""
        return self._size if self.content.made is None else self.content.made.size


class Joined:
    """A directory whose content is another tree, opened when it is entered."""

    def __init__(self, open_: Callable[[], Awaitable[RootFS]], *, private: bool = False) -> None:
        self.tree = Once(open_)
        self.private = private
        """Whether only who mounted gets in."""


class Folder:
    """A directory of a view, whose names are known from the beginning."""

    def __init__(self, children: Mapping[bytes, Folder | Document | Joined], *, private: bool = False) -> None:
        self.children = children
        self.private = private
        """As in `Joined`."""


class Values:
    """The tree that is made of values, as `Served`.

    Files are 0444, directories 0555, all are root's and of time 0. What shows more than the image's own modes let others see
    (and a mount may be for others, too) is in a directory that is private: 0500, and its owner is who mounted.
    """

    def __init__(self, root: Folder) -> None:
        self._nodes: list[Folder | Document | Joined] = [root]
        self._parents = [0]
        self._names: list[dict[bytes, int]] = []
        """The children of each node."""
        for number, node in enumerate(self._nodes):  # it grows meanwhile
            children = node.children if isinstance(node, Folder) else {}
            self._names.append({name: len(self._nodes) + at for at, name in enumerate(children)})
            self._nodes.extend(children.values())
            self._parents.extend(number for _ in children)
        self.joined = {
            number + ROOT_NID: (place, node.tree)
            for place, (number, node) in enumerate(
                (number, node) for number, node in enumerate(self._nodes) if isinstance(node, Joined)
            )
        }
        """The joined trees, in order, by the nid of their directory."""

    def node(self, nid: int) -> Folder | Document | Joined:
        """Give what a nid stands for."""
        return self._nodes[nid - ROOT_NID]

    def inode(self, nid: int) -> Inode:
        """See `Served`."""
        node = self.node(nid)
        if isinstance(node, Document):
            return Inode(nid, Kind.FILE, 0o100444, 1, 0, 0, node.size or 0, 0, (0, 0))
        # One link: nobody has counted.
        if node.private:
            return Inode(nid, Kind.DIR, 0o040500, 1, os.geteuid(), os.getegid(), 0, 0, (0, 0))
        return Inode(nid, Kind.DIR, 0o040555, 1, 0, 0, 0, 0, (0, 0))

    def lookup(self, directory: int, name: bytes) -> int | None:
        """See `Served`."""
        number = self._names[directory - ROOT_NID].get(name)
        return None if number is None else number + ROOT_NID

    def readdir(self, directory: int, position: int = 0) -> Iterator[DirectoryEntry]:
        """See `Served`."""
        own = directory - ROOT_NID
        listed = [(b".", own), (b"..", self._parents[own]), *self._names[own].items()]
        for following, (name, number) in enumerate(listed[position:], position + 1):
            yield DirectoryEntry(name, number + ROOT_NID, self.inode(number + ROOT_NID).kind, following)

    def readlink(self, ino: int) -> bytes:
        """There is none."""
        raise OcifsError(f"inode {ino} of the views is no symbolic link")

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """See `Served`."""
        return {}

    def check_readable(self, ino: int) -> None:
        """Whatever fails, fails when it is read."""

    async def read(self, ino: int, offset: int, size: int) -> bytes | memoryview:
        """See `Served`."""
        node = self.node(ino)
        if not isinstance(node, Document):
            raise OcifsError(f"inode {ino} of the views is no file")
        content = await node.content.get()
        size = min(size, content.size - offset)
        return await content.read(offset, size) if size > 0 else b""


class Provenance(Protocol):
    """Who says where things come from: the extended attributes `PROVENANCE`."""

    def names(self, view: Served, nid: int) -> Sequence[bytes]:
        """The attributes that a listing shows."""
        ...

    async def value(self, view: Served, nid: int, name: bytes) -> bytes | None:
        """Give one by its full name; None if there is none."""
        ...


class Forest(Adapter):
    """An image and views as one read-only FUSE file system."""

    def __init__(self, image: RootFS, views: Folder, provenance: Provenance, *, visible: bool = False) -> None:
        """Serve ``image`` and in its root `VIEWS`, which listings show if it is ``visible``."""
        super().__init__([image])
        self._values = Values(views)
        self._provenance = provenance
        self._visible = visible
        self._served: dict[int, Served] = {0: image, _VALUES: self._values}

    def _at(self, inode: int) -> tuple[Served, int, int]:
        number = inode >> TREE_SHIFT
        return self._served[number], inode & _NID_MASK, number << TREE_SHIFT

    def _attr(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = super()._attr(inode)
        document = self._document(inode)
        if document is not None and document.size is None:
            entry.attr_timeout = 0
            self._attributes.pop(inode)
        return entry

    def _document(self, inode: int) -> Document | None:
        node = self._values.node(inode & _NID_MASK) if inode >> TREE_SHIFT == _VALUES else None
        return node if isinstance(node, Document) else None

    async def _complete(self, inode: int) -> pyfuse3.EntryAttributes:
        """Give attributes, the size of a document made for it if need be."""
        document = self._document(inode)
        if document is not None and document.size is None:
            await document.content.get()
        return self._attr(inode)

    async def _entered(self, inode: int) -> int:
        """Give the root of the tree that is joined at a directory, opened if need be; else the directory."""
        found = self._values.joined.get(inode & _NID_MASK) if inode >> TREE_SHIFT == _VALUES else None
        if found is None:
            return inode
        place, tree = found
        number = _VALUES + 1 + place
        if number not in self._served:
            self._served[number] = await tree.get()
        return number << TREE_SHIFT | ROOT_NID

    @answering
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """LOOKUP."""
        if len(name) > NAME_MAX:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        if parent_inode == pyfuse3.ROOT_INODE and name == VIEWS:
            return self._attr(_VIEWS_INODE)
        view, nid, base = self._at(await self._entered(parent_inode))
        found = view.lookup(nid, name)
        return self._missing if found is None else await self._complete(base | found)

    @answering
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        return await self._complete(inode)

    @answering
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """OPENDIR: the handle is the inode number, of a joined tree's root that in the tree."""
        return pyfuse3.FileHandleT(await self._entered(inode))

    @answering
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """READDIRPLUS; of the root without `VIEWS`, or with it."""
        view, nid, base = self._at(fh)
        is_root = fh == pyfuse3.ROOT_INODE
        attr, reply = self._attr, pyfuse3.readdir_reply
        if start_id < _BEHIND:
            for name, child, _, following in view.readdir(nid, start_id):
                if is_root and name == VIEWS:
                    continue
                if not reply(token, pyfuse3.FileNameT(name), attr(base | child), following):
                    return
            if is_root and self._visible:
                reply(token, pyfuse3.FileNameT(VIEWS), attr(_VIEWS_INODE), _BEHIND)

    @answering
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        """GETXATTR."""
        view, nid, _ = self._at(inode)
        if name.startswith(PROVENANCE):
            value = await self._provenance.value(view, nid, name)
        else:
            value = view.xattrs(nid).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @answering
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        """LISTXATTR."""
        view, nid, _ = self._at(inode)
        own = [name for name in view.xattrs(nid) if not name.startswith(PROVENANCE)]
        return [pyfuse3.XAttrNameT(name) for name in (*own, *self._provenance.names(view, nid))]
