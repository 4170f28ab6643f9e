"""Restart points of gzip data, found while it is decompressed once, from front to back.

A restart point is a place from which decoding can begin anew: a member's header, or a deflate block together with the
32 KiB of output before it (`ocifs.compression.gzip` says how it is entered). Members say where they begin. Blocks do
not, and no stock decompressor tells; but it can be watched.

How a block is found
====================
Where a span has become long enough, the decompressor is fed 32 bytes at a time. That gives something away:

*A header of dynamic codes* (RFC 1951, section 3.2.7) takes 40 to 100 bytes and gives no output. No other 32 bytes of a
deflate stream give none: a symbol has 15 bits at most. So a piece without output lies in a header, everything decoded
before it belongs to the blocks before, and the header begins in the few bytes in front. Which bit it is, is tried: few
bits in a hundred look like such a header (`_looks_dynamic`).

*Stored data* comes out as it went in. Where that ends, within a larger piece now, the next block begins, on a byte.

Nothing found so is believed. A point counts if exactly one of the bits tried gives the next 32 KiB (or what is left of
the member) as they were decoded. After 32 KiB a decoder's window holds only what it decoded itself, so the rest follows.

A stream in which nothing is found (one block from front to back, or only blocks of fixed codes) has no restart points;
what to do then is the caller's to decide. Between points it is decoded in large steps, as fast as the library goes, and
the search costs about 0.7 ms a point: half a block of 50 KB, 1.2 µs for each 32 bytes of it.

Pure: what is stored comes through a function, what is decoded goes out in pieces. Not here: checksums of spans, hashes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, cast

from isal import isal_zlib

from ocifs.compression.gzip import MAX_WINDOW, TRAILER_SIZE, inflate_span, member_header_end
from ocifs.errors import DamagedError

_CHUNK: Final = 1 << 18
"""Bytes read at a time. The last two chunks are held: a point and the 32 KiB behind it lie within them."""
_MAX_HEADER: Final = 1 << 20
"""Bytes of the longest member header that is read: 64 KiB of extra field, and names without end."""

_FIRST_STEP: Final = 1 << 12
_MAX_STEP: Final = 1 << 18
# Steps double within a member, because the decompressor copies what a member leaves of one, and members may be tiny.

_Error: Final = cast("type[Exception]", isal_zlib.error)

_MAX_PIECE: Final = 4 << 20
"""Bytes given out at once at most, however much a step inflates to."""

_PROBE: Final = 32
"""Bytes fed at a time while a block is looked for: less than half of most headers, so that one piece falls within."""
_MIN_PROBE: Final = 8
"""Where few different bytes occur headers are short: each search that fails halves the pieces, down to this."""
_RUN_RATIO: Final = 64
_RUN_PROBE: Final = 4
"""Bytes fed where the data inflates more than 64-fold: zeros, mostly, whose blocks are 4 MiB in 4 KiB, their headers 13."""
_PROBES: Final = 256
_MAX_PROBES: Final = 1 << 14
_MAX_SEARCHED: Final = 8 << 20
"""Pieces fed before a search is put off, 512 KiB, ten blocks of most compressors; and bytes they may decode to."""
_STORED_PROBE: Final = 1024
_LAG: Final = 16
"""Bytes by which the header may begin before the piece in front of the silent one: what the decompressor had buffered."""


_HEAD: Final = 10
"""Bytes of a header that are looked at, up to the lengths of the code lengths' own code."""
_SILENCE: Final = 64
"""Bits by which it may begin within the silent piece: the code that ends the block before (15) gives no output either, nor
does an empty stored block (42 at most), which flushes leave in front of the next."""
_TRIES: Final = 8
"""How often a search goes on behind a place that proved to be none."""
_PROOF_STEP: Final = 1 << 14
"""Bytes decoded at a time to have something to compare with."""


