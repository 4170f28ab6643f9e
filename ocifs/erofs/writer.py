"""Writing a merged tree as an EROFS image.

Two passes, both linear in the number of inodes and neither recursive. The first, in `Encoder`'s constructor, gives every
inode its place and refuses what the format cannot hold, before anything is written. The second, `Encoder.write`, streams
the image out from front to back, seeking nowhere.

The order of things in the metadata area. Directories are taken in depth-first order; when a directory's turn comes, first
the blocks of its entries are placed (those that do not fit behind its inode), then the inodes of all its children that
have no place yet, in the order of their names. So whoever lists a directory and looks at each entry, then descends, as
find(1) does, reads the image from front to back.

The synthetic device is made of whole chunks: a chunk that holds any data of a sparse file gets the next free range of the
device, a chunk without data is a hole. Neighbouring chunks of one file are therefore neighbours on the device too, and an
extent of the file is one extent of the device. A chunk is as small as the bound on their number allows (4 KiB or more), so
that a map with a few segments over many TiB costs a few KiB of index.

Not here: reading (`ocifs.erofs.reader`), the file around the image (`ocifs.image_tree`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import islice
from typing import BinaryIO, Final, NamedTuple, NoReturn

from ocifs.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_INDEX,
    CHUNK_INDEXES,
    DEVICE_SLOT,
    DEVICE_TABLE_SLOT,
    DIRENT_SIZE,
    DIRENTS,
    FEATURE_COMPAT_MTIME,
    FEATURE_COMPAT_SB_CHKSUM,
    FEATURE_INCOMPAT_CHUNKED_FILE,
    FEATURE_INCOMPAT_DEVICE_TABLE,
    FILE_TYPES,
    FORMAT_CHUNKED,
    FORMAT_INLINE,
    FORMAT_PLAIN,
    INODE,
    INODE_SIZE,
    MAX_BLOCKS,
    MAX_CHUNKS,
    MAX_DEVICES,
    NAME_MAX,
    NULL_BLOCK,
    ROOT_NID,
    SLOT_BITS,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SYMLINK_MAX,
    UNMAPPED_BLOCK,
    UNREACHABLE_BLOCK,
    XATTR_ENTRY,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
    XATTR_WHOLE_NAMES,
    crc32c,
    encode_rdev,
)
from ocifs.errors import DamagedError, UnsupportedError
from ocifs.tree import Extent, Kind, Node

_SIMPLE_FILE: Final = struct.Struct(INODE.format + CHUNK_INDEX.format[1:] + "24x")
"""Inode and chunk index of an ordinary file, padded to a whole number of slots: 96 bytes."""
_MAX_TIME: Final = (1 << 63) - 1
"""The last second that the kernel's 64-bit signed time can hold; later ones become it, as on any file system."""
_MAX_CHUNK_BITS: Final = 31
"""A chunk index counts in 5 bits: up to 2^31 blocks, 1 TiB, in a chunk."""
_SMALLEST_SPARSE_CHUNK_BITS: Final = 3
"""4 KiB, a page."""
_USUAL_CHUNKS: Final = 1024
"""Up to so many chunks, or four for each extent if that is more, a sparse file gets chunks as small as possible."""
_MAX_ODD_CHUNKS: Final = 1 << 22
"""Chunks that all files of the tree may have beyond that rule; only files of more than 1 PiB need them. 32 MiB of index."""
_FLUSH_SIZE: Final = 1 << 20
_ZEROS: Final = bytes(BLOCK_SIZE)
_NO_XATTRS: Final = b""


class SyntheticExtent(NamedTuple):
    """``size`` bytes at ``synthetic_offset`` of the synthetic device lie at ``layer_offset`` of ``layer``'s tar."""

    synthetic_offset: int
    layer: int
    layer_offset: int
    size: int


class LeftOut(NamedTuple):
    """An extended attribute that EROFS cannot hold: of which path, in which layer's node, and why in words."""

    path: bytes
    layer: int
    message: str


