"""The layer index file: its format, how it is written, and `LayerIndex`, which reads it.

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

META is a JSON object, the fields of `_Meta`: what was indexed and how its tar ended.

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
that others can write. Still nothing that the file says makes this module allocate without bound or raise anything but an
`OcifsError`.

Concurrency: a `LayerIndex` is immutable after `load` but for sections that are read on first use; two threads that read
the same one at once do the same work twice, to the same effect. All methods may be called from any thread.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Protocol

import msgspec
from isal import isal_zlib

from ocifs.compression import Compression
from ocifs.compression.gzip import MAX_WINDOW, SpanInflater
from ocifs.errors import CacheDamagedError, DamagedError, StaleFormatError
from ocifs.spec import DiffID, Digest
from ocifs.tar import Damage, Entry, EntryType, Noticed, TarSummary, Trailing

if TYPE_CHECKING:
    from ocifs.compression.zstd import FramesInflater

FORMAT_VERSION: Final = 1
"""Changing what is written, or what it means, is a format break: raise this, and old files are built again."""

FRAME_ENTRIES: Final = 1024
"""Entries in a frame at most. One entry costs decoding its whole frame: 1024 take about 1 ms."""
_FRAME_HEAP: Final = 1 << 20
"""Bytes of names and attributes after which a frame is closed early; one entry's are bounded by `ocifs.tar`."""
_MAX_FRAME: Final = 64 << 20
"""Bytes of the largest frame that is read: far more than `_FRAME_HEAP` and one entry of the largest kind."""
_MAX_NOTICES: Final = 64 << 20
"""Bytes of the largest notices section, decompressed; `ocifs.tar.NOTICE_LIMIT` bounds their number."""

_MAGIC: Final = b"ocifsLIX"
_HEAD: Final = struct.Struct("<8sIIQ")
_SECTION: Final = struct.Struct("<QQ32s")
_SECTIONS: Final = 4
_HEADER_SIZE: Final = _HEAD.size + _SECTIONS * _SECTION.size + 32
_FRAME: Final = struct.Struct("<QQII32s")
_SPAN: Final = struct.Struct("<QQQQIIBB6x32s32s")
_AT_HEADER: Final = 1

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

_ADVICE: Final = "run 'ocifs cache clear' to have it built again"


class RandomAccess(Protocol):
    """What an index file is read from; `ocifs.store.StoredFile` is one."""

    name: str
    size: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Give ``size`` bytes at ``offset``, fewer only at the end."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Mismatch(msgspec.Struct, frozen=True, gc=False):
    """A check that failed while an index was built under examination: what, what was expected, what was found."""

    what: str
    """``size``, ``digest``, ``diff ID``, or ``data`` for a stream that does not decode to its end."""
    expected: str
    actual: str
    message: str


class _Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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


class Span(NamedTuple):
    """A piece of the stored bytes that decodes on its own, given its window. Fields as in the module's docstring."""

    blob_offset: int
    blob_size: int
    bit: int
    layer_offset: int
    size: int
    """Bytes that the span decodes to."""
    sha256: bytes
    crc32: int
    at_header: bool
    window_offset: int
    window_size: int
    window_sha256: bytes


class LayerRange(NamedTuple):
    """``size`` bytes of the uncompressed layer at ``layer_offset``."""

    layer_offset: int
    size: int


class SpanTable:
    """The spans of a layer in order. They cover the layer without gaps and do not overlap."""

    def __init__(self, records: bytes, layer_size: int) -> None:
        """Read section SPANS; raises `DamagedError` if it cannot be one."""
        if len(records) % _SPAN.size:
            raise DamagedError("the table of spans has a broken size")
        self._records = records
        self._count = len(records) // _SPAN.size
        offsets = [offset for (offset,) in struct.iter_unpack("<16xQ88x", records)]
        if any(first >= second for first, second in itertools.pairwise(offsets)):
            raise DamagedError("the spans are not in order")
        if (offsets and (offsets[0] or offsets[-1] > layer_size)) or (layer_size and not offsets):
            raise DamagedError("the spans do not cover the layer")
        self._offsets = [*offsets, layer_size]

    def __len__(self) -> int:
        """How many spans there are: 0 only for a blob without bytes, or a re-framed one that decodes to none."""
        return self._count

    def __getitem__(self, number: int) -> Span:
        """Give a span by its number, from 0."""
        if not 0 <= number < self._count:
            raise IndexError(number)
        blob_offset, blob_size, layer_offset, window_offset, window_size, crc32, bit, flags, sha256, window_sha256 = (
            _SPAN.unpack_from(self._records, number * _SPAN.size)
        )
        return Span(
            blob_offset=blob_offset,
            blob_size=blob_size,
            bit=bit,
            layer_offset=layer_offset,
            size=self._offsets[number + 1] - layer_offset,
            sha256=sha256,
            crc32=crc32,
            at_header=bool(flags & _AT_HEADER),
            window_offset=window_offset,
            window_size=window_size,
            window_sha256=window_sha256,
        )

    def __iter__(self) -> Iterator[Span]:
        """Give all spans in order."""
        return (self[number] for number in range(self._count))

    def span_at(self, layer_offset: int) -> int:
        """Give the number of the span that holds the byte at ``layer_offset``, which must be within the layer."""
        if not 0 <= layer_offset < self._offsets[-1]:
            raise IndexError(layer_offset)
        return bisect.bisect_right(self._offsets, layer_offset) - 1

    def layer_range(self, number: int) -> LayerRange:
        """Say which bytes of the layer span ``number`` holds."""
        first = self._offsets[number]
        return LayerRange(first, self._offsets[number + 1] - first)