class Restart(NamedTuple):
    """Where decoding can begin anew, as `ocifs.compression.gzip.inflate_span` takes it."""

    blob_offset: int
    """Of the byte that it begins in."""
    bit: int
    """From 0, the lowest, to 7."""
    at_header: bool
    """Whether a member begins here, not a block."""
    window: bytes
    """The data before, 32 KiB or what there is of it; empty at a header."""


class Piece(NamedTuple):
    """Decoded data, never empty."""

    data: bytes
    restart: Restart | None
    """If decoding can begin anew at the first byte of ``data``. The first piece's is the blob's beginning."""


def walk(read_at: Callable[[int, int], bytes], size: int, span: int) -> Iterator[Piece]:
    """Decompress gzip data of ``size`` bytes, with a restart point about every ``span`` bytes of output.

    ``read_at(offset, size)`` gives stored bytes; it is called for ascending, overlapping ranges that cover everything.
    Members' checksums and sizes are checked. Raises `DamagedError` for data that does not inflate, ends early, or is
    followed by something else, after what comes before it was given out.
    """
    return iter(_Walk(read_at, size, span))


class _Candidate(NamedTuple):
    """A place where a block may begin."""

    blob_offset: int
    bit: int
    behind: int
    """Bytes of the data that was decoded behind the search which still lie in front of it."""


