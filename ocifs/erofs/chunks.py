"""Files' data as chunks of layers, or of the synthetic device.

The synthetic device is made of whole chunks: a chunk that holds any data of a sparse file gets the next free range of the
device, a chunk without data is a hole. Neighbouring chunks of one file are therefore neighbours on the device too, and an
extent of the file is one extent of the device. A chunk is as small as the bound on their number allows (4 KiB or more), so
that a map with a few segments over many TiB costs a few KiB of index.

Not here: where an inode with its chunk indexes lies (`ocifs.erofs.writer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ocifs.erofs.directories import Directory, damaged, refuse
from ocifs.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_INDEX,
    CHUNK_INDEXES,
    MAX_BLOCKS,
    MAX_CHUNKS,
    NULL_BLOCK,
    UNREACHABLE_BLOCK,
)
from ocifs.tree import Extent, Node

MAX_CHUNK_BITS: Final = 31
"""A chunk index counts in 5 bits: up to 2^31 blocks, 1 TiB, in a chunk."""
_SMALLEST_SPARSE_CHUNK_BITS: Final = 3
"""4 KiB, a page."""
_USUAL_CHUNKS: Final = 1024
"""Up to so many chunks, or four for each extent if that is more, a sparse file gets chunks as small as possible."""
_MAX_ODD_CHUNKS: Final = 1 << 22
"""Chunks that all files of the tree may have beyond that rule; only files of more than 1 PiB need them. 32 MiB of index."""


class SyntheticExtent(NamedTuple):
    """``size`` bytes at ``synthetic_offset`` of the synthetic device lie at ``layer_offset`` of ``layer``'s tar."""

    synthetic_offset: int
    layer: int
    layer_offset: int
    size: int


class Chunked(NamedTuple):
    """Chunk format and chunk indexes of a file that is not simply one chunk."""

    format: int
    indexes: bytes


class Chunker:
    """Cuts files into chunks, and lays out the synthetic device as it goes: files in another order get other places."""

    def __init__(self, layer_sizes: Sequence[int]) -> None:
        self._layer_sizes = layer_sizes
        self._odd_chunks = 0
        self.synthetic: list[SyntheticExtent] = []
        """What the synthetic device is made of, in order; between them are zeros."""
        self.blocks = 0
        """Of the synthetic device."""
        self.data_size = 0
        """Bytes of content in layers, of the files that were cut."""

    def chunk(self, node: Node, directory: Directory, name: bytes) -> Chunked:
        """Cut a file with data or holes; ``directory`` and ``name`` are for messages. Errors as `Encoder` says."""
        size = node.size
        if size >= 1 << 63:
            refuse(directory, name, f"a file of {size} bytes is larger than the kernel can handle")
        if node.unreadable:
            bits = _chunk_bits(size, 0, MAX_CHUNKS)
            return Chunked(CHUNK_INDEXES | bits, CHUNK_INDEX.pack(0, 1, UNREACHABLE_BLOCK) * _chunks(size, bits))
        extents = _joined(node.extents)
        end = 0
        for extent in extents:
            if extent.file_offset < end or extent.file_offset + extent.size > size:
                damaged(
                    directory,
                    name,
                    f"the data at {extent.file_offset} overlaps other data or lies behind the file's end",
                )
            end = extent.file_offset + extent.size
            if not 0 < extent.layer <= len(self._layer_sizes):
                raise ValueError(f"an extent names layer {extent.layer}, the tree has {len(self._layer_sizes)} layers")
            layer_size = self._layer_sizes[extent.layer - 1]
            if extent.layer_offset + extent.size > layer_size:
                damaged(
                    directory,
                    name,
                    f"its data at {extent.layer_offset} of layer {extent.layer} ends behind the layer's {layer_size} bytes",
                )
            self.data_size += extent.size
        if len(extents) == 1 and extents[0].size == size and not extents[0].layer_offset % BLOCK_SIZE:
            bits = _chunk_bits(size, 0, MAX_CHUNKS)
            block = extents[0].layer_offset // BLOCK_SIZE
            indexes = (
                CHUNK_INDEX.pack(0, extents[0].layer, block + (number << bits)) for number in range(_chunks(size, bits))
            )
            return Chunked(CHUNK_INDEXES | bits, b"".join(indexes))
        return self._sparse(node, extents, directory, name)

    def _sparse(self, node: Node, extents: list[Extent], directory: Directory, name: bytes) -> Chunked:
        size = node.size
        usual = max(_USUAL_CHUNKS, 4 * len(extents)) if extents else 1
        bits = _chunk_bits(size, _SMALLEST_SPARSE_CHUNK_BITS, min(usual, MAX_CHUNKS))
        count = _chunks(size, bits)
        self._odd_chunks += max(0, count - usual)
        if count > MAX_CHUNKS or self._odd_chunks > _MAX_ODD_CHUNKS:
            refuse(
                directory,
                name,
                f"a sparse file of {size} bytes needs more chunks ({count}) than an image tree can hold",
            )
        shift = bits + BLOCK_BITS
        device = len(self._layer_sizes) + 1
        hole = CHUNK_INDEX.pack(0, 0, NULL_BLOCK)
        pieces: list[bytes] = []
        placed = 0  # chunks of which pieces has the index
        run_block = (
            0  # where on the device the chunk numbered run_chunk is; valid for the run of data chunks up to placed
        )
        run_chunk = 0
        for extent in extents:
            first, last = extent.file_offset >> shift, extent.file_offset + extent.size - 1 >> shift
            if first > placed or not placed:
                pieces.append(hole * (first - placed))
                run_chunk, run_block = first, self.blocks
                placed = first
            for chunk in range(placed, last + 1):
                pieces.append(CHUNK_INDEX.pack(0, device, self.blocks))
                self.blocks += -(-min(1 << shift, size - (chunk << shift)) // BLOCK_SIZE)
                if self.blocks > MAX_BLOCKS:
                    refuse(directory, name, "the sparse files of the image need more than 2 TiB of address space")
            placed = last + 1
            offset = run_block * BLOCK_SIZE + extent.file_offset - (run_chunk << shift)
            self.synthetic.append(SyntheticExtent(offset, extent.layer, extent.layer_offset, extent.size))
        pieces.append(hole * (count - placed))
        return Chunked(CHUNK_INDEXES | bits, b"".join(pieces))


def one_chunk(node: Node) -> Chunked:
    """A file of a single run that fits a chunk."""
    extent = node.extents[0]
    bits = _chunk_bits(node.size, 0, 1)
    return Chunked(CHUNK_INDEXES | bits, CHUNK_INDEX.pack(0, extent.layer, extent.layer_offset // BLOCK_SIZE))


def _chunk_bits(size: int, least: int, limit: int) -> int:
    """The smallest log2 of blocks in a chunk, from ``least``, with which a file has at most ``limit`` chunks."""
    bits = least
    while _chunks(size, bits) > limit and bits < MAX_CHUNK_BITS:
        bits += 1
    return bits


def _chunks(size: int, bits: int) -> int:
    return (size - 1 >> bits + BLOCK_BITS) + 1


def _joined(extents: Sequence[Extent]) -> list[Extent]:
    """The extents in the order of the file, empty ones left out, those that continue one another made one."""
    joined: list[Extent] = []
    for extent in sorted((extent for extent in extents if extent.size), key=lambda extent: extent.file_offset):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.layer == extent.layer
            and last.file_offset + last.size == extent.file_offset
            and last.layer_offset + last.size == extent.layer_offset
        ):
            joined[-1] = Extent(last.file_offset, last.layer, last.layer_offset, last.size + extent.size)
        else:
            joined.append(extent)
    return joined
