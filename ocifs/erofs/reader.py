"""Reading an EROFS image where it lies, as ocifs writes them.

`Image` holds no more than the superblock's fields. Each call finds what it needs by arithmetic and returns values, never
views. These are the hot paths of a mount, so they are written for few steps: one ``unpack_from`` for an inode, one search
in C for a name within a block.

Two things are never trusted. *Where* things are: every offset read from the image is checked before it is used, and
whatever is wrong comes out as `DamagedError`. *What* they are, if the owner of the buffer wants it: ``unchecked`` has one
byte for each 64 KiB of the buffer, not zero as long as that block **or the one behind it** has not been verified, and
``check`` is called with the block's number before anything that starts in it is used. As nothing but attributes is longer
than 64 KiB, one look at one byte covers an object that crosses the border, and a block known to be good costs nothing more.

A damaged directory may contain itself; nothing here walks a tree, so nothing here can loop.

Not here: images that ocifs does not write (other block sizes, compact inodes, compression, shared attributes, file data in
the image itself); they are refused as damaged.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, NoReturn

import msgspec

from ocifs.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_BITS_MASK,
    CHUNK_INDEX,
    CHUNK_INDEXES,
    DEVICE_SLOT,
    DIRENT_SIZE,
    DIRENTS,
    FEATURE_COMPAT_SB_CHKSUM,
    FEATURE_INCOMPAT_CHUNKED_FILE,
    FEATURE_INCOMPAT_DEVICE_TABLE,
    FILE_TYPES,
    FORMAT_CHUNKED,
    FORMAT_INLINE,
    FORMAT_PLAIN,
    INODE,
    INODE_SIZE,
    MAX_CHUNKS,
    NAME_MAX,
    NULL_BLOCK,
    ROOT_NID,
    SLOT_BITS,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SYMLINK_MAX,
    XATTR_ENTRY,
    XATTR_HEADER_SIZE,
    XATTR_PREFIXES,
    crc32c,
    decode_rdev,
)
from ocifs.errors import DamagedError
from ocifs.tree import Kind

CHECK_BITS: Final = 16
"""``unchecked`` has a byte for each 2^16 bytes of the buffer."""

_KINDS: Final = tuple(Kind(value) if value in set(Kind) else None for value in range(16))
_KIND_OF_TYPE: Final = tuple({code: kind for kind, code in FILE_TYPES.items()}.get(code) for code in range(256))
_PREFIX_OF_INDEX: Final = dict(XATTR_PREFIXES)
_FORMATS: Final = frozenset({FORMAT_PLAIN, FORMAT_INLINE, FORMAT_CHUNKED})
_HEAD: Final = struct.Struct("<4HQI")
"""The first fields of an inode: i_format, i_xattr_icount, i_mode, i_nb, i_size, i_u."""
_FIRST_TWO: Final = struct.Struct("<8xH10xH")
"""Where a directory block's first two names start (the second only counts if there are two)."""
_NAME_OFFSETS: Final = {
    DIRENT_SIZE * count: struct.Struct("<" + "8xHxx" * count) for count in range(1, BLOCK_SIZE // DIRENT_SIZE + 1)
}
"""The name offsets of a block, by the offset of its first name (which tells how many there are)."""
_NID: Final = struct.Struct("<Q")
_NO_DEVICE: Final = (0, 0)
_DIRECTORY: Final = int(Kind.DIR)


class Inode(msgspec.Struct, frozen=True, gc=False):
    """An inode's attributes, as stat(2) tells them.

    ``ino`` is its nid; ``mode`` is all of ``st_mode``, the type included; ``size`` is in bytes, of a directory those of its
    entries; ``rdev`` is (major, minor) of CHAR and BLOCK, else (0, 0).
    """

    ino: int
    kind: Kind
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: tuple[int, int]


class DirectoryEntry(NamedTuple):
    """A name in a directory. ``next_position`` is where `Image.readdir` goes on behind it."""

    name: bytes
    nid: int
    kind: Kind
    next_position: int


class Run(NamedTuple):
    """``length`` bytes of a file, from ``device_offset`` of ``device``.

    ``device`` is a layer's number, that of the synthetic device (layers + 1), or 0 for a hole (``device_offset`` is 0 then).
    """

    device: int
    device_offset: int
    length: int


class Image:
    """An EROFS image at the start of ``buffer`` (which may hold more behind it).

    ``name`` is for messages. ``unchecked`` and ``check``: see the module. Raises `DamagedError`, here and everywhere.
    All methods are safe to call from several threads.
    """

    def __init__(
        self,
        buffer: bytes | mmap.mmap,
        *,
        name: str = "EROFS image",
        unchecked: bytes | bytearray | None = None,
        check: Callable[[int], None] | None = None,
    ) -> None:
        self._data = buffer
        self._name = name
        self._unchecked = bytes((len(buffer) >> CHECK_BITS) + 1) if unchecked is None else unchecked
        self._check = check or _check_nothing
        if len(buffer) < SUPER_OFFSET + SUPER.size:
            self._damaged(f"{len(buffer)} bytes are too few for a superblock")
        if self._unchecked[0]:
            self._check(0)
        (
            magic, checksum, compat, block_bits, slots, root_nid, inodes, _, _, blocks, meta_block, _, self.uuid,
            volume_name, incompat, _, devices, device_slot, dir_block_bits, _, _, _, _,
        ) = SUPER.unpack_from(buffer, SUPER_OFFSET)  # fmt: skip
        if magic != SUPER_MAGIC or not compat & FEATURE_COMPAT_SB_CHKSUM:
            self._damaged("it has no superblock with a checksum at 1024")
        summed = bytearray(buffer[SUPER_OFFSET : SUPER_OFFSET + BLOCK_SIZE])
        summed[4:8] = bytes(4)
        if crc32c(summed) != checksum:
            self._damaged("the superblock's checksum is wrong")
        known = FEATURE_INCOMPAT_CHUNKED_FILE | FEATURE_INCOMPAT_DEVICE_TABLE
        if block_bits != BLOCK_BITS or slots or root_nid != ROOT_NID or dir_block_bits or incompat & ~known:
            self._damaged("the superblock describes an image of another kind")
        self.size: int = blocks << BLOCK_BITS
        """Bytes of the image, from the start of the buffer."""
        self.inode_count: int = inodes
        self.volume_name: bytes = volume_name.rstrip(b"\0")
        self._base: int = meta_block << BLOCK_BITS
        self._last: int = self.size - INODE_SIZE
        table = device_slot * DEVICE_SLOT.size
        if (
            self.size > len(buffer)
            or not SUPER_OFFSET < self._base < self.size
            or table + devices * DEVICE_SLOT.size > self._base
        ):
            self._damaged("its size or the place of its tables is wrong")
        for block in range(table + devices * DEVICE_SLOT.size >> CHECK_BITS):
            if self._unchecked[block]:
                self._check(block)
        slot_values = [DEVICE_SLOT.unpack_from(buffer, table + number * DEVICE_SLOT.size) for number in range(devices)]
        self.device_tags: tuple[str, ...] = tuple(
            tag.rstrip(b"\0").decode("ascii", "replace") for tag, _, _ in slot_values
        )
        """The tag of each device in order, that of device 1 first."""
        self.device_sizes: tuple[int, ...] = (0, *(blocks << BLOCK_BITS for _, blocks, _ in slot_values))
        """Bytes of each device by its number, in whole blocks; 0 for device 0."""

    def _damaged(self, what: str) -> NoReturn:
        raise DamagedError(f"{self._name} is damaged: {what}")

    # ---- inodes

    def inode(self, nid: int) -> Inode:
        """The attributes of an inode. A nid that is none of this image's gives `DamagedError` or nonsense, never harm."""
        offset = self._base + (nid << SLOT_BITS)
        if not self._base <= offset <= self._last:
            self._damaged(f"inode {nid} is outside of it")
        if self._unchecked[offset >> CHECK_BITS]:
            self._check(offset >> CHECK_BITS)
        layout, _, mode, _, size, union, _, uid, gid, seconds, nanoseconds, nlink = INODE.unpack_from(
            self._data, offset
        )
        kind = _KINDS[mode >> 12]
        if kind is None or layout not in _FORMATS:
            self._damaged(f"at {nid} there is no inode")
        return Inode(
            nid,
            kind,
            mode,
            nlink,
            uid,
            gid,
            size,
            seconds * 1_000_000_000 + nanoseconds,
            decode_rdev(union) if kind is Kind.CHAR or kind is Kind.BLOCK else _NO_DEVICE,
        )

    def _head(self, nid: int, kind: Kind) -> tuple[int, int, int, int, int]:
        """Offset, i_format, where what follows the attributes begins, i_size and i_u of an inode of the given kind."""
        offset = self._base + (nid << SLOT_BITS)
        if not self._base <= offset <= self._last:
            self._damaged(f"inode {nid} is outside of it")
        if self._unchecked[offset >> CHECK_BITS]:
            self._check(offset >> CHECK_BITS)
        layout, attributes, mode, _, size, union = _HEAD.unpack_from(self._data, offset)
        if mode >> 12 != kind or layout not in _FORMATS:
            self._damaged(f"at {nid} there is no inode of a {kind.name.lower()}")
        end = offset + INODE_SIZE
        if attributes:
            end += XATTR_HEADER_SIZE + 4 * (attributes - 1)
        return offset, layout, end, size, union

    # ---- directories

    def _directory(self, nid: int) -> tuple[int, int, int, int]:
        """Of a directory: where its whole blocks are, how many, where its inline tail is, how many bytes that has."""
        offset = self._base + (nid << SLOT_BITS)
        if not self._base <= offset <= self._last:
            self._damaged(f"inode {nid} is outside of it")
        if self._unchecked[offset >> CHECK_BITS]:
            self._check(offset >> CHECK_BITS)
        layout, attributes, mode, _, size, union = _HEAD.unpack_from(self._data, offset)
        if mode >> 12 != _DIRECTORY:
            self._damaged(f"at {nid} there is no directory")
        behind = offset + INODE_SIZE
        if attributes:
            behind += XATTR_HEADER_SIZE + 4 * (attributes - 1)
        start = union << BLOCK_BITS
        if layout == FORMAT_INLINE:
            blocks, tail = size >> BLOCK_BITS, size & BLOCK_SIZE - 1
            if (behind & BLOCK_SIZE - 1) + tail > BLOCK_SIZE or not tail:
                self._damaged(f"the entries of directory {nid} cross a block")
        elif layout == FORMAT_PLAIN:
            blocks, tail = size + BLOCK_SIZE - 1 >> BLOCK_BITS, 0
        else:
            self._damaged(f"directory {nid} has the layout of a file")
        if start + (blocks << BLOCK_BITS) > self.size or behind + tail > self.size:
            self._damaged(f"the entries of directory {nid} lie outside of it")
        return start, blocks, behind, tail

    def lookup(self, nid: int, name: bytes) -> int | None:
        """The nid of ``name`` in directory ``nid`` (``.`` and ``..`` too), or None if there is no such name."""
        start, blocks, behind, tail = self._directory(nid)
        data = self._data
        unchecked = self._unchecked
        first_two = _FIRST_TWO.unpack_from
        # The last block whose first name is not behind ours; the tail counts as the block after the others.
        low, high = 0, blocks + bool(tail) - 1
        while low < high:
            middle = low + high + 1 >> 1
            offset = start + (middle << BLOCK_BITS) if middle < blocks else behind
            if unchecked[offset >> CHECK_BITS]:
                self._check(offset >> CHECK_BITS)
            first, second = first_two(data, offset) if middle < blocks else (DIRENT_SIZE, 0)
            if DIRENT_SIZE < first < second <= BLOCK_SIZE:
                least = data[offset + first : offset + second]
            else:  # the tail, a single name, or damage
                least = self._first_name(nid, offset, BLOCK_SIZE if middle < blocks else tail)
            if name < least:
                high = middle - 1
            else:
                low = middle
        if low < blocks:
            offset = start + (low << BLOCK_BITS)
            if unchecked[offset >> CHECK_BITS]:
                self._check(offset >> CHECK_BITS)
            block = data[offset : offset + BLOCK_SIZE]
        elif tail:
            if unchecked[behind >> CHECK_BITS]:
                self._check(behind >> CHECK_BITS)
            block = data[behind : behind + tail]
        else:
            return None
        return self._find(nid, block, name)

    def _find(self, nid: int, block: bytes, name: bytes) -> int | None:
        """The nid of a name in one block of directory ``nid``."""
        # The names lie one behind the other without a separator: a match counts where a name starts and ends.
        first = block[8] | block[9] << 8 if len(block) > DIRENT_SIZE else 0
        names = _NAME_OFFSETS.get(first)
        if names is None or first > len(block):
            self._damaged(f"a block of directory {nid} does not start with entries")
        found = block.find(name, first)
        if found < 0 or not name:
            return None
        offsets = names.unpack_from(block)
        while found >= 0:
            if found in offsets:
                number = offsets.index(found)
                end = found + len(name)
                if number + 1 < len(offsets):
                    if offsets[number + 1] == end:
                        return int(_NID.unpack_from(block, number * DIRENT_SIZE)[0])
                elif end == len(block) or not block[end]:
                    return int(_NID.unpack_from(block, number * DIRENT_SIZE)[0])
            found = block.find(name, found + 1)
        return None

    def _first_name(self, nid: int, offset: int, size: int) -> bytes:
        """The first name of the directory block at ``offset``."""
        if size >= _FIRST_TWO.size:
            first, second = _FIRST_TWO.unpack_from(self._data, offset)
        else:
            first, second = DIRENT_SIZE, 0  # no room for two: a single short name, or damage that shows in a moment
        if first == DIRENT_SIZE:
            end = self._data.find(b"\0", offset + first, offset + size)
            second = size if end < 0 else end - offset
        if not DIRENT_SIZE <= first < second <= size:
            self._damaged(f"a block of directory {nid} does not start with entries")
        return self._data[offset + first : offset + second]

    def readdir(self, nid: int, start: int = 0) -> Iterator[DirectoryEntry]:
        """The entries of a directory, bytewise by name, ``.`` and ``..`` among them.

        ``start`` is 0 or the ``next_position`` of an entry; positions stay valid for the life of the image, are never
        0 and fit 63 bits, so they serve as offsets of a directory stream. A start behind the last entry gives nothing.
        """
        base, blocks, behind, tail = self._directory(nid)
        total = blocks + bool(tail)
        start = max(start, 0)
        number, skip = start >> BLOCK_BITS, (start & BLOCK_SIZE - 1) // DIRENT_SIZE
        kinds = _KIND_OF_TYPE
        while number < total:
            offset, size = (base + (number << BLOCK_BITS), BLOCK_SIZE) if number < blocks else (behind, tail)
            if self._unchecked[offset >> CHECK_BITS]:
                self._check(offset >> CHECK_BITS)
            block = self._data[offset : offset + size]
            first = block[8] | block[9] << 8 if len(block) > DIRENT_SIZE else 0
            if first not in _NAME_OFFSETS or first > size:
                self._damaged(f"a block of directory {nid} does not start with entries")
            count = first // DIRENT_SIZE
            fields = DIRENTS[count].unpack_from(block)
            position = (number << BLOCK_BITS) + skip * DIRENT_SIZE
            for index in range(skip, count):
                at = fields[3 * index + 1]
                if index + 1 < count:
                    position += DIRENT_SIZE
                    end = fields[3 * index + 4]
                else:
                    position = number + 1 << BLOCK_BITS
                    end = block.find(b"\0", at)
                    if end < 0:
                        end = size
                kind = kinds[fields[3 * index + 2]]
                if not at < end <= size or at < first or end - at > NAME_MAX or kind is None:
                    self._damaged(f"an entry of directory {nid} is wrong")
                yield DirectoryEntry(block[at:end], fields[3 * index], kind, position)
            number += 1
            skip = 0

    # ---- symbolic links

    def readlink(self, nid: int) -> bytes:
        """The target of a symbolic link."""
        _, layout, behind, size, union = self._head(nid, Kind.SYMLINK)
        start = behind if layout == FORMAT_INLINE else union << BLOCK_BITS
        if not 0 < size <= SYMLINK_MAX or layout == FORMAT_CHUNKED or start + size > self.size:
            self._damaged(f"the symbolic link {nid} has no target within it")
        if self._unchecked[start >> CHECK_BITS]:
            self._check(start >> CHECK_BITS)
        return self._data[start : start + size]

    # ---- extended attributes

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """The extended attributes of an inode, by their whole names, in the order they were given when it was written."""
        offset = self._base + (nid << SLOT_BITS)
        if not self._base <= offset <= self._last:
            self._damaged(f"inode {nid} is outside of it")
        if self._unchecked[offset >> CHECK_BITS]:
            self._check(offset >> CHECK_BITS)
        data = self._data
        count = data[offset + 2] | data[offset + 3] << 8
        if not count:
            return {}
        position = offset + INODE_SIZE
        end = position + XATTR_HEADER_SIZE + 4 * (count - 1)
        if end > self.size:
            self._damaged(f"the attributes of inode {nid} lie outside of it")
        for block in range(position >> CHECK_BITS, (end - 1 >> CHECK_BITS) + 1):
            if self._unchecked[block]:
                self._check(block)
        if data[position + 4]:
            self._damaged(f"inode {nid} has shared attributes")
        position += XATTR_HEADER_SIZE
        found: dict[bytes, bytes] = {}
        while position < end:
            name_size, index, value_size = XATTR_ENTRY.unpack_from(data, position)
            position += XATTR_ENTRY.size
            middle = position + name_size
            prefix = _PREFIX_OF_INDEX.get(index)
            if prefix is None or middle + value_size > end:
                self._damaged(f"an attribute of inode {nid} is wrong")
            found[prefix + data[position:middle]] = data[middle : middle + value_size]
            position = middle + value_size + 3 & ~3
        return found

    def getxattr(self, nid: int, name: bytes) -> bytes | None:
        """The value of one extended attribute, or None if the inode has none of that name."""
        return self.xattrs(nid).get(name)

    # ---- file data

    def extents(self, nid: int, file_offset: int, size: int) -> Iterator[Run]:
        """Where ``size`` bytes of a file from ``file_offset`` are, in order and cut at the file's end.

        Runs that continue one another are one. Raises `DamagedError` for a run that leaves its device, which a file that
        was marked unreadable does.
        """
        _, layout, behind, file_size, union = self._head(nid, Kind.FILE)
        size = min(size, file_size - file_offset)
        if size <= 0 or file_offset < 0:
            return iter(())
        bits = (union & CHUNK_BITS_MASK) + BLOCK_BITS
        count = (file_size - 1 >> bits) + 1
        indexes = behind + 7 & ~7
        if (
            layout != FORMAT_CHUNKED
            or union & ~CHUNK_BITS_MASK != CHUNK_INDEXES
            or count > MAX_CHUNKS
            or indexes + count * CHUNK_INDEX.size > self.size
        ):
            self._damaged(f"the data of file {nid} is not mapped")
        if count > 1:
            return self._many_extents(nid, bits, indexes, file_offset, size)
        if self._unchecked[indexes >> CHECK_BITS]:
            self._check(indexes >> CHECK_BITS)
        _, device, block = CHUNK_INDEX.unpack_from(self._data, indexes)
        if block == NULL_BLOCK:
            return iter((Run(0, 0, size),))
        start = (block << BLOCK_BITS) + file_offset
        if not 0 < device < len(self.device_sizes) or start + size > self.device_sizes[device]:
            self._damaged(f"the data of file {nid} lies outside of its layer")
        return iter((Run(device, start, size),))

    def _many_extents(self, nid: int, bits: int, indexes: int, file_offset: int, size: int) -> Iterator[Run]:
        device = start = length = 0
        chunk = file_offset >> bits
        while size:
            inside = file_offset & (1 << bits) - 1
            step = min(size, (1 << bits) - inside)
            position = indexes + chunk * CHUNK_INDEX.size
            if self._unchecked[position >> CHECK_BITS]:
                self._check(position >> CHECK_BITS)
            _, next_device, block = CHUNK_INDEX.unpack_from(self._data, position)
            if block == NULL_BLOCK:
                next_device = next_start = 0
            else:
                next_start = (block << BLOCK_BITS) + inside
                if not 0 < next_device < len(self.device_sizes) or next_start + step > self.device_sizes[next_device]:
                    self._damaged(f"the data of file {nid} lies outside of its layer")
            if length and next_device == device and (not device or next_start == start + length):
                length += step
            else:
                if length:
                    yield Run(device, start, length)
                device, start, length = next_device, next_start, step
            size -= step
            file_offset += step
            chunk += 1
        yield Run(device, start, length)


def _check_nothing(block: int) -> None:
    """Stand-in for buffers that need no verification."""