class _Walk:
    """The state of a walk: one decompressor, the last bytes that went in and came out."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int, span: int) -> None:
        self._read_at = read_at
        self._size = size
        self._span = span
        self._at = 0
        """Blob offset of the next byte to decompress."""
        self._chunk = self._chunk_before = memoryview(b"")
        self._chunk_at = self._chunk_before_at = 0
        self._recent: list[bytes] = []
        """At least the last 32 KiB of output, if there was as much."""
        self._restart: Restart | None = None
        """The restart point at the next byte of output."""
        self._since = 0
        """Bytes decoded behind the last restart point, and how many there must be for a search to begin."""
        self._due = span
        self._step = _FIRST_STEP
        self._probe = _PROBE
        self._begin_member()

    def __iter__(self) -> Iterator[Piece]:
        while self._at < self._size:
            if not self._at or self._since >= self._span:
                self._found(Restart(self._at, 0, at_header=True, window=b""))
            self._at = self._header_end()
            self._begin_member()
            while not self._inflater.eof:
                if self._since < self._due:
                    data = self._inflate(self._step)
                    self._step = min(2 * self._step, _MAX_STEP)
                    yield from self._out(data)
                else:
                    yield from self._search()
            self._end_member()

    # --- members ----------------------------------------------------------------------------------------------------

    def _begin_member(self) -> None:
        self._inflater = isal_zlib.decompressobj(wbits=-15)
        self._step = _FIRST_STEP
        self._member_size = self._member_crc32 = 0

    def _header_end(self) -> int:
        size = _CHUNK
        while True:
            try:
                return (
                    self._at + member_header_end(self._chunk, self._at - self._chunk_at) - (self._at - self._chunk_at)
                )
            except DamagedError:
                # Perhaps only the chunk ends too early.
                if self._chunk_at + len(self._chunk) == self._size or size > _MAX_HEADER:
                    raise
                self._load(size)
                size *= 4

    def _end_member(self) -> None:
        if self._at + TRAILER_SIZE > self._chunk_at + len(self._chunk):
            self._load(_CHUNK)
        trailer = self._chunk[self._at - self._chunk_at :][:TRAILER_SIZE]
        if len(trailer) < TRAILER_SIZE:
            raise DamagedError("the gzip data ends within a member's trailer")
        if struct.unpack("<II", trailer) != (self._member_crc32, self._member_size & 0xFFFFFFFF):
            raise DamagedError("a gzip member's data does not match its trailer")
        self._at += TRAILER_SIZE

    # --- bytes in, bytes out ----------------------------------------------------------------------------------------

    def _load(self, size: int) -> None:
        """Make the chunk begin at the next byte."""
        self._chunk_before, self._chunk_before_at = self._chunk, self._chunk_at
        self._chunk = memoryview(self._read_at(self._at, min(size, self._size - self._at)))
        self._chunk_at = self._at

    def _next(self, size: int) -> memoryview:
        """Give the next stored bytes, at most ``size``; at least one."""
        if self._at == self._chunk_at + len(self._chunk):
            self._load(_CHUNK)
        return self._chunk[self._at - self._chunk_at :][:size]

    def _stored(self, start: int, stop: int) -> bytes | memoryview:
        """Give stored bytes of the last two chunks."""
        if start >= self._chunk_at:
            return self._chunk[start - self._chunk_at : stop - self._chunk_at]
        before = self._chunk_before[start - self._chunk_before_at : self._chunk_at - self._chunk_before_at]
        return b"".join((before, self._chunk[: max(0, stop - self._chunk_at)]))

    def _inflate(self, size: int) -> bytes:
        """Decode the next stored bytes, ``size`` at most, or as many as decode to `_MAX_PIECE`."""
        if self._at < self._size:
            return self._decompress(self._next(size))
        data = self._decompress(memoryview(b""))  # isal may have taken everything, and not given it yet
        if not data and not self._inflater.eof:
            raise DamagedError("the gzip data is cut off")
        return data

    def _decompress(self, stored: memoryview) -> bytes:
        try:
            data: bytes = self._inflater.decompress(stored, _MAX_PIECE)
        except _Error as error:
            raise _does_not_inflate(error) from None
        self._at += len(stored) - len(self._inflater.unconsumed_tail) - len(self._inflater.unused_data)
        self._decoded(data)
        return data

    def _decoded(self, data: bytes) -> None:
        self._member_size += len(data)
        self._member_crc32 = isal_zlib.crc32(data, self._member_crc32)
        self._since += len(data)

    def _out(self, data: bytes) -> Iterator[Piece]:
        if not data:
            return
        if len(data) >= MAX_WINDOW:
            self._recent = [data]
        else:
            self._recent.append(data)
            if len(self._recent) > 2 * _PROBE:
                self._recent = [self._window()]
        restart, self._restart = self._restart, None
        yield Piece(data, restart)

    def _window(self) -> bytes:
        """Give the last 32 KiB of output."""
        return b"".join(self._recent)[-MAX_WINDOW:]

    def _found(self, restart: Restart) -> None:
        self._restart = restart
        self._since = 0
        self._due = self._span

    # --- looking for a block ----------------------------------------------------------------------------------------

    def _search(self) -> Iterator[Piece]:
        """Decode to a place from which decoding can begin anew, and a little more; or give up for now."""
        for _ in range(_TRIES):
            searched: list[bytes] = []
            candidates, held = self._candidates(searched)
            yield from self._out(b"".join(searched))
            pieces, size = [held], len(held)
            while candidates and size < MAX_WINDOW + _STORED_PROBE and not self._inflater.eof:
                pieces.append(self._inflate(_PROOF_STEP))
                size += len(pieces[-1])
            data = b"".join(pieces)
            proven = [point for point in candidates if self._proves(point, data)]
            if len(proven) == 1:
                point = proven[0]
                yield from self._out(data[: point.behind])
                self._found(Restart(point.blob_offset, point.bit, at_header=False, window=self._window()))
                self._since = len(data) - point.behind
                yield from self._out(data[point.behind :])
                return
            yield from self._out(data)
            if not candidates:
                self._probe = max(_MIN_PROBE, self._probe // 2)
                break
        self._due = self._since + self._span // 4

    def _candidates(self, out: list[bytes]) -> tuple[list[_Candidate], bytes]:
        """Decode in small pieces, which go to ``out``, until a block seems to begin.

        Gives where that may be, and the data of the last piece if they may lie within it.
        """
        probe = self._probe
        end = self._at + probe * _MAX_PROBES
        until = self._since + _MAX_SEARCHED
        while self._at < min(end, self._size) and self._since < until and not self._inflater.eof:
            stored, data = self._fed(probe, out)
            if not data and len(stored) == probe and not self._inflater.eof:
                start = max(self._chunk_before_at, self._at - 2 * probe - _LAG)
                seen = self._stored(start, self._at + _HEAD)
                bits = _looks_dynamic(seen, 8 * (self._at - probe - start) + _SILENCE)
                if bits:
                    return [_Candidate(start + bit // 8, bit % 8, 0) for bit in bits], b""
            out.append(data)
            if data == stored and len(data) == probe:
                return self._stored_end(out)
            if len(data) > _RUN_RATIO * probe:
                probe = _RUN_PROBE
        return [], b""

    def _fed(self, probe: int, out: list[bytes]) -> tuple[memoryview, bytes]:
        """Decode some pieces of ``probe`` bytes, until one gives nothing, itself, or very much; give it and its data."""
        decompress, append = self._inflater.decompress, out.append
        before = len(out)
        chunk = self._next(_PROBES * probe)
        stored, data, end = chunk, b"", 0
        much = _MAX_PIECE if probe == _RUN_PROBE else _RUN_RATIO * probe
        try:
            for at in range(0, len(chunk), probe):
                if data:
                    append(data)
                stored = chunk[at : at + probe]
                data = decompress(stored, _MAX_PIECE)
                end = at + len(stored)
                if not data or data == stored or len(data) > much:
                    break
        except _Error as error:
            raise _does_not_inflate(error) from None
        self._at += end - len(self._inflater.unused_data)
        self._decoded(b"".join((*out[before:], data)))
        return stored, data

    def _stored_end(self, out: list[bytes]) -> tuple[list[_Candidate], bytes]:
        """Decode stored data in larger pieces, as `_candidates`, until it ends."""
        at, stored, data = self._at, self._chunk[:0], b""
        while data == stored and self._at < self._size and not self._inflater.eof:
            out.append(data)
            at, stored = self._at, self._next(_STORED_PROBE)
            data = self._decompress(stored)
        # By chance it may seem to go on for a few bytes more.
        same = _common(data, stored)
        return [_Candidate(at + behind, 0, behind) for behind in range(max(0, same - _LAG), same + 1)], data

    def _proves(self, point: _Candidate, data: bytes) -> bool:
        """Whether decoding from the candidate gives what was decoded: ``data`` up to 32 KiB behind it."""
        following = data[point.behind :][:MAX_WINDOW]
        window = (self._window() + data[: point.behind])[-MAX_WINDOW:]
        stored = self._stored(point.blob_offset, self._at)
        try:
            found = inflate_span(stored, bit=point.bit, window=window, size=len(following), at_header=False)
        except DamagedError:
            return False
        return bool(following) and found == following


def _does_not_inflate(error: Exception) -> DamagedError:
    return DamagedError(f"the gzip data does not inflate: {error}")


def _common(one: bytes | memoryview, other: bytes | memoryview) -> int:
    """Give how many bytes two strings begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


_KRAFT: Final = [sum(128 >> length for at in (0, 3, 6) if (length := lengths >> at & 7)) for lengths in range(512)]
"""For three lengths of codes, the part of all codes that they take, in 128ths."""


def _looks_dynamic(stored: bytes | memoryview, last: int) -> list[int]:
    """Give the bits, up to ``last``, at which a block with dynamic codes may begin (RFC 1951, section 3.2.7).

    What is asked: type 2, at most 286 and 30 codes, and that the code lengths' own code is complete.
    """
    value = int.from_bytes(stored, "little")
    typed = value >> 2 & ~(value >> 1) & (1 << last + 1) - 1
    found = []
    while typed:
        bit = (typed & -typed).bit_length() - 1
        typed &= typed - 1
        head = value >> bit + 3
        if head & 31 > 29 or head >> 5 & 31 > 29:
            continue
        lengths = head >> 14 & (1 << 3 * ((head >> 10 & 15) + 4)) - 1
        part = 0
        while lengths:
            part += _KRAFT[lengths & 511]
            lengths >>= 9
        if part == 128:
            found.append(bit)
    return found
