"""Numbers and structures of the EROFS format, as far as ocifs uses it. Names and values are those of ``erofs_fs.h``.

Not here: anything that reads or writes an image (`ocifs.erofs.reader`, `ocifs.erofs.writer`).
"""

from __future__ import annotations

import struct
from typing import Final

from ocifs.tree import Kind

BLOCK_BITS: Final = 9
BLOCK_SIZE: Final = 1 << BLOCK_BITS
"""Bytes in a block: 512, the unit of tar, so that file data can be addressed where it lies."""

SUPER_OFFSET: Final = 1024
SUPER_MAGIC: Final = 0xE0F5E1E2
SUPER: Final = struct.Struct("<3I2BHQQ4I16s16sI3H2BIQB23x")
"""``erofs_super_block``, 128 bytes: magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, build_time,
build_time_nsec, blocks, meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, u1, extra_devices,
devt_slotoff, dirblkbits, xattr_prefix_count, xattr_prefix_start, packed_nid, xattr_filter_reserved."""

FEATURE_COMPAT_SB_CHKSUM: Final = 0x1
FEATURE_COMPAT_MTIME: Final = 0x2
FEATURE_INCOMPAT_CHUNKED_FILE: Final = 0x4
FEATURE_INCOMPAT_DEVICE_TABLE: Final = 0x8

DEVICE_SLOT: Final = struct.Struct("<64sII56x")
"""``erofs_deviceslot``, 128 bytes: tag, blocks, mapped_blkaddr (``uniaddr`` since Linux 6.15)."""
DEVICE_TABLE_SLOT: Final = (SUPER_OFFSET + SUPER.size) // DEVICE_SLOT.size
"""``devt_slotoff`` counts in units of a slot; the table starts right behind the superblock."""
MAX_DEVICES: Final = 0xFFFF
"""``extra_devices`` and a chunk's ``device_id`` have 16 bits."""
UNMAPPED_BLOCK: Final = 1 << 31
"""``mapped_blkaddr`` of every device, 1 TiB. A kernel that mounts the image *without* its device list looks for the
devices' data at this block of the image itself: with 0 it would serve the tree's own bytes as file data, with a block far
behind the end it cannot. Given a device list, the field only concerns addresses on device 0 beyond it: there are none."""

ROOT_NID: Final = 1
"""The superblock has 16 bits for it; 1 is what every program expects of a root."""
SLOT_BITS: Final = 5
"""A nid counts 32-byte slots."""

INODE: Final = struct.Struct("<4HQ4IQ2I16x")
"""``erofs_inode_extended``, 64 bytes: i_format, i_xattr_icount, i_mode, i_nb, i_size, i_u, i_ino, i_uid, i_gid, i_mtime,
i_mtime_nsec, i_nlink."""
INODE_SIZE: Final = 64
FORMAT_PLAIN: Final = 0b0001
"""``i_format``: bit 0 says extended inode, bits 1–3 the data layout; flat plain is 0."""
FORMAT_INLINE: Final = 0b0101
FORMAT_CHUNKED: Final = 0b1001

CHUNK_INDEX: Final = struct.Struct("<HHI")
"""``erofs_inode_chunk_index``: advise (0), device_id, blkaddr."""
CHUNK_INDEXES: Final = 0x20
"""Bit of the chunk format: `CHUNK_INDEX` records follow. The low five bits: log2 of the blocks in a chunk."""
CHUNK_BITS_MASK: Final = 0x1F
NULL_BLOCK: Final = 0xFFFFFFFF
"""Block number that means a hole."""
UNREACHABLE_BLOCK: Final = 0xFFFFFFFE
"""The last block a device could have. No layer is that long: what is meant to fail when it is read is said to be there."""
MAX_BLOCKS: Final = 0xFFFFFFFE
"""Blocks of a device: numbers have 32 bits, the last two have their meaning above, so a device ends at 2 TiB − 1024."""
MAX_CHUNKS: Final = 1 << 20
"""Our own limit for one file: 8 MiB of chunk index."""

XATTR_HEADER_SIZE: Final = 12
"""``erofs_xattr_ibody_header``: name filter (unused, 0), number of shared attributes (0), reserved."""
XATTR_ENTRY: Final = struct.Struct("<BBH")
"""``erofs_xattr_entry``: e_name_len, e_name_index, e_value_size; name and value follow, padded to 4."""
XATTR_PREFIXES: Final[tuple[tuple[int, bytes], ...]] = (
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
)
XATTR_WHOLE_NAMES: Final = frozenset({2, 3})
"""Prefixes that are the whole name."""

DIRENT_SIZE: Final = 12
DIRENT: Final = struct.Struct("<QHBx")
"""``erofs_dirent``: nid, nameoff (from the start of the block), file_type."""
DIRENTS: Final = tuple(struct.Struct("<" + "QHBx" * count) for count in range(BLOCK_SIZE // DIRENT_SIZE + 1))
"""The dirents of a block that holds ``count`` of them."""
FILE_TYPES: Final[dict[Kind, int]] = {
    Kind.FILE: 1,
    Kind.DIR: 2,
    Kind.CHAR: 3,
    Kind.BLOCK: 4,
    Kind.FIFO: 5,
    Kind.SYMLINK: 7,
}
"""``FT_*`` of the kernel's ``fs_types.h``; 6 would be a socket, which no tar has."""

NAME_MAX: Final = 255
SYMLINK_MAX: Final = 4095
"""``PATH_MAX`` without its NUL: what readlink(2) of the kernel can return."""


def crc32c(data: bytes | bytearray) -> int:
    """Sum a superblock: CRC-32C (Castagnoli) started with all ones and not inverted at the end (``super.c``)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # the polynomial 0x1EDC6F41, bits reversed
        table.append(crc)
    return tuple(table)


_CRC32C: Final = _crc32c_table()


def encode_rdev(major: int, minor: int) -> int:
    """A device number in the kernel's 32-bit form (``new_encode_dev``): 12 bits of major, 20 of minor."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decode_rdev(rdev: int) -> tuple[int, int]:
    """The (major, minor) of `encode_rdev`."""
    return rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00
