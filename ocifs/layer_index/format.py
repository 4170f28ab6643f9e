"""The layer index file: its format, and how it is written.

The format, version 1
=====================
All numbers are little-endian and unsigned. A *stored* offset or size is about bytes of this file. Everything is covered
by a SHA-256 that is checked before the bytes are used, so damage is found, whatever it hits; nothing is read before it
is needed, so opening costs the same for ten entries and ten million.

Header, at offset 0, 248 bytes::

    0    8  magic "ocifsLIX"
    8    4  format version
    12   4  size of this header, 248
    16   8  size of the whole file
    24  48  section META        each section: stored offset (8), stored size (8), SHA-256 of its bytes (32)
    72  48  section NOTICES
    120 48  section FRAMES
    168 48  section SPANS
    216 32  SHA-256 of bytes 0 to 215

META is a JSON object, the fields of `Meta`: what was indexed and how its tar ended.

NOTICES is a JSON array, compressed as one zstd frame: what the tar scanner noticed, the fields of `ocifs.tar.Noticed`;
paths are base64.

FRAMES is a table with a record of 56 bytes for each entry frame::

    0   8  number of the frame's first entry; entries count from 0 in stream order
    8   8  stored offset of the frame
    16  4  stored size
    20  4  size after decompression
    24 32  SHA-256 of the stored bytes

An entry frame is one zstd frame. Decompressed it holds up to `FRAME_ENTRIES` entries in columns, then a heap: the number
of entries n (4), then for each column of `_COLUMNS` its n values, then for each entry in turn its path, link, user name,
group name and extra, whose sizes are the first five columns. ``extra`` is empty or a MessagePack array of two: the
extended attributes as an array of [name, value], and the sparse segments as an array of [file_offset, length] or nil.
The other columns are the fields of `ocifs.tar.Entry` of the same name, with ``rdev`` as ``major`` and ``minor``.

SPANS is a table with a record of 112 bytes for each span, ordered by layer_offset::

    0   8  blob_offset: of the first byte the span has bits in
    8   8  blob_size: bytes up to and with the last one it has bits in
    16  8  layer_offset: of the first byte it decodes to
    24  8  stored offset of the window
    32  4  stored size of the window, 0 if there is none; stored windows are one zstd frame each
    36  4  CRC-32 (as in gzip) of what the span decodes to
    40  1  bit of the first byte that the span starts at, 0 to 7 from the lowest
    41  1  flags: 1 = starts with a gzip member header, not with a deflate block
    42  6  zero
    48 32  SHA-256 of the blob's bytes from blob_offset, blob_size long
    80 32  SHA-256 of the stored window

A span ends where the next begins, the last at META's layer_size. The first begins at blob_offset 0 and the last ends at
the blob's end, so that together they cover every byte of it. If META says ``reframed``, all this is about the re-framed
copy instead of the blob: the layer as zstd frames of which each is a span, none if the layer has no bytes. Otherwise
META's ``compression`` says what a span is: ``plain`` bytes as they are, ``gzip`` (see `ocifs.compression.gzip` for how it
is entered), or ``zstd``, whole frames.

A window is the 32 KiB that the layer has before the span, zeros in front if it has less.

Trust and damage
================
The checksums are there for disks and for bugs, not against whoever can write the cache: `ocifs.store` refuses a cache
that others can write. Still nothing that the file says makes the reader allocate without bound or raise anything but an
`OcifsError`.

Not here: reading it (`ocifs.layer_index.reader`).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Final

import msgspec

from ocifs.compression import Compression
from ocifs.compression.gzip import MAX_WINDOW
from ocifs.errors import DamagedError
from ocifs.spec import DiffID, Digest
from ocifs.tar import Damage, Entry, EntryType, TarSummary, Trailing

FORMAT_VERSION: Final = 1
"""Changing what is written, or what it means, is a format break: raise this, and old files are built again."""

FRAME_ENTRIES: Final = 1024
"""Entries in a frame at most. One entry costs decoding its whole frame: 1024 take about 1 ms."""
_FRAME_HEAP: Final = 1 << 20
"""Bytes of names and attributes after which a frame is closed early; one entry's are bounded by `ocifs.tar`."""

MAGIC: Final = b"ocifsLIX"
HEAD: Final = struct.Struct("<8sIIQ")
SECTION: Final = struct.Struct("<QQ32s")
SECTIONS: Final = 4
HEADER_SIZE: Final = HEAD.size + SECTIONS * SECTION.size + 32
FRAME: Final = struct.Struct("<QQII32s")
SPAN: Final = struct.Struct("<QQQQIIBB6x32s32s")
AT_HEADER: Final = 1

