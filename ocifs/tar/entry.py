"""What comes out of a tar stream: entries, what was noticed, and how the stream ended.

Not here: how they are found (`ocifs.tar.scanner`).
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

EXTENSION_LIMIT: Final = 1 << 20
"""Bytes of one PAX header, long name or sparse map: archive/tar's maxSpecialFileSize, and libarchive's limit."""
NOTICE_LIMIT: Final = 10_000
"""Notices kept per layer: enough for a person, and bounded for a layer of nothing but curiosities."""
_SHOWN_LIMIT: Final = 200  # bytes of a path in a message


class EntryType(enum.IntEnum):
    """What a tar entry says it is. OTHER is kept in the index, never in the tree."""

    FILE = 0
    HARDLINK = 1
    SYMLINK = 2
    CHAR = 3
    BLOCK = 4
    DIR = 5
    FIFO = 6
    OTHER = 7


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of a layer's tar stream, decoded but not interpreted: ``path`` and ``link`` are as stored.

    Offsets are layer offsets: bytes from the start of the uncompressed tar. ``header_offset`` is the first block that
    belongs to the entry (its first extension header, if it has any); ``data_offset`` its first data byte;
    ``stored_size`` the data bytes in the archive without padding (behind a PAX 1.0 sparse map).

    The last entry of a truncated layer is reported like all others: its data reaches beyond `TarSummary.size`.
    """

    path: bytes
    type: EntryType
    typeflag: int
    """The raw type byte, so that OTHER can be told apart."""
    mode: int
    """Permission bits, 12 of them (setuid, setgid, sticky and rwxrwxrwx)."""
    uid: int
    """0 to 2**32 - 1."""
    gid: int
    """0 to 2**32 - 1."""
    mtime_ns: int
    """Nanoseconds since the epoch, 0 to 2**63 - 1; 0 where the header has a negative time (rule D9)."""
    size: int
    """Size of the file a reader sees, holes included; 0 for anything that is not FILE. Below 2**63."""
    header_offset: int
    data_offset: int
    stored_size: int
    """Below 2**63; 0 for types that have no data."""
    link: bytes = b""
    """Target of a SYMLINK or HARDLINK."""
    rdev: tuple[int, int] = (0, 0)
    """(major, minor) of CHAR and BLOCK, in Linux's 12 and 20 bits."""
    uname: bytes = b""
    gname: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    """Every SCHILY.xattr, in stream order; which of them are shown is the merge's decision (rule D10)."""
    sparse: tuple[tuple[int, int], ...] | None = None
    """(file_offset, length) of data segments, stored one behind the other from ``data_offset``; None: not sparse.

    Sorted, not empty, not touching (the map's own segments that touch are joined), within ``size``, and together
    exactly ``stored_size`` bytes.
    """


class Noticed(msgspec.Struct, frozen=True, gc=False):
    """A warning about one layer's stream: the rule, the path concerned, the layer offset of the header."""

    rule: str
    path: bytes
    layer_offset: int
    message: str


class Damage(msgspec.Struct, frozen=True, gc=False):
    """Why the scanner could not go on: the rule broken, the layer offset where, and one sentence that names both.

    For truncated data ``layer_offset`` is where the data ends; for all else where the offending header or block is.
    """

    rule: str
    layer_offset: int
    message: str


class Trailing(msgspec.Struct, frozen=True, gc=False):
    """What lies behind the two zero blocks that end an archive (rule D14)."""

    layer_offset: int
    """The first byte behind the second zero block."""
    size: int
    """Bytes from there to the end of the layer, at least 1."""
    content_offset: int | None
    """Layer offset of the first 512-byte block that is not all zero; None: nothing but zeros, as tar's padding."""
    tar_header: bool
    """Whether the block at ``content_offset`` is a tar header: another archive begins there."""


class TarSummary(msgspec.Struct, frozen=True, gc=False):
    """How a layer's stream ended."""

    size: int
    """Bytes fed, which is the size of the uncompressed layer."""
    end_offset: int
    """Layer offset where entries end: the first zero block, the end of the data, or the damage."""
    trailing: Trailing | None
    """None: nothing behind the two zero blocks, or the archive does not end in two zero blocks."""
    notices: tuple[Noticed, ...]
    damage: Damage | None
    entry_count: int


class RefusedError(Exception):
    """The stream breaks a rule; caught in `TarScanner.feed`, which keeps the `Damage`."""

    def __init__(self, message: str, rule: str, layer_offset: int) -> None:
        super().__init__(message)
        self.damage = Damage(rule, layer_offset, message)


def shown(path: bytes) -> str:
    """``path`` for a message: quoted, printable and of bounded length."""
    text = repr(path[:_SHOWN_LIMIT].decode("utf-8", "backslashreplace"))
    return text if len(path) <= _SHOWN_LIMIT else text + "…"
