"""The header block of a tar entry: its fields, the type bytes, how numbers are written, the checksum.

Not here: what dialects make of the fields, and what an entry is made of (`ocifs.tar.scanner`).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final
from zlib import adler32

from ocifs.tar.entry import EntryType

BLOCK_SIZE: Final = 512
# The header block: name, mode, uid, gid, size, mtime, checksum, type, link name, magic, version, user and group name,
# device numbers, prefix; POSIX.1-2017 pax(1), "ustar Interchange Format". The last 12 bytes are nobody's but star's.
HEADER: Final = struct.Struct("100s 8s 8s 8s 12s 12s 8s B 100s 6s 2s 32s 32s 8s 8s 155s 12x")
ZERO_BLOCK: Final = bytes(BLOCK_SIZE)
INT64_MAX: Final = (1 << 63) - 1
UINT32_MAX: Final = (1 << 32) - 1
_ASCII_MAX: Final = 0x7F

TYPES: Final[dict[int, EntryType]] = {
    0: EntryType.FILE,
    ord("0"): EntryType.FILE,
    ord("1"): EntryType.HARDLINK,
    ord("2"): EntryType.SYMLINK,
    ord("3"): EntryType.CHAR,
    ord("4"): EntryType.BLOCK,
    ord("5"): EntryType.DIR,
    ord("6"): EntryType.FIFO,
    ord("7"): EntryType.FILE,  # a file that a contiguous file system should lay out in one piece
    ord("S"): EntryType.FILE,  # GNU's old sparse file
}
SPARSE_FLAG: Final = ord("S")
PAX_FLAG: Final = ord("x")
GLOBAL_FLAG: Final = ord("g")
LONG_NAME_FLAG: Final = ord("L")
LONG_LINK_FLAG: Final = ord("K")
EXTENSIONS: Final = frozenset({PAX_FLAG, GLOBAL_FLAG, LONG_NAME_FLAG, LONG_LINK_FLAG})
KNOWN_OTHERS: Final = {
    ord("D"): "a GNU directory listing",
    ord("M"): "the continuation of a file of another volume",
    ord("V"): "a GNU volume label",
}


def until_nul(field: bytes) -> bytes:
    """Cut a text field at its first NUL."""
    return field.partition(b"\0")[0]


cached_until_nul = lru_cache(maxsize=1024)(until_nul)
"""For user and group names: few, and worth sharing among a million entries."""


def _octal(field: bytes) -> int:
    """Read an octal field: digits, spaces and NULs around them; empty is 0. ValueError if it is anything else."""
    digits = until_nul(field.strip(b" \0"))
    if not digits:
        return 0
    if digits.strip(b"01234567"):  # anything else, at the ends or between, remains
        raise ValueError(field)
    return int(digits, 8)


@lru_cache(maxsize=8192)
def number(field: bytes) -> int:
    """Read a numeric field: octal, or GNU's base-256 (top bit set, next bit the sign, big-endian two's complement).

    ValueError if it is neither, or does not fit a signed 64-bit integer. Cached, for a layer's modes, owners and times
    are few and decoding one costs ten times as much as looking it up.
    """
    if not field[0] & 0x80:
        return _octal(field)
    bits = 8 * len(field) - 1
    value = int.from_bytes(field, "big") & ((1 << bits) - 1)
    if field[0] & 0x40:
        value -= 1 << bits
    if not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise ValueError(field)
    return value


def header_size(block: bytes) -> int:
    """Read the size field of a header block that `TarScanner` has accepted. ValueError: it is no number."""
    return number(block[124:136])


# The checksum of a header is the sum of its 512 bytes with the eight checksum bytes taken as spaces. Summing in Python
# costs 3 µs, a third of what an entry may cost at all. But Adler-32's low half is 1 plus the sum of the bytes modulo
# 65521, and 256 bytes add up to at most 65280: so two Adler sums give the exact sum of all bytes.
@lru_cache(maxsize=8192)
def _expected_sum(field: bytes) -> int:
    """Compute what the low halves of both Adler sums add up to if ``field`` is right. ValueError: it is not octal."""
    return _octal(field) - 8 * ord(" ") + sum(field) + 2


def checksum_holds(view: memoryview, position: int, field: bytes) -> bool:
    """Whether the checksum ``field`` of the header at ``position`` is the sum of unsigned or of signed bytes."""
    total = (adler32(view[position : position + 256]) & 0xFFFF) + (
        adler32(view[position + 256 : position + BLOCK_SIZE]) & 0xFFFF
    )
    try:
        expected = _expected_sum(field)
    except ValueError:
        return False
    if total == expected:
        return True
    # Signed: each byte over 127 counts 256 less, but not those of the checksum field, which count as spaces.
    block = bytes(view[position : position + BLOCK_SIZE])
    high = sum(byte > _ASCII_MAX for byte in block) - sum(byte > _ASCII_MAX for byte in field)
    return total - 256 * high == expected


def is_header(block: bytes) -> bool:
    """Whether bytes are a tar header, going by the checksum."""
    return len(block) == BLOCK_SIZE and checksum_holds(memoryview(block), 0, block[148:156])