class _Directory:
    """A directory between the passes: its entries in order, where its blocks begin, where they are."""

    __slots__ = (
        "blocks",
        "breaks",
        "name",
        "names",
        "new_children",
        "nid",
        "node",
        "parent",
        "size",
        "start",
        "subdirs",
        "tail",
    )

    def __init__(self, node: Node, parent: _Directory | None, name: bytes) -> None:
        self.node = node
        self.parent = parent
        self.name = name
        self.nid = 0
        self.new_children = 0
        self.subdirs = 0
        self.start = 0
        children = node.children or {}
        self.names = sorted([*children, b".", b".."])
        lengths = list(map(len, self.names))
        joined = b"".join(self.names)
        if (
            max(lengths) > NAME_MAX
            or not min(lengths)
            or len(children) + 2 != len(set(self.names))
            or (b"/" in joined or b"\0" in joined)
        ):
            raise ValueError(
                f"a name must be 1 to {NAME_MAX} bytes without / and NUL, and not . or ..: below {self.path()!r}"
            )
        self.breaks = [0]
        used = DIRENT_SIZE * len(lengths) + sum(lengths)
        if used > BLOCK_SIZE:
            used = 0
            for index, length in enumerate(lengths):
                used += DIRENT_SIZE + length
                if used > BLOCK_SIZE:
                    self.breaks.append(index)
                    used = DIRENT_SIZE + length
        self.blocks = len(self.breaks)
        self.size = (self.blocks - 1) * BLOCK_SIZE + used
        self.tail = used if used < BLOCK_SIZE else 0
        """Bytes of the last block that go behind the inode; 0 if they go to a block like the others."""

    def path(self) -> bytes:
        """The directory's path within the tree, for messages."""
        parts: list[bytes] = []
        directory: _Directory | None = self
        while directory is not None and directory.parent is not None:
            parts.append(directory.name)
            directory = directory.parent
        return b"/" + b"/".join(reversed(parts))


class _Chunked(NamedTuple):
    """Chunk format and chunk indexes of a file that is not simply one chunk."""

    format: int
    indexes: bytes


