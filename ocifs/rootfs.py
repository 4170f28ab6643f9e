"""The view of one image tree: names, attributes, links, xattrs at once; file data when it is asked for.

This is the one place that says what an image looks like as a file system. `ocifs.fuse` turns its answers into protocol
replies, the commands that read an image without mounting it call it directly.

Everything but data comes from the mapped image tree and never waits. Data is decoded span by span: `RootFS.read` is
asynchronous and decodes in threads, `RootFS.read_blocking` does the same in the calling thread. This is where the
asynchronous colour changes, once.

Concurrency contract
    A `RootFS` and its `SpanCache` belong to one thread: under trio, the event loop's; in a command, the main thread. Only
    `LayerData.decode` runs in worker threads, and it shares nothing but open files. So neither class takes a lock.
    Each span is decoded at most once at a time (single flight): who comes second waits for the first one's result or
    shares its error. A failure is not remembered: the next reader tries again.

What is served never changes, so nothing is ever invalidated.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ocifs.erofs import ROOT_NID, DirectoryEntry, Inode
from ocifs.errors import DamagedError, NotFoundError, OcifsError
from ocifs.image import Image
from ocifs.image_tree import ImageTree
from ocifs.layer_data import LayerData
from ocifs.tree import Kind

if TYPE_CHECKING:
    import trio

DEFAULT_CACHE = 128 << 20
"""Bytes of decoded spans that are kept: 128 MiB, about forty spans; a walk over a tree touches each span once."""

SYMLINK_LIMIT = 40
"""Symbolic links followed in one path before ELOOP: the kernel's MAXSYMLINKS (include/linux/namei.h)."""


class NotReadableError(OcifsError):
    """An entry that has no data to give: its hard link's target is missing (rule H6 under examination)."""


class SymlinkLoopError(OcifsError):
    """A path meets more symbolic links than `SYMLINK_LIMIT`."""

    exit_code = 3
    errno = errno.ELOOP


class NotADirectoryInImageError(NotFoundError):
    """A path goes on below something that is not a directory."""

    errno = errno.ENOTDIR


class SpanKey(NamedTuple):
    """A span of a layer: both numbers as everywhere (layers from 1, spans from 0)."""

    layer: int
    span: int


class SpanCache:
    """Decoded spans, least recently used first to go, bounded in bytes. One cache serves all layers and trees."""

    def __init__(self, limit: int = DEFAULT_CACHE) -> None:
        """Keep at most ``limit`` bytes; a span larger than that is handed out but not kept."""
        self.limit = limit
        self.size = 0
        self._spans: OrderedDict[SpanKey, bytes | memoryview] = OrderedDict()

    def get(self, key: SpanKey) -> bytes | memoryview | None:
        """The span, if it is here."""
        data = self._spans.get(key)
        if data is not None:
            self._spans.move_to_end(key)
        return data

    def put(self, key: SpanKey, data: bytes | memoryview) -> None:
        """Keep the span, making room for it."""
        if key in self._spans or len(data) > self.limit:
            return
        self._spans[key] = data
        self.size += len(data)
        while self.size > self.limit:
            _, old = self._spans.popitem(last=False)
            self.size -= len(old)


class _Flight:
    """A span being decoded, and those who wait for it."""

    def __init__(self, landed: trio.Event) -> None:
        self.landed = landed
        self.data: bytes | memoryview | None = None
        self.error: OcifsError | None = None


class _Piece(NamedTuple):
    """Part of an answer: bytes of a span, or ``size`` zeros if ``key`` is None."""

    key: SpanKey | None
    start: int
    size: int


