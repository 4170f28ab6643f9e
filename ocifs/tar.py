"""STUB OF THE SEAM — the tar room's author replaces this docstring and adds the reader. See the entry type below."""

from __future__ import annotations

import enum

import msgspec


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
    """

    path: bytes
    type: EntryType
    typeflag: int
    """The raw type byte, so that OTHER can be told apart."""
    mode: int
    """Permission bits, 12 of them (setuid, setgid, sticky and rwxrwxrwx)."""
    uid: int
    gid: int
    mtime_ns: int
    """Nanoseconds since the epoch; 0 where the header has a negative time (rule D9)."""
    size: int
    """Size of the file a reader sees, holes included; 0 for anything that is not FILE."""
    header_offset: int
    data_offset: int
    stored_size: int
    link: bytes = b""
    """Target of a SYMLINK or HARDLINK."""
    rdev: tuple[int, int] = (0, 0)
    """(major, minor) of CHAR and BLOCK."""
    uname: bytes = b""
    gname: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    """Every SCHILY.xattr, in stream order; which of them are shown is the merge's decision (rule D10)."""
    sparse: tuple[tuple[int, int], ...] | None = None
    """(file_offset, length) of data segments, stored one behind the other from ``data_offset``; None: not sparse."""


class Noticed(msgspec.Struct, frozen=True, gc=False):
    """A warning about one layer's stream: the rule, the path concerned, the layer offset of the header."""

    rule: str
    path: bytes
    layer_offset: int
    message: str