class LayerIndex:
    """A loaded index. Made by `load`; keeps its file open until `close`."""

    def __init__(self, file: RandomAccess, meta: _Meta, sections: tuple[tuple[int, int, bytes], ...]) -> None:
        """Use `load`."""
        self._file = file
        self._sections = sections
        self.name = file.name
        """The index file, for messages."""
        self.on_damage: Callable[[], None] | None = None
        """Called when damage of the index file is found after it was loaded, before the error is raised."""
        self.digest = Digest.parse(meta.digest)
        """Of the blob as stored: its actual one, also where another was expected (see ``mismatches``)."""
        self.diff_id = DiffID.parse(meta.diff_id)
        """Of the uncompressed layer: its actual one, likewise."""
        self.stored_size = meta.stored_size
        self.layer_size = meta.layer_size
        self.compression = Compression(meta.compression)
        self.reframed = meta.reframed
        """True: spans are read from the re-framed copy, not from the blob."""
        self.data_size = meta.data_size
        """Bytes of what spans are read from: the blob, or its re-framed copy."""
        self.entry_count = meta.entry_count
        self.end_offset = meta.end_offset
        self.trailing = meta.trailing
        self.damage = meta.damage
        self.mismatches = meta.mismatches

    def close(self) -> None:
        """Close the index file."""
        self._file.close()

    # --- entries ----------------------------------------------------------------------------------------------------

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Give the entries in stream order from number ``start`` (from 0) on, holding one frame at a time."""
        if start >= self.entry_count:
            return
        frames = self._frames
        number = self._frame_of(start)
        first = frames[number][0]
        yield from itertools.islice(self._decode_frame(number), start - first, None)
        for later in range(number + 1, len(frames)):
            yield from self._decode_frame(later)

    def entry(self, number: int) -> Entry:
        """Give entry ``number``, from 0."""
        if not 0 <= number < self.entry_count:
            raise IndexError(number)
        frame = self._frame_of(number)
        first = self._frames[frame][0]
        return next(itertools.islice(self._decode_frame(frame), number - first, None))

    @cached_property
    def _frames(self) -> list[tuple[int, int, int, int, bytes]]:
        table = self._section(2, "table of entry frames")
        if len(table) % _FRAME.size:
            raise self._damaged("the table of entry frames has a broken size")
        frames = list(_FRAME.iter_unpack(table))
        firsts = [frame[0] for frame in frames]
        if any(a >= b for a, b in itertools.pairwise([*firsts, self.entry_count])) or (firsts and firsts[0]):
            raise self._damaged("the table of entry frames is not in order")
        if self.entry_count and not frames:
            raise self._damaged("the table of entry frames is empty")
        return frames

    def _frame_of(self, number: int) -> int:
        return bisect.bisect_right(self._frames, number, key=lambda frame: frame[0]) - 1

    def _decode_frame(self, number: int) -> Iterator[Entry]:
        frames = self._frames
        first, offset, stored_size, size, sha256 = frames[number]
        stored = self._checked(offset, stored_size, sha256, f"entry frame {number}")
        raw = self._decompress(stored, size, _MAX_FRAME, f"entry frame {number}")
        after = frames[number + 1][0] if number + 1 < len(frames) else self.entry_count
        return _unpack_entries(raw, after - first, self._damaged)

    # --- spans ------------------------------------------------------------------------------------------------------

    @cached_property
    def spans(self) -> SpanTable:
        """The spans."""
        try:
            return SpanTable(self._section(3, "table of spans"), self.layer_size)
        except DamagedError as error:
            raise self._damaged(str(error)) from None

    @property
    def partly(self) -> bool:
        """Whether it is worth decoding part of a span: of gzip. Others are smaller, and a decoder of zstd holds a window."""
        return self.compression is Compression.GZIP and not self.reframed

    def window(self, number: int) -> bytes:
        """Give the window of span ``number``: the 32 KiB before it, with zeros in front; empty if it needs none."""
        span = self.spans[number]
        if not span.window_size:
            return b""
        stored = self._checked(span.window_offset, span.window_size, span.window_sha256, f"window {number}")
        return self._decompress(stored, MAX_WINDOW, MAX_WINDOW, f"window {number}")

    def begin(self, number: int, read_at: Callable[[int, int], bytes | memoryview]) -> SpanDecoder:
        """Read span ``number``, verify the stored bytes, and give what decodes them; blocking, thread-safe.

        ``read_at(offset, size)`` reads the blob, or the re-framed copy if ``reframed``. Raises `DamagedError` naming blob,
        span and blob_offset if the bytes are not those that were indexed: then nothing is decoded at all. It is a
        `CacheDamagedError` where the index or the re-framed copy is to blame, not the blob.
        """
        span = self.spans[number]

        def failed(why: str) -> CacheDamagedError:
            return self._bad_index(number, span, why)

        stored = read_at(span.blob_offset, span.blob_size)
        if len(stored) != span.blob_size:
            raise self._bad_span(number, span, f"only {len(stored)} of its bytes are left")
        if hashlib.sha256(stored).digest() != span.sha256:
            raise self._bad_span(number, span, "its bytes have changed since the index was built")
        try:
            inflater = self._inflater(number, span, stored)
        except CacheDamagedError:
            raise
        except DamagedError as error:
            raise failed(str(error)) from None
        return SpanDecoder(stored, inflater, span, failed)

    def _inflater(self, number: int, span: Span, stored: bytes | memoryview) -> SpanInflater | FramesInflater | None:
        if self.reframed or self.compression is Compression.ZSTD:
            from ocifs.compression.zstd import FramesInflater  # noqa: PLC0415 (see `_decompress`)

            return FramesInflater(stored)
        if self.compression is Compression.GZIP:
            return SpanInflater(stored, bit=span.bit, window=self.window(number), at_header=span.at_header)
        return None

    def decode(self, number: int, read_at: Callable[[int, int], bytes | memoryview]) -> bytes | memoryview:
        """Give all that span ``number`` decodes to; arguments and errors as `begin` and `SpanDecoder.read`."""
        decoder = self.begin(number, read_at)
        return decoder.read(decoder.left)

    def _bad_span(self, number: int, span: Span, why: str) -> DamagedError:
        what = f"the re-framed copy of blob {self.digest}" if self.reframed else f"blob {self.digest}"
        kind = CacheDamagedError if self.reframed else DamagedError
        return kind(f"{what} cannot be read in {_place(number, span)}: {why}")

    def _bad_index(self, number: int, span: Span, why: str) -> CacheDamagedError:
        """Say that a span does not decode whose stored bytes are the indexed ones: what was noted about it is wrong."""
        return self._damaged(f"what it says of {_place(number, span)} of blob {self.digest} does not fit: {why}")

    # --- sections ---------------------------------------------------------------------------------------------------

    @cached_property
    def notices(self) -> tuple[Noticed, ...]:
        """What the tar scanner noticed, in stream order."""
        raw = self._decompress(self._section(1, "notices"), _MAX_NOTICES, _MAX_NOTICES, "notices")
        try:
            return msgspec.json.decode(raw, type=tuple[Noticed, ...])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise self._damaged("its notices do not parse") from None

    def _section(self, number: int, what: str) -> bytes:
        offset, size, sha256 = self._sections[number]
        return self._checked(offset, size, sha256, what)

    def _checked(self, offset: int, size: int, sha256: bytes, what: str) -> bytes:
        """Read bytes of the index file and check them."""
        if offset + size > self._file.size:  # before reading, so that a wrong size allocates nothing
            raise self._damaged(f"its {what} lies beyond its end")
        data = self._file.read_at(offset, size)
        if len(data) != size or hashlib.sha256(data).digest() != sha256:
            raise self._damaged(f"its {what} has a wrong checksum")
        return data

    def _decompress(self, stored: bytes, size: int, limit: int, what: str) -> bytes:
        import zstandard  # noqa: PLC0415 (mounting an indexed image does without, and is 12 ms faster for it)

        if size > limit:
            raise self._damaged(f"its {what} is too large")
        try:
            with zstandard.ZstdDecompressor().stream_reader(stored) as reader:
                return reader.read(size)
        except (zstandard.ZstdError, MemoryError):
            raise self._damaged(f"its {what} does not decompress") from None

    def _damaged(self, why: str) -> CacheDamagedError:
        if self.on_damage is not None:
            self.on_damage()
        return CacheDamagedError(f"the layer index {self.name} is damaged: {why}; {_ADVICE}")


class SpanDecoder:
    """A span whose stored bytes were verified, being decoded as far as somebody asks for it.

    Blocking; not to be used by two threads at once. After an error it is of no more use.
    """

    def __init__(
        self,
        stored: bytes | memoryview,
        inflater: SpanInflater | FramesInflater | None,
        span: Span,
        failed: Callable[[str], CacheDamagedError],
    ) -> None:
        self._stored = stored
        self._inflater = inflater
        self._span = span
        self._failed = failed
        self._crc32 = 0
        self.left = span.size
        """Bytes that `read` has not given yet."""

    @property
    def held(self) -> int:
        """Bytes of memory that it keeps until all is read."""
        return len(self._stored)

    def read(self, size: int) -> bytes | memoryview:
        """Give the next ``size`` bytes, at most what is left.

        Raises `CacheDamagedError` if they do not decode, or not to what was indexed: the stored bytes are the indexed ones,
        so the index is wrong about them.
        """
        size = min(size, self.left)
        at = self._span.size - self.left
        self.left -= size
        if self._inflater is None:
            return self._stored if size == len(self._stored) else memoryview(self._stored)[at : at + size]
        try:
            data = self._inflater.read(size)
        except DamagedError as error:
            raise self._failed(str(error)) from None
        self._crc32 = isal_zlib.crc32(data, self._crc32)
        if not self.left and self._crc32 != self._span.crc32:
            raise self._failed("it decodes to other bytes than at indexing")
        return data


def _place(number: int, span: Span) -> str:
    return f"span {number} ({span.blob_size} bytes at blob_offset {span.blob_offset})"


def load(file: RandomAccess) -> LayerIndex:
    """Open an index; it keeps ``file`` and closes it with itself. On errors ``file`` is left open.

    Raises `StaleFormatError` if another version of ocifs wrote it, `CacheDamagedError` if it is not whole.
    """
    header = file.read_at(0, _HEADER_SIZE)
    if header[:8] != _MAGIC:
        raise CacheDamagedError(f"{file.name} is no layer index; {_ADVICE}")
    version = int.from_bytes(header[8:12], "little")
    if len(header) >= 12 and version != FORMAT_VERSION:  # noqa: PLR2004 - magic and version
        raise StaleFormatError(f"the layer index {file.name} has format version {version}, not {FORMAT_VERSION}")
    if len(header) != _HEADER_SIZE or hashlib.sha256(header[:-32]).digest() != header[-32:]:
        raise CacheDamagedError(f"the layer index {file.name} is damaged: its header has a wrong checksum; {_ADVICE}")
    _magic, _version, header_size, size = _HEAD.unpack_from(header)
    if header_size != _HEADER_SIZE or size != file.size:
        raise CacheDamagedError(
            f"the layer index {file.name} is damaged: it is {file.size} bytes, not {size}; {_ADVICE}"
        )
    sections = tuple(_SECTION.unpack_from(header, _HEAD.size + number * _SECTION.size) for number in range(_SECTIONS))
    offset, size, sha256 = sections[0]
    raw = file.read_at(offset, min(size, file.size))
    if hashlib.sha256(raw).digest() != sha256:
        raise CacheDamagedError(f"the layer index {file.name} is damaged: its metadata has a wrong checksum; {_ADVICE}")
    try:
        return LayerIndex(file, msgspec.json.decode(raw, type=_Meta), sections)
    except (msgspec.MsgspecError, ValueError, RecursionError, DamagedError):
        raise CacheDamagedError(
            f"the layer index {file.name} is damaged: its metadata does not parse; {_ADVICE}"
        ) from None


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


def _unpack_entries(raw: bytes, expected: int, damaged: Callable[[str], DamagedError]) -> Iterator[Entry]:
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
    import zstandard  # noqa: PLC0415 (see `LayerIndex._decompress`)

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
        self._position = _HEADER_SIZE
        self._frames: list[bytes] = []
        self._pending: list[Entry] = []
        self._pending_heap = 0
        self._written = 0
        self._spans: list[bytes] = []
        import zstandard  # noqa: PLC0415 (see `LayerIndex._decompress`)

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
        record = _FRAME.pack(self._written, self._position, len(stored), len(raw), hashlib.sha256(stored).digest())
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
        flags = _AT_HEADER if at_header else 0
        self._spans.append(
            _SPAN.pack(
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
        meta = _Meta(
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
            sections += _SECTION.pack(self._position, len(section), hashlib.sha256(section).digest())
            self._write(section)
        head = _HEAD.pack(_MAGIC, FORMAT_VERSION, _HEADER_SIZE, self._position) + sections
        self._position = 0
        self._write(head + hashlib.sha256(head).digest())

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, self._position)
            self._position += done
            view = view[done:]