class SpanReader:
    """Spans of all layers of an image through one cache, each decoded at most once at a time."""

    def __init__(self, layers: Sequence[LayerData], cache: SpanCache, *, threads: int = 2) -> None:
        """Read ``layers``, decoding in at most ``threads`` threads at a time."""
        self.layers = {layer.number: layer for layer in layers}
        self.cache = cache
        self.decoded_spans = 0
        self._flights: dict[SpanKey, _Flight] = {}
        self._threads = threads
        self._limiter: trio.CapacityLimiter | None = None

    def blocking(self, key: SpanKey) -> bytes | memoryview:
        """The span, decoded in this thread if need be."""
        data = self.cache.get(key)
        if data is None:
            data = self.layers[key.layer].decode(key.span)
            self.decoded_spans += 1
            self.cache.put(key, data)
        return data

    async def span(self, key: SpanKey) -> bytes | memoryview:
        """The span: from the cache, from whoever is decoding it already, or decoded in a thread."""
        data = self.cache.get(key)
        if data is not None:
            return data
        flight = self._flights.get(key)
        if flight is not None:
            await flight.landed.wait()
            if flight.error is not None:
                raise flight.error
            if flight.data is not None:
                return flight.data
            return await self.span(key)  # its reader was cancelled: try ourselves
        import trio  # noqa: PLC0415 (commands that read without mounting start 80 ms sooner)

        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(self._threads)
        flight = self._flights[key] = _Flight(trio.Event())
        try:
            data = await trio.to_thread.run_sync(self.layers[key.layer].decode, key.span, limiter=self._limiter)
            self.decoded_spans += 1
            self.cache.put(key, data)
            flight.data = data
        except OcifsError as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.landed.set()
        return data


class RootFS:
    """One image tree with its data. Inode numbers are the tree's nids; the root is `root`."""

    def __init__(self, tree: ImageTree, spans: SpanReader) -> None:
        """Serve ``tree``, whose data lies in the layers of ``spans``."""
        self.tree = tree
        self.root = ROOT_NID
        self._image = tree.image
        self._spans = spans

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
            message = "this name is a hard link to a file that no layer holds (rule H6)"
            raise NotReadableError(message)

    async def read(self, ino: int, offset: int, size: int) -> bytes | memoryview:
        """``size`` bytes of a file at ``offset``; fewer at its end. One span in the cache costs no copy and no thread."""
        parts: list[bytes | memoryview] = []
        for key, start, length in self._pieces(ino, offset, size):
            parts.append(bytes(length) if key is None else _slice(key, await self._spans.span(key), start, length))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_blocking(self, ino: int, offset: int, size: int) -> bytes | memoryview:
        """The same in the calling thread, for who runs no event loop."""
        parts: list[bytes | memoryview] = []
        for key, start, length in self._pieces(ino, offset, size):
            parts.append(bytes(length) if key is None else _slice(key, self._spans.blocking(key), start, length))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pieces(self, ino: int, offset: int, size: int) -> Iterator[_Piece]:
        """Say where the bytes of a file lie: which spans of which layers, and where there is nothing but zeros."""
        for layer, layer_offset, length in self.tree.extents(ino, offset, size):
            if layer == 0:
                yield _Piece(None, 0, length)
                continue
            got = 0
            for span, start, stop in self._spans.layers[layer].slices(layer_offset, length):
                yield _Piece(SpanKey(layer, span), start, stop - start)
                got += stop - start
            if got != length:
                message = f"the image tree points {length - got} bytes beyond the end of layer {layer}"
                raise DamagedError(message)


def view(image: Image, cache: SpanCache | None = None) -> RootFS:
    """Look at an open image, keeping decoded spans in ``cache``."""
    return RootFS(image.tree, SpanReader([layer.data for layer in image.layers], cache or SpanCache()))


def _slice(key: SpanKey, data: bytes | memoryview, start: int, length: int) -> memoryview:
    if len(data) < start + length:
        message = f"span {key.span} of layer {key.layer} decoded to {len(data)} bytes; {start + length} were expected"
        raise DamagedError(message)
    return memoryview(data)[start : start + length]


def _path_message(path: bytes, what: str) -> str:
    return f"{path.decode(errors='backslashreplace')} {what}"