_COLUMNS: Final = (
    ("path_size", "I"),
    ("link_size", "I"),
    ("uname_size", "I"),
    ("gname_size", "I"),
    ("extra_size", "I"),
    ("type", "B"),
    ("typeflag", "B"),
    ("mode", "H"),
    ("uid", "I"),
    ("gid", "I"),
    ("major", "I"),
    ("minor", "I"),
    ("mtime_ns", "Q"),
    ("size", "Q"),
    ("header_offset", "Q"),
    ("data_offset", "Q"),
    ("stored_size", "Q"),
)
"""Columns of an entry frame in order: name, and width as in `struct` (B 1, H 2, I 4, Q 8 bytes)."""
_ROW_SIZE: Final = sum(struct.calcsize("<" + width) for _name, width in _COLUMNS)

_TYPES: Final = tuple(EntryType)
_Extra = tuple[tuple[tuple[bytes, bytes], ...], tuple[tuple[int, int], ...] | None]


class Mismatch(msgspec.Struct, frozen=True, gc=False):
    """A check that failed while an index was built under examination: what, what was expected, what was found."""

    what: str
    """``size``, ``digest``, ``diff ID``, or ``data`` for a stream that does not decode to its end."""
    expected: str
    actual: str
    message: str


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section META."""

    digest: str
    """Of the blob as stored: what it is, also where something else was expected."""
    diff_id: str
    """Of the uncompressed data, likewise."""
    stored_size: int
    """Bytes of the blob."""
    layer_size: int
    """Bytes of the uncompressed data."""
    compression: str
    """What the blob is: a value of `ocifs.compression.Compression`."""
    reframed: bool
    """Whether spans are about the re-framed copy."""
    data_size: int
    """Bytes of what the spans are about: the blob, or its re-framed copy."""
    entry_count: int
    end_offset: int
    """Layer offset of the archive's end: its first zero block, or the end of what could be parsed."""
    trailing: Trailing | None
    """What lies behind the end of the archive."""
    damage: Damage | None
    """Where the tar stream breaks a rule, if it does; entries before that are here."""
    mismatches: tuple[Mismatch, ...]


# --- entry frames -------------------------------------------------------------------------------------------------------


def _pack_entries(entries: list[Entry]) -> bytes:
    extras = [
        msgspec.msgpack.encode((entry.xattrs, entry.sparse)) if entry.xattrs or entry.sparse is not None else b""
        for entry in entries
    ]
    columns: tuple[Iterable[int], ...] = (
        [len(entry.path) for entry in entries],
        [len(entry.link) for entry in entries],
        [len(entry.uname) for entry in entries],
        [len(entry.gname) for entry in entries],
        [len(extra) for extra in extras],
        [entry.type for entry in entries],
        [entry.typeflag for entry in entries],
        [entry.mode for entry in entries],
        [entry.uid for entry in entries],
        [entry.gid for entry in entries],
        [entry.rdev[0] for entry in entries],
        [entry.rdev[1] for entry in entries],
        [entry.mtime_ns for entry in entries],
        [entry.size for entry in entries],
        [entry.header_offset for entry in entries],
        [entry.data_offset for entry in entries],
        [entry.stored_size for entry in entries],
    )
    count = len(entries)
    parts = [struct.pack("<I", count)]
    parts += [
        struct.pack(f"<{count}{width}", *column) for (_name, width), column in zip(_COLUMNS, columns, strict=True)
    ]
    for entry, extra in zip(entries, extras, strict=True):
        parts += (entry.path, entry.link, entry.uname, entry.gname, extra)
    return b"".join(parts)


def unpack_entries(raw: bytes, expected: int, damaged: Callable[[str], DamagedError]) -> Iterator[Entry]:
    """Give the entries of a frame. The checksum was right, so what fails here was written wrong."""
    count = int.from_bytes(raw[:4], "little")
    if count != expected or len(raw) < 4 + count * _ROW_SIZE:
        raise damaged("an entry frame has another number of entries")
    at = 4
    columns = []
    for _name, width in _COLUMNS:
        layout = f"<{count}{width}"
        columns.append(struct.unpack_from(layout, raw, at))
        at += struct.calcsize(layout)
    if at + sum(map(sum, columns[:5])) != len(raw):
        raise damaged("an entry frame has another size")
    types, unpack_extra, nothing = _TYPES, msgspec.msgpack.Decoder(_Extra).decode, (0, 0)
    for (
        path_size, link_size, uname_size, gname_size, extra_size,
        kind, typeflag, mode, uid, gid, major, minor, mtime_ns, size, header_offset, data_offset, stored_size,
    ) in zip(*columns, strict=True):  # fmt: skip
        path = raw[at : (at := at + path_size)]
        link = raw[at : (at := at + link_size)] if link_size else b""
        uname = raw[at : (at := at + uname_size)] if uname_size else b""
        gname = raw[at : (at := at + gname_size)] if gname_size else b""
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        sparse = None
        try:
            if extra_size:
                xattrs, sparse = unpack_extra(raw[at : (at := at + extra_size)])
            entry_type = types[kind]
        except (msgspec.MsgspecError, ValueError, RecursionError, IndexError):
            raise damaged("an entry does not parse") from None
        yield Entry(
            path, entry_type, typeflag, mode, uid, gid, mtime_ns, size, header_offset, data_offset, stored_size, link,
            (major, minor) if major or minor else nothing, uname, gname, xattrs, sparse,
        )  # fmt: skip


