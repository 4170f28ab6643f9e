"""Writing a merged tree as an EROFS image.

Two passes, both linear in the number of inodes and neither recursive. The first, in `Encoder`'s constructor, gives every
inode its place and refuses what the format cannot hold, before anything is written. The second, `Encoder.write`, streams
the image out from front to back, seeking nowhere.

The order of things in the metadata area. Directories are taken in depth-first order; when a directory's turn comes, first
the blocks of its entries are placed (those that do not fit behind its inode), then the inodes of all its children that
have no place yet, in the order of their names. So whoever lists a directory and looks at each entry, then descends, as
find(1) does, reads the image from front to back.

Not here: how data is cut into chunks (`ocifs.erofs.chunks`), reading (`ocifs.erofs.reader`), the file around the image
(`ocifs.image_tree`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import islice
from typing import BinaryIO, Final, NamedTuple

from ocifs.erofs.chunks import MAX_CHUNK_BITS, Chunked, Chunker, one_chunk
from ocifs.erofs.directories import Directory, join, place_tail, refuse
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
    MAX_DEVICES,
    ROOT_NID,
    SLOT_BITS,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SYMLINK_MAX,
    UNMAPPED_BLOCK,
    XATTR_HEADER_SIZE,
    crc32c,
    encode_rdev,
)
from ocifs.erofs.xattrs import xattr_body
from ocifs.errors import UnsupportedError
from ocifs.tree import Kind, Node

_SIMPLE_FILE: Final = struct.Struct(INODE.format + CHUNK_INDEX.format[1:] + "24x")
"""Inode and chunk index of an ordinary file, padded to a whole number of slots: 96 bytes."""
_MAX_TIME: Final = (1 << 63) - 1
"""The last second that the kernel's 64-bit signed time can hold; later ones become it, as on any file system."""
_FLUSH_SIZE: Final = 1 << 20
_ZEROS: Final = bytes(BLOCK_SIZE)
_NO_XATTRS: Final = b""