class Encoder:
    """The EROFS image of the tree below ``root``.

    ``layers`` are (tag, size) of each layer's uncompressed tar in order: ``tag`` names it in the device table (its first
    64 bytes; the hex of its digest), ``size`` is in bytes. ``uuid`` (16 bytes) and ``volume_name`` (up to 15) go to the
    superblock. The same arguments make the same bytes.

    Raises `UnsupportedError` for what the format cannot hold (a layer of 2 TiB or more, over 65,534 layers, a symbolic
    link to nothing or of over 4095 bytes, a device number or owner out of range, a sparse file that needs over 2^20
    chunks) and `DamagedError` for extents that overlap, leave their file or leave their layer; each names the path.
    """

    def __init__(self, root: Node, *, layers: Sequence[tuple[str, int]], uuid: bytes, volume_name: bytes = b"") -> None:
        if root.kind is not Kind.DIR or len(uuid) != 16 or len(volume_name) > 15:
            raise ValueError("the root must be a directory, the UUID 16 bytes and the volume name up to 15")
        if len(layers) >= MAX_DEVICES:
            raise UnsupportedError(
                f"the image has {len(layers)} layers; an image tree can name up to {MAX_DEVICES - 1}"
            )
        self._layers = [(tag, size, -(-size // BLOCK_SIZE)) for tag, size in layers]
        for number, (_, size, blocks) in enumerate(self._layers, 1):
            if blocks > MAX_BLOCKS:
                raise UnsupportedError(
                    f"layer {number} has {size} bytes uncompressed; an image tree can address less than 2 TiB of it"
                )
        self._uuid = uuid
        self._volume_name = volume_name
        self.placed: dict[Node, int] = {}
        """The nid of every node, by rising nid."""
        self.synthetic: list[SyntheticExtent] = []
        """What the synthetic device is made of, in order; between them are zeros."""
        self.left_out: list[LeftOut] = []
        self.longest_name = 0
        self.any_xattr = False
        self.data_size = 0
        """Bytes of content that the files have in layers, each inode once, holes not counted."""
        self._synthetic_blocks = 0
        self._odd_chunks = 0
        self._extra_links: dict[Node, int] = {}
        self._chunked: dict[Node, _Chunked] = {}
        self._xattrs: dict[tuple[tuple[bytes, bytes], ...], tuple[bytes, list[str]]] = {}
        self._directories: list[_Directory] = []
        self._directory_of: dict[Node, _Directory] = {}
        self._place_everything(root)

    # ---- what the caller learns

    @property
    def size(self) -> int:
        """Bytes of the image, a multiple of the block size."""
        return self._blocks * BLOCK_SIZE

    @property
    def inode_count(self) -> int:
        """Inodes, the root included, a file with several names once."""
        return len(self.placed)

    @property
    def device_count(self) -> int:
        """Devices beside the image itself: one a layer, and one more if there is a synthetic device."""
        return len(self._layers) + bool(self._synthetic_blocks)

    @property
    def synthetic_size(self) -> int:
        """Bytes of the synthetic device; 0 if there is none."""
        return self._synthetic_blocks * BLOCK_SIZE

    # ---- first pass

    def _place_everything(self, root: Node) -> None:
        # The synthetic device may turn out to be needed only at the end; its slot is reserved so that places do not move.
        table_end = (DEVICE_TABLE_SLOT + len(self._layers) + 1) * DEVICE_SLOT.size
        self._meta_block = -(-table_end // BLOCK_SIZE)
        base = self._meta_block * BLOCK_SIZE
        top = _Directory(root, None, b"")
        top.nid = ROOT_NID
        self._directory_of[root] = top
        self.placed[root] = ROOT_NID
        position = base + (ROOT_NID << SLOT_BITS)
        header = INODE_SIZE + len(self._encode_xattrs(root, None, b""))
        if (position + header) % BLOCK_SIZE + top.tail > BLOCK_SIZE:
            top.tail = 0  # the root's place is fixed: what does not fit behind it must go elsewhere
        position = -(-(position + header + top.tail) // 32) * 32
        stack = [top]
        while stack:
            directory = stack.pop()
            self._directories.append(directory)
            position, subdirs = self._place_children(directory, base, position)
            stack.extend(reversed(subdirs))
        self._blocks = -(-position // BLOCK_SIZE)
        if self._blocks > MAX_BLOCKS:
            raise UnsupportedError(f"the image tree would have {position} bytes; it can have less than 2 TiB")

    def _place_children(self, directory: _Directory, base: int, position: int) -> tuple[int, list[_Directory]]:
        """Place a directory's blocks and its children's inodes; return the next free position and the subdirectories."""
        outside = directory.blocks - bool(directory.tail)
        if outside:
            position = -(-position // BLOCK_SIZE) * BLOCK_SIZE
            directory.start = position
            position += outside * BLOCK_SIZE
        subdirs: list[_Directory] = []
        nids = self.placed
        file_kind = Kind.FILE
        children = directory.node.children
        if not children:
            return position, subdirs
        before = len(nids)
        longest = 0
        for name in directory.names:
            node = children.get(name)
            if node is None:
                continue  # . and ..
            longest = max(longest, len(name))
            kind = node.kind
            if node in nids:
                if kind is Kind.DIR:
                    raise ValueError(f"a directory has two names, one is {name!r} below {directory.path()!r}")
                self._extra_links[node] = self._extra_links.get(node, 0) + 1
                continue
            if kind is file_kind:
                extents = node.extents
                if len(extents) == 1 and not node.xattrs:
                    extent = extents[0]
                    size = node.size
                    if (
                        extent.size == size
                        and not extent.file_offset
                        and not extent.layer_offset & 511
                        and 0 < size <= BLOCK_SIZE << _MAX_CHUNK_BITS
                        and 0 < extent.layer <= len(self._layers)
                        and extent.layer_offset + size <= self._layers[extent.layer - 1][1]
                        and not node.unreadable
                    ):
                        nids[node] = position - base >> SLOT_BITS
                        self.data_size += size
                        position += _SIMPLE_FILE.size
                        continue
                end = position + INODE_SIZE + len(self._encode_xattrs(node, directory, name))
                end = self._place_file(node, directory, name, end)
            elif kind is Kind.DIR:
                subdir = _Directory(node, directory, name)
                self._directory_of[node] = subdir
                directory.subdirs += 1
                subdirs.append(subdir)
                header = INODE_SIZE + len(self._encode_xattrs(node, directory, name))
                if subdir.tail:
                    position = _place_tail(subdir, position, header)
                end = position + header + subdir.tail
                subdir.nid = position - base >> SLOT_BITS
            else:
                header = INODE_SIZE + len(self._encode_xattrs(node, directory, name))
                end = position + header
                if kind is Kind.SYMLINK:
                    position, end = _place_symlink(node, directory, name, position, header)
                elif kind is not Kind.FIFO and not (0 <= node.rdev[0] < 1 << 12 and 0 <= node.rdev[1] < 1 << 20):
                    _refuse(
                        directory, name, f"device number {node.rdev[0]}:{node.rdev[1]} is out of range (4095:1048575)"
                    )
            nids[node] = position - base >> SLOT_BITS
            position = end + 31 & ~31
        directory.new_children = len(nids) - before
        self.longest_name = max(self.longest_name, longest)
        return position, subdirs

    def _place_file(self, node: Node, directory: _Directory, name: bytes, end: int) -> int:
        """Lay out a file that is not simply one chunk behind an inode without attributes; return where it ends."""
        if not node.size:
            return end
        chunked = self._chunk(node, directory, name)
        self._chunked[node] = chunked
        return (end + 7 & ~7) + len(chunked.indexes)

    def _chunk(self, node: Node, directory: _Directory, name: bytes) -> _Chunked:
        size = node.size
        if size >= 1 << 63:
            _refuse(directory, name, f"a file of {size} bytes is larger than the kernel can handle")
        if node.unreadable:
            bits = _chunk_bits(size, 0, MAX_CHUNKS)
            return _Chunked(CHUNK_INDEXES | bits, CHUNK_INDEX.pack(0, 1, UNREACHABLE_BLOCK) * _chunks(size, bits))
        extents = _joined(node.extents)
        end = 0
        for extent in extents:
            if extent.file_offset < end or extent.file_offset + extent.size > size:
                _damaged(
                    directory,
                    name,
                    f"the data at {extent.file_offset} overlaps other data or lies behind the file's end",
                )
            end = extent.file_offset + extent.size
            if not 0 < extent.layer <= len(self._layers):
                raise ValueError(f"an extent names layer {extent.layer}, the tree has {len(self._layers)} layers")
            layer_size = self._layers[extent.layer - 1][1]
            if extent.layer_offset + extent.size > layer_size:
                _damaged(
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
            return _Chunked(CHUNK_INDEXES | bits, b"".join(indexes))
        return self._chunk_sparse(node, extents, directory, name)

    def _chunk_sparse(self, node: Node, extents: list[Extent], directory: _Directory, name: bytes) -> _Chunked:
        size = node.size
        usual = max(_USUAL_CHUNKS, 4 * len(extents)) if extents else 1
        bits = _chunk_bits(size, _SMALLEST_SPARSE_CHUNK_BITS, min(usual, MAX_CHUNKS))
        count = _chunks(size, bits)
        self._odd_chunks += max(0, count - usual)
        if count > MAX_CHUNKS or self._odd_chunks > _MAX_ODD_CHUNKS:
            _refuse(
                directory,
                name,
                f"a sparse file of {size} bytes needs more chunks ({count}) than an image tree can hold",
            )
        shift = bits + BLOCK_BITS
        device = len(self._layers) + 1
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
                run_chunk, run_block = first, self._synthetic_blocks
                placed = first
            for chunk in range(placed, last + 1):
                pieces.append(CHUNK_INDEX.pack(0, device, self._synthetic_blocks))
                self._synthetic_blocks += -(-min(1 << shift, size - (chunk << shift)) // BLOCK_SIZE)
                if self._synthetic_blocks > MAX_BLOCKS:
                    _refuse(directory, name, "the sparse files of the image need more than 2 TiB of address space")
            placed = last + 1
            offset = run_block * BLOCK_SIZE + extent.file_offset - (run_chunk << shift)
            self.synthetic.append(SyntheticExtent(offset, extent.layer, extent.layer_offset, extent.size))
        pieces.append(hole * (count - placed))
        return _Chunked(CHUNK_INDEXES | bits, b"".join(pieces))

    def _encode_xattrs(self, node: Node, directory: _Directory | None, name: bytes) -> bytes:
        """The attributes as they lie behind an inode. What EROFS cannot hold is noted in `left_out`, the first time."""
        if not node.xattrs:
            return _NO_XATTRS
        known = self._xattrs.get(node.xattrs)
        if known is None:
            known = self._xattrs[node.xattrs] = _xattr_body(node.xattrs)
            self.any_xattr = self.any_xattr or bool(known[0])
        body, problems = known
        if problems:
            path = _join(directory, name) if directory else b"/"
            self.left_out.extend(LeftOut(path, node.origin.layer, problem) for problem in problems)
        return body

    # ---- second pass

    def write(self, out: BinaryIO) -> None:
        """Write the image to ``out``, front to back, in pieces of about 1 MiB."""
        writer = _Pieces(out)
        writer.extend(self._head())
        base = self._meta_block * BLOCK_SIZE
        items = iter(self.placed.items())
        root, root_nid = next(items)
        writer.pad_to(base + (root_nid << SLOT_BITS))
        writer.extend(self._inode(root, root_nid))
        chunked = self._chunked
        links = self._extra_links
        pack_simple = _SIMPLE_FILE.pack
        file_kind = Kind.FILE
        for directory in self._directories:
            outside = directory.blocks - bool(directory.tail)
            if outside:
                writer.pad_to(directory.start)
                writer.extend(self._entries(directory, 0, outside))
            for node, nid in islice(items, directory.new_children):
                writer.pad_to(base + (nid << SLOT_BITS))
                if node.kind is file_kind and node.size and not node.xattrs and node not in chunked:
                    extent = node.extents[0]
                    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
                    try:
                        packed = pack_simple(
                            FORMAT_CHUNKED, 0, 0o100000 | node.mode, 0, node.size,
                            CHUNK_INDEXES | max(0, (node.size - 1 >> BLOCK_BITS).bit_length()), nid & 0xFFFFFFFF,
                            node.uid, node.gid, min(_MAX_TIME, seconds), nanoseconds,
                            1 + links.get(node, 0),
                            0, extent.layer, extent.layer_offset >> BLOCK_BITS,
                        )  # fmt: skip
                    except struct.error:
                        packed = self._inode(node, nid)
                else:
                    packed = self._inode(node, nid)
                writer.extend(packed)
        writer.pad_to(self.size)
        writer.flush()

    def _head(self) -> bytes:
        """Everything before the metadata area: an empty boot sector, the superblock and the device table."""
        devices = [(tag.encode("ascii", "replace"), blocks) for tag, _, blocks in self._layers]
        if self._synthetic_blocks:
            devices.append((b"synthetic", self._synthetic_blocks))
        fields = [
            SUPER_MAGIC, 0, FEATURE_COMPAT_SB_CHKSUM | FEATURE_COMPAT_MTIME, BLOCK_BITS, 0, ROOT_NID, len(self.placed),
            0, 0, self._blocks, self._meta_block, 0, self._uuid, self._volume_name,
            FEATURE_INCOMPAT_CHUNKED_FILE | (FEATURE_INCOMPAT_DEVICE_TABLE if devices else 0),
            0, len(devices), DEVICE_TABLE_SLOT if devices else 0, 0, 0, 0, 0, 0,
        ]  # fmt: skip
        table = b"".join(DEVICE_SLOT.pack(tag[:64], blocks, UNMAPPED_BLOCK) for tag, blocks in devices)
        body = (SUPER.pack(*fields) + table).ljust(BLOCK_SIZE, b"\0")
        # The kernel sums one block from the superblock on, its checksum field being zero: at 512 bytes a block that
        # takes in the first three device slots, and what follows them if there are fewer.
        body += bytes(max(0, self._meta_block * BLOCK_SIZE - SUPER_OFFSET - len(body)))
        fields[1] = crc32c(body[:BLOCK_SIZE])
        return bytes(SUPER_OFFSET) + SUPER.pack(*fields) + body[SUPER.size :]

    def _inode(self, node: Node, nid: int) -> bytes:
        """An inode with all that lies behind it: attributes, chunk indexes, inline data, blocks of a long symlink."""
        xattrs = self._encode_known_xattrs(node)
        kind = node.kind
        inode_format, union, size, links, rest = FORMAT_PLAIN, 0, 0, 1 + self._extra_links.get(node, 0), b""
        if kind is Kind.FILE:
            size = node.size
            if size:
                chunks = self._chunked.get(node) or self._one_chunk(node)
                inode_format, union = FORMAT_CHUNKED, chunks.format
                rest = bytes(-len(xattrs) % 8) + chunks.indexes
        elif kind is Kind.DIR:
            directory = self._directory_of[node]
            size, links, union = directory.size, 2 + directory.subdirs, directory.start // BLOCK_SIZE
            if directory.tail:
                inode_format = FORMAT_INLINE
                rest = self._entries(directory, directory.blocks - 1, directory.blocks)[: directory.tail]
        elif kind is Kind.SYMLINK:
            size = len(node.target)
            if _fits_inline(size, len(xattrs)):
                inode_format, rest = FORMAT_INLINE, node.target
            else:
                position = self._meta_block * BLOCK_SIZE + (nid << SLOT_BITS) + INODE_SIZE + len(xattrs)
                start = -(-position // BLOCK_SIZE)
                union = start
                rest = bytes(start * BLOCK_SIZE - position) + node.target
        elif kind is Kind.CHAR or kind is Kind.BLOCK:
            union = encode_rdev(*node.rdev)
        seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
        try:
            packed = INODE.pack(
                inode_format, (len(xattrs) - XATTR_HEADER_SIZE) // 4 + 1 if xattrs else 0, kind << 12 | node.mode, 0, size,
                union, nid & 0xFFFFFFFF, node.uid, node.gid, min(seconds, _MAX_TIME), nanoseconds, links,
            )  # fmt: skip
        except struct.error:
            raise UnsupportedError(
                f"entry {node.origin.entry} of layer {node.origin.layer} cannot be kept in the image tree: its owner"
                f" {node.uid}:{node.gid}, mode {node.mode:o} or time {node.mtime_ns} is out of range"
            ) from None
        return packed + xattrs + rest

    def _one_chunk(self, node: Node) -> _Chunked:
        extent = node.extents[0]
        bits = _chunk_bits(node.size, 0, 1)
        return _Chunked(CHUNK_INDEXES | bits, CHUNK_INDEX.pack(0, extent.layer, extent.layer_offset // BLOCK_SIZE))

    def _encode_known_xattrs(self, node: Node) -> bytes:
        return self._xattrs[node.xattrs][0] if node.xattrs else _NO_XATTRS

    def _entries(self, directory: _Directory, first: int, end: int) -> bytes:
        """The blocks ``first`` to ``end`` of a directory, each padded to its full size."""
        nids = self.placed
        children = directory.node.children or {}
        own = (directory.nid, directory.parent.nid if directory.parent else directory.nid)
        blocks: list[bytes] = []
        breaks = directory.breaks
        for number in range(first, end):
            names = directory.names[breaks[number] : breaks[number + 1] if number + 1 < len(breaks) else None]
            fields: list[int] = []
            offset = DIRENT_SIZE * len(names)
            for name in names:
                node = children.get(name)
                if node is None:
                    fields += (own[len(name) - 1], offset, 2)
                else:
                    fields += (nids[node], offset, FILE_TYPES[node.kind])
                offset += len(name)
            block = DIRENTS[len(names)].pack(*fields) + b"".join(names)
            blocks.append(block if offset == BLOCK_SIZE else block + bytes(BLOCK_SIZE - offset))
        return b"".join(blocks)


class _Pieces:
    """Collects bytes and hands them on in large pieces, knowing how far it has come."""

    __slots__ = ("_buffer", "_flushed", "_out")

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._buffer = bytearray()
        self._flushed = 0

    def extend(self, data: bytes) -> None:
        self._buffer += data

    def pad_to(self, position: int) -> None:
        gap = position - self._flushed - len(self._buffer)
        if gap:
            self._buffer += _ZEROS[:gap] if gap <= BLOCK_SIZE else bytes(gap)
        if len(self._buffer) >= _FLUSH_SIZE:
            self.flush()

    def flush(self) -> None:
        self._out.write(self._buffer)
        self._flushed += len(self._buffer)
        self._buffer = bytearray()


def _refuse(directory: _Directory, name: bytes, why: str) -> NoReturn:
    raise UnsupportedError(
        f"{_join(directory, name).decode(errors='backslashreplace')} cannot be kept in the image tree: {why}"
    )


def _damaged(directory: _Directory, name: bytes, why: str) -> NoReturn:
    raise DamagedError(f"{_join(directory, name).decode(errors='backslashreplace')} is damaged: {why}")


def _join(directory: _Directory, name: bytes) -> bytes:
    return directory.path().rstrip(b"/") + b"/" + name


def _place_tail(directory: _Directory, position: int, header: int) -> int:
    """Where a directory's inode goes so that its tail, ``header`` bytes behind it, lies within one block.

    Takes the first place from ``position`` on that does; if none does, the tail becomes a block (``tail`` is set to 0).
    """
    offset = (position + header) % BLOCK_SIZE
    if offset + directory.tail > BLOCK_SIZE:
        shift = BLOCK_SIZE - offset + 31 & ~31  # the inode moves by whole slots
        offset = (position + shift + header) % BLOCK_SIZE
        if offset + directory.tail > BLOCK_SIZE:
            directory.tail = 0
        else:
            position += shift
    return position


def _place_symlink(node: Node, directory: _Directory, name: bytes, position: int, header: int) -> tuple[int, int]:
    """Where a symlink's inode goes, and where it ends with its target."""
    size = len(node.target)
    if not 0 < size <= SYMLINK_MAX:
        _refuse(directory, name, f"a symbolic link's target has 1 to {SYMLINK_MAX} bytes, not {size}")
    if b"\0" in node.target:
        _refuse(directory, name, "a symbolic link's target cannot hold a NUL byte")
    if _fits_inline(size, header - INODE_SIZE):
        # Kernels before 6.12 want inode, attributes and target in one block.
        if position % BLOCK_SIZE + header + size > BLOCK_SIZE:
            position = -(-position // BLOCK_SIZE) * BLOCK_SIZE
        return position, position + header + size
    return position, -(-(position + header) // BLOCK_SIZE) * BLOCK_SIZE + -(-size // BLOCK_SIZE) * BLOCK_SIZE


def _fits_inline(target_size: int, xattrs_size: int) -> bool:
    return INODE_SIZE + xattrs_size + target_size <= BLOCK_SIZE


def _chunk_bits(size: int, least: int, limit: int) -> int:
    """The smallest log2 of blocks in a chunk, from ``least``, with which a file has at most ``limit`` chunks."""
    bits = least
    while _chunks(size, bits) > limit and bits < _MAX_CHUNK_BITS:
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


def _xattr_body(xattrs: tuple[tuple[bytes, bytes], ...]) -> tuple[bytes, list[str]]:
    """Header and entries of inline attributes (empty if none can be held), and what is wrong with those left out."""
    entries: list[bytes] = []
    problems: list[str] = []
    room = 4 * (0xFFFF - 1)  # i_xattr_icount: 16 bits, the header counting one
    for name, value in xattrs:
        index, suffix = _split_name(name)
        shown = name.decode(errors="backslashreplace")
        entry = b""
        if not index or len(name) > NAME_MAX or b"\0" in name:
            problems.append(f"the extended attribute {shown} has a name that Linux does not know")
        elif len(value) > 0xFFFF:
            problems.append(f"the extended attribute {shown} has a value of {len(value)} bytes, more than 65535")
        else:
            entry = XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
            entry += bytes(-len(entry) % 4)
            if len(entry) > room:
                problems.append(f"the extended attribute {shown} does not fit, the others take all 256 KiB there are")
                entry = b""
        room -= len(entry)
        entries.append(entry)
    body = b"".join(entries)
    return (bytes(XATTR_HEADER_SIZE) + body if body else _NO_XATTRS), problems


def _split_name(name: bytes) -> tuple[int, bytes]:
    """Prefix index and rest of an attribute's name; index 0 if EROFS has no prefix for it."""
    for index, prefix in XATTR_PREFIXES:
        if index in XATTR_WHOLE_NAMES:
            if name == prefix:
                return index, b""
        elif name.startswith(prefix) and len(name) > len(prefix):
            return index, name[len(prefix) :]
    return 0, b""