# --- writing ------------------------------------------------------------------------------------------------------------


def pack_window(window: bytes) -> bytes:
    """Give a window as it is stored; of one shorter than 32 KiB what is missing in front is zeros."""
    import zstandard  # noqa: PLC0415 (see `ocifs.layer_index.reader`)

    # 0.13 ms; level 9 saves another 6 % and takes five times as long.
    return zstandard.ZstdCompressor(level=3).compress(window.rjust(MAX_WINDOW, b"\0"))


class Writer:
    """Writes an index file: entries and spans in any order, each kind in its own, then `finish`.

    ``file`` needs a descriptor; it is emptied first. An OSError while writing passes through: what to say about it is
    for the caller, who knows which directory is full.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Start with an empty file."""
        self._fd = file.fileno()
        os.ftruncate(self._fd, 0)
        self._position = HEADER_SIZE
        self._frames: list[bytes] = []
        self._pending: list[Entry] = []
        self._pending_heap = 0
        self._written = 0
        self._spans: list[bytes] = []
        import zstandard  # noqa: PLC0415 (see `ocifs.layer_index.reader`)

        self._compressor = zstandard.ZstdCompressor(level=3)

    def add_entries(self, entries: list[Entry]) -> None:
        """Add the next entries of the stream."""
        for entry in entries:
            self._pending.append(entry)
            self._pending_heap += len(entry.path) + len(entry.link)
            if entry.xattrs or entry.sparse:
                self._pending_heap += sum(len(value) for _name, value in entry.xattrs) + 16 * len(entry.sparse or ())
            if len(self._pending) == FRAME_ENTRIES or self._pending_heap > _FRAME_HEAP:
                self._flush_frame()

    def _flush_frame(self) -> None:
        if not self._pending:
            return
        raw = _pack_entries(self._pending)
        stored = self._compressor.compress(raw)
        record = FRAME.pack(self._written, self._position, len(stored), len(raw), hashlib.sha256(stored).digest())
        self._frames.append(record)
        self._write(stored)
        self._written += len(self._pending)
        self._pending = []
        self._pending_heap = 0

    def add_span(
        self,
        *,
        blob_offset: int,
        blob_size: int,
        layer_offset: int,
        sha256: bytes,
        crc32: int = 0,
        bit: int = 0,
        at_header: bool = False,
        window: bytes = b"",
    ) -> None:
        """Add the next span; fields as in the module's docstring, ``window`` as `pack_window` gives it."""
        offset, window_sha256 = 0, bytes(32)
        if window:
            offset, window_sha256 = self._position, hashlib.sha256(window).digest()
            self._write(window)
        flags = AT_HEADER if at_header else 0
        self._spans.append(
            SPAN.pack(
                blob_offset, blob_size, layer_offset, offset, len(window), crc32, bit, flags, sha256, window_sha256
            )
        )

    def finish(
        self,
        summary: TarSummary,
        *,
        digest: Digest,
        diff_id: DiffID,
        stored_size: int,
        compression: Compression,
        reframed: bool,
        data_size: int,
        mismatches: tuple[Mismatch, ...],
    ) -> None:
        """Write the tables and the header. Before this the file is no index."""
        self._flush_frame()
        meta = Meta(
            digest=str(digest),
            diff_id=str(diff_id),
            stored_size=stored_size,
            layer_size=summary.size,
            compression=compression.value,
            reframed=reframed,
            data_size=data_size,
            entry_count=self._written,
            end_offset=summary.end_offset,
            trailing=summary.trailing,
            damage=summary.damage,
            mismatches=mismatches,
        )
        sections = b""
        for section in (
            msgspec.json.encode(meta),
            self._compressor.compress(msgspec.json.encode(summary.notices)),
            b"".join(self._frames),
            b"".join(self._spans),
        ):
            sections += SECTION.pack(self._position, len(section), hashlib.sha256(section).digest())
            self._write(section)
        head = HEAD.pack(MAGIC, FORMAT_VERSION, HEADER_SIZE, self._position) + sections
        self._position = 0
        self._write(head + hashlib.sha256(head).digest())

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, self._position)
            self._position += done
            view = view[done:]
