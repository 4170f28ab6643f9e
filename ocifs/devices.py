"""The files that the kernel's EROFS is mounted from: the image tree, one per layer, and one for what lies in no piece.

EROFS finds names and attributes in the tree's file and file data in *device* files: device N is the uncompressed tar of
layer N. None of these files exist; each is answered piece by piece, decoded on demand. (`ocifs.fuse` shows them to the
kernel in a private mount.)

Sizes are rounded up to whole pages, what is beyond the end reads as zeros: the kernel reads whole blocks, and some
versions treat a short read of a backing file as an error, others as zeros for ever.

Not here: what the bytes of the tree mean (`ocifs.erofs`), mounting (`ocifs.kernel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ocifs.image import Image
from ocifs.image_tree import ImageTree
from ocifs.spans import SpanReader

_PAGE = 4096


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


class DeviceFile(Protocol):
    """A read-only file whose bytes are made when they are asked for."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Give ``size`` bytes at ``offset``, all of them inside the file."""
        ...


class TreeFile:
    """The EROFS image of an image tree, each block verified when it is first read."""

    def __init__(self, tree: ImageTree) -> None:
        """Serve ``tree``'s image."""
        self._tree = tree
        self.size = _whole_pages(tree.image_size)

    async def read(self, offset: int, size: int) -> bytes:
        """Read from the mapped file; never waits."""
        data = self._tree.read_range(offset, size)
        return data if len(data) == size else data.ljust(size, b"\0")


class LayerFile:
    """The uncompressed tar of one layer."""

    def __init__(self, spans: SpanReader, layer: int) -> None:
        """Serve layer ``layer`` (from 1)."""
        self._spans = spans
        self._layer = layer
        self._end = spans.layers[layer].size
        self.size = _whole_pages(self._end)

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Decode what is needed; one span in the cache costs no copy."""
        inside = min(size, self._end - offset)
        parts = await self._spans.read(self._layer, offset, inside) if inside > 0 else []
        if len(parts) == 1 and inside == size:
            return parts[0]
        return b"".join(parts).ljust(size, b"\0")


class SyntheticFile:
    """The synthetic device: the data of files that are not one aligned run of a layer, put together as the tree says."""

    def __init__(self, tree: ImageTree, spans: SpanReader) -> None:
        """Serve ``tree``'s synthetic device, whose pieces lie in the layers of ``spans``."""
        self._tree = tree
        self._spans = spans
        self.size = _whole_pages(tree.metadata.synthetic_size)

    async def read(self, offset: int, size: int) -> bytes:
        """Put the pieces together."""
        return b"".join(await self._spans.gather(self._tree.synthetic(offset, size)))


def device_files(image: Image, spans: SpanReader) -> Sequence[DeviceFile]:
    """Give the tree's file, then its devices in the order of its device table."""
    files: list[DeviceFile] = [TreeFile(image.tree)]
    files += [LayerFile(spans, layer.number) for layer in image.layers]
    if image.tree.metadata.synthetic_size:
        files.append(SyntheticFile(image.tree, spans))
    return files
