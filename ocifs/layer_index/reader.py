"""Reads layer index files: `load` opens one, `LayerIndex` gives its entries and decodes its spans.

The format is specified in `ocifs.layer_index.format`.

Concurrency: a `LayerIndex` is immutable after `load` but for sections that are read on first use; two threads that read
the same one at once do the same work twice, to the same effect. All methods may be called from any thread.

Not here: where the blob's bytes come from (`LayerIndex.begin` is told), what keeps decoded spans (`ocifs.spans`).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
from isal import isal_zlib

from ocifs.compression import Compression
from ocifs.compression.gzip import MAX_WINDOW, SpanInflater
from ocifs.errors import CacheDamagedError, DamagedError, StaleFormatError
from ocifs.layer_index.format import (
    AT_HEADER,
    FORMAT_VERSION,
    FRAME,
    HEAD,
    HEADER_SIZE,
    MAGIC,
    SECTION,
    SECTIONS,
    SPAN,
    Meta,
    unpack_entries,
)
from ocifs.spec import DiffID, Digest
from ocifs.tar import Entry, Noticed

if TYPE_CHECKING:
    from ocifs.compression.zstd import FramesInflater

_MAX_FRAME: Final = 64 << 20
"""Bytes of the largest frame that is read: far more than the writer puts into one, and one entry of the largest kind."""
_MAX_NOTICES: Final = 64 << 20
"""Bytes of the largest notices section, decompressed; `ocifs.tar.NOTICE_LIMIT` bounds their number."""

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


class Span(NamedTuple):
    """A piece of the stored bytes that decodes on its own, given its window. Fields as in section SPANS."""

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
        if len(records) % SPAN.size:
            raise DamagedError("the table of spans has a broken size")
        self._records = records
        self._count = len(records) // SPAN.size
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
            SPAN.unpack_from(self._records, number * SPAN.size)
        )
        return Span(
            blob_offset=blob_offset,
            blob_size=blob_size,
            bit=bit,
            layer_offset=layer_offset,
            size=self._offsets[number + 1] - layer_offset,
            sha256=sha256,
            crc32=crc32,
            at_header=bool(flags & AT_HEADER),
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

    def __init__(self, file: RandomAccess, meta: Meta, sections: tuple[tuple[int, int, bytes], ...]) -> None:
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
        if len(table) % FRAME.size:
            raise self._damaged("the table of entry frames has a broken size")
        frames = list(FRAME.iter_unpack(table))
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
        return unpack_entries(raw, after - first, self._damaged)

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
    header = file.read_at(0, HEADER_SIZE)
    if header[:8] != MAGIC:
        raise CacheDamagedError(f"{file.name} is no layer index; {_ADVICE}")
    version = int.from_bytes(header[8:12], "little")
    if len(header) >= 12 and version != FORMAT_VERSION:  # noqa: PLR2004 - magic and version
        raise StaleFormatError(f"the layer index {file.name} has format version {version}, not {FORMAT_VERSION}")
    if len(header) != HEADER_SIZE or hashlib.sha256(header[:-32]).digest() != header[-32:]:
        raise CacheDamagedError(f"the layer index {file.name} is damaged: its header has a wrong checksum; {_ADVICE}")
    _magic, _version, header_size, size = HEAD.unpack_from(header)
    if header_size != HEADER_SIZE or size != file.size:
        raise CacheDamagedError(
            f"the layer index {file.name} is damaged: it is {file.size} bytes, not {size}; {_ADVICE}"
        )
    sections = tuple(SECTION.unpack_from(header, HEAD.size + number * SECTION.size) for number in range(SECTIONS))
    offset, size, sha256 = sections[0]
    raw = file.read_at(offset, min(size, file.size))
    if hashlib.sha256(raw).digest() != sha256:
        raise CacheDamagedError(f"the layer index {file.name} is damaged: its metadata has a wrong checksum; {_ADVICE}")
    try:
        return LayerIndex(file, msgspec.json.decode(raw, type=Meta), sections)
    except (msgspec.MsgspecError, ValueError, RecursionError, DamagedError):
        raise CacheDamagedError(
            f"the layer index {file.name} is damaged: its metadata does not parse; {_ADVICE}"
        ) from None