class LeftOut(NamedTuple):
    """An extended attribute that EROFS cannot hold: of which path, in which layer's node, and why in words."""

    path: bytes
    layer: int
    message: str


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
        self._chunker = Chunker([size for _, size in layers])
        self.synthetic = self._chunker.synthetic
        """What the synthetic device is made of, in order; between them are zeros."""
        self.left_out: list[LeftOut] = []
        self.longest_name = 0
        self.any_xattr = False
        self._simple_data = 0
        self._extra_links: dict[Node, int] = {}
        self._chunked: dict[Node, Chunked] = {}
        self._xattrs: dict[tuple[tuple[bytes, bytes], ...], tuple[bytes, list[str]]] = {}
        self._directories: list[Directory] = []
        self._directory_of: dict[Node, Directory] = {}
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
    def data_size(self) -> int:
        """Bytes of content that the files have in layers, each inode once, holes not counted."""
        return self._simple_data + self._chunker.data_size

    @property
    def device_count(self) -> int:
        """Devices beside the image itself: one a layer, and one more if there is a synthetic device."""
        return len(self._layers) + bool(self._chunker.blocks)

    @property
    def synthetic_size(self) -> int:
        """Bytes of the synthetic device; 0 if there is none."""
        return self._chunker.blocks * BLOCK_SIZE

    # ---- first pass

    def _place_everything(self, root: Node) -> None:
        # The synthetic device may turn out to be needed only at the end; its slot is reserved so that places do not move.
        table_end = (DEVICE_TABLE_SLOT + len(self._layers) + 1) * DEVICE_SLOT.size
        self._meta_block = -(-table_end // BLOCK_SIZE)
        base = self._meta_block * BLOCK_SIZE
        top = Directory(root, None, b"")
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

    def _place_children(self, directory: Directory, base: int, position: int) -> tuple[int, list[Directory]]:
        """Place a directory's blocks and its children's inodes; return the next free position and the subdirectories."""
        outside = directory.blocks - bool(directory.tail)
        if outside:
            position = -(-position // BLOCK_SIZE) * BLOCK_SIZE
            directory.start = position
            position += outside * BLOCK_SIZE
        subdirs: list[Directory] = []
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
                        and 0 < size <= BLOCK_SIZE << MAX_CHUNK_BITS
                        and 0 < extent.layer <= len(self._layers)
                        and extent.layer_offset + size <= self._layers[extent.layer - 1][1]
                        and not node.unreadable
                    ):
                        nids[node] = position - base >> SLOT_BITS
                        self._simple_data += size
                        position += _SIMPLE_FILE.size
                        continue
                end = position + INODE_SIZE + len(self._encode_xattrs(node, directory, name))
                end = self._place_file(node, directory, name, end)
            elif kind is Kind.DIR:
                subdir = Directory(node, directory, name)
                self._directory_of[node] = subdir
                directory.subdirs += 1
                subdirs.append(subdir)
                header = INODE_SIZE + len(self._encode_xattrs(node, directory, name))
                if subdir.tail:
                    position = place_tail(subdir, position, header)
                end = position + header + subdir.tail
                subdir.nid = position - base >> SLOT_BITS
            else:
                header = INODE_SIZE + len(self._encode_xattrs(node, directory, name))
                end = position + header
                if kind is Kind.SYMLINK:
                    position, end = _place_symlink(node, directory, name, position, header)
                elif kind is not Kind.FIFO and not (0 <= node.rdev[0] < 1 << 12 and 0 <= node.rdev[1] < 1 << 20):
                    refuse(
                        directory, name, f"device number {node.rdev[0]}:{node.rdev[1]} is out of range (4095:1048575)"
                    )
            nids[node] = position - base >> SLOT_BITS
            position = end + 31 & ~31
        directory.new_children = len(nids) - before
        self.longest_name = max(self.longest_name, longest)
        return position, subdirs

    def _place_file(self, node: Node, directory: Directory, name: bytes, end: int) -> int:
        """Lay out a file that is not simply one chunk behind an inode without attributes; return where it ends."""
        if not node.size:
            return end
        chunked = self._chunker.chunk(node, directory, name)
        self._chunked[node] = chunked
        return (end + 7 & ~7) + len(chunked.indexes)

    def _encode_xattrs(self, node: Node, directory: Directory | None, name: bytes) -> bytes:
        """The attributes as they lie behind an inode. What EROFS cannot hold is noted in `left_out`, the first time."""
        if not node.xattrs:
            return _NO_XATTRS
        known = self._xattrs.get(node.xattrs)
        if known is None:
            known = self._xattrs[node.xattrs] = xattr_body(node.xattrs)
            self.any_xattr = self.any_xattr or bool(known[0])
        body, problems = known
        if problems:
            path = join(directory, name) if directory else b"/"
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
        if self._chunker.blocks:
            devices.append((b"synthetic", self._chunker.blocks))
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
                chunks = self._chunked.get(node) or one_chunk(node)
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

    def _encode_known_xattrs(self, node: Node) -> bytes:
        return self._xattrs[node.xattrs][0] if node.xattrs else _NO_XATTRS

    def _entries(self, directory: Directory, first: int, end: int) -> bytes:
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


def _place_symlink(node: Node, directory: Directory, name: bytes, position: int, header: int) -> tuple[int, int]:
    """Where a symlink's inode goes, and where it ends with its target."""
    size = len(node.target)
    if not 0 < size <= SYMLINK_MAX:
        refuse(directory, name, f"a symbolic link's target has 1 to {SYMLINK_MAX} bytes, not {size}")
    if b"\0" in node.target:
        refuse(directory, name, "a symbolic link's target cannot hold a NUL byte")
    if _fits_inline(size, header - INODE_SIZE):
        # Kernels before 6.12 want inode, attributes and target in one block.
        if position % BLOCK_SIZE + header + size > BLOCK_SIZE:
            position = -(-position // BLOCK_SIZE) * BLOCK_SIZE
        return position, position + header + size
    return position, -(-(position + header) // BLOCK_SIZE) * BLOCK_SIZE + -(-size // BLOCK_SIZE) * BLOCK_SIZE


def _fits_inline(target_size: int, xattrs_size: int) -> bool:
    return INODE_SIZE + xattrs_size + target_size <= BLOCK_SIZE
