"""Restart points of gzip data, found while it is decompressed once, from front to back.

A restart point is a place from which decoding can begin anew: a member's header, or a deflate block together with the
32 KiB of output before it (`ocifs.compression.gzip` says how it is entered). Members say where they begin. Blocks do
not, and no stock decompressor tells; but it can be watched.

How a block is found
====================
Where a span has become long enough, the decompressor is fed 32 bytes at a time, until a piece gives no output although
the one before did. A symbol with output takes at most 48 bits (RFC 1951, sections 3.2.5 and 3.2.7: 15 of a length's code
and 5 extra, 15 of a distance's and 13 extra), and comes out as soon as they are there. So behind 6 bytes without output the
last symbol that had any, which ended in the piece before, was the last of its block. What follows are the code that ends the
block, of 15 bits at most, empty blocks, and the header of the next block that is not empty. So wherever that was, the next
block, empty or not, begins *in the piece before the silence or in the 15 bits behind it*. (The header of a block with
dynamic codes takes 40 to 100 bytes, so that one piece falls within.) A step that inflates to more than may come out at once
leaves output behind in the decompressor, so that is taken out before the next begins.

Stored data comes out as it went in, and is followed to its end by the length that its header says; the next stored block's
header takes 5 bytes only. There the decompressor is fed single bytes: if two give nothing and the next gives one or two
bytes, it was a literal, not a match, which gives three at least; and a literal takes 15 bits at most, so that it did not
follow upon the last symbol with output. Again a block ended between the two.

All bits there are tried: decoding from the right one gives what was decoded, on to the next 64 KiB at least. If exactly one
does, it is the right one, for the right one is among them. That holds whatever the data is made for; that wrong ones
mostly fail is only why it pays. Two that both fit are accepted if they are the same: an empty block, and the one behind it.

A stream in which nothing is found (one block from front to back, or only blocks of fixed codes) has no restart points;
what to do then is the caller's to decide. Between points it is decoded in large steps, as fast as the library goes. A
point costs 2.4 ms, most of them for 1.2 µs each 32 bytes of the half block that is searched.

Pure: what is stored comes through a function, what is decoded goes out in pieces. Not here: checksums of spans, hashes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, cast

from isal import isal_zlib

from ocifs.compression.gzip import MAX_WINDOW, TRAILER_SIZE, SpanInflater, member_header_end
from ocifs.errors import DamagedError

_CHUNK: Final = 1 << 18
"""Bytes read at a time. The last two chunks are held: a point and the 64 KiB that prove it lie within them, mostly."""
_MAX_HEADER: Final = 1 << 20
"""Bytes of the longest member header that is read: 64 KiB of extra field, and names without end."""

_FIRST_STEP: Final = 1 << 12
_MAX_STEP: Final = 1 << 18
# Steps double within a member, because the decompressor copies what a member leaves of one, and members may be tiny.

_Error: Final = cast("type[Exception]", isal_zlib.error)

_MAX_RECENT: Final = 64
"""Pieces of output that are kept before they are joined."""

_MAX_PIECE: Final = 4 << 20
"""Bytes given out at once, and what the decompressor holds, at most, however much a step inflates to; more than a piece of
`_PROBE` bytes can."""

_PROBE: Final = 32
"""Bytes fed at a time while a block is looked for: less than half of most headers, so that one piece falls within."""
_MIN_PROBE: Final = 8
"""Where few different bytes occur headers are short: a search that finds nothing goes on with half as many, down to this."""
_PATIENCE: Final = 16
"""Points found before larger pieces are tried again."""
_RUN_RATIO: Final = 64
_RUN_PROBE: Final = 4
"""Bytes fed where the data inflates more than 64-fold: zeros, mostly, whose blocks are 4 MiB in 4 KiB, their headers 13."""
_MAX_SYMBOL: Final = 6
"""Bytes of the longest symbol that has output."""
_MAX_LITERAL: Final = 2
"""Bytes of the longest literal, 15 bits; and the most that comes out without a match, whose length is 3 at least."""
_PROBES: Final = 256
"""Pieces fed in one go."""
_MAX_PROBES: Final = 1 << 14
"""Pieces fed before a search is put off: 512 KiB, ten blocks of most compressors."""
_MAX_SEARCHED: Final = 8 << 20
"""Bytes decoded before a search is put off: two blocks of zeros."""
_TRIES: Final = 8
"""Places that may prove to be none before a search is put off."""
_MAX_CODE: Final = 15
"""Bits of the longest code (RFC 1951, section 3.2.7)."""
_LAG: Final = 8
"""Bytes that are tried in front of the piece before, for a decompressor that would give its output late. isal does not."""
_HEAD: Final = 10
"""Bytes of a header that are looked at, up to the lengths of the code lengths' own code."""
_PROOF_STEP: Final = 1 << 14
"""Bytes decoded at a time to have something to compare with."""
_PROOF: Final = 0xFFFF + 64
"""Bytes that are compared in all: more than a stored block has, for a bit that wrongly says that it is the last one."""
_GLANCE: Final = 64
"""Bytes that are compared first: nearly all wrong bits fail by then."""


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


class _Silence(NamedTuple):
    """Where the decompressor fell silent, so that a block must have ended: pieces as offsets in the blob."""

    spoke: int
    """Beginning of the last piece that gave output."""
    fell: int
    """Beginning of the next, which gave none."""
    data: bytes = b""
    """What came out behind it already."""


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
        self._points = 0
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
                return self._chunk_at + member_header_end(self._chunk, self._at - self._chunk_at)
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
        if len(data) == _MAX_PIECE and stored and not self._inflater.eof:
            # What isal holds, 64 KiB at most, would come out with the next piece, which then did not speak for itself.
            data += self._decompress(memoryview(b""))
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
            if len(self._recent) > _MAX_RECENT:
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
            silence = self._silence(searched)
            yield from self._out(b"".join(searched))
            if silence is None:
                if self._probe == _MIN_PROBE:
                    break
                self._probe //= 2
                continue
            following = [silence.data]
            while sum(map(len, following)) < _PROOF and not self._inflater.eof:
                following.append(self._inflate(_PROOF_STEP))
            data = b"".join(following)
            place = self._proven(silence, data[:_PROOF], ends=self._inflater.eof and len(data) <= _PROOF)
            if place is not None:
                self._found(Restart(place // 8, place % 8, at_header=False, window=self._window()))
                self._since = len(data)
                self._points += 1
                if self._points % _PATIENCE == 0:
                    self._probe = min(_PROBE, 2 * self._probe)
                yield from self._out(data)
                return
            yield from self._out(data)
        self._due = self._since + max(1, self._span // 4)

    def _silence(self, out: list[bytes]) -> _Silence | None:
        """Decode in small pieces, which go to ``out``, until one gives nothing behind one that gave something."""
        probe = self._probe
        end = min(self._size, self._at + probe * _MAX_PROBES)
        until = self._since + _MAX_SEARCHED
        spoke = -1
        while self._at < end and self._since < until and not self._inflater.eof:
            begin = self._at
            size, data = self._fed(probe, out)
            fell = self._at - size
            if fell > begin:
                spoke = fell - probe
            while not data and self._at < self._size and not self._inflater.eof:
                if spoke >= 0 and self._at - fell >= _MAX_SYMBOL:
                    return _Silence(spoke, fell)
                size = min(probe, len(self._next(probe)))
                data = self._decompress(self._next(size))
            out.append(data)
            spoke = self._at - size
            if len(data) > _RUN_RATIO * probe:
                probe = _RUN_PROBE
            elif size == probe and data == self._stored(fell, self._at) and (found := self._stored_end(out)):
                return found
        return None

    def _fed(self, probe: int, out: list[bytes]) -> tuple[int, bytes]:
        """Decode some pieces of ``probe`` bytes, to one that gives nothing, itself, or very much.

        Those before go to ``out``; gives how large the last was, and its data.
        """
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
        return len(stored), data

    def _stored_end(self, out: list[bytes]) -> _Silence | None:
        """Follow what seems to be stored data to where it may end, by what may be the header of its block."""
        start = max(self._chunk_before_at, self._at - _MAX_STORED)
        for end in _stored_ends(self._stored(start, self._at)):
            spoke = -1
            while self._at < start + end and not self._inflater.eof:
                left = start + end - self._at
                spoke = self._at
                out.append(self._decompress(self._next(left - _PROBE if left > _PROBE else left)))
            if spoke < 0 or self._inflater.eof or self._at == self._size:
                continue
            fell = self._at
            data = b""
            while not data and self._at < self._size and not self._inflater.eof:
                if self._at - fell == _MAX_SYMBOL and out[-1]:
                    return _Silence(spoke, fell)
                data = self._decompress(self._next(1))
            if self._at - 1 - fell >= _MAX_LITERAL and 0 < len(data) <= _MAX_LITERAL and out[-1]:
                return _Silence(spoke, fell, data)
            out.append(data)
        return None

    def _proven(self, silence: _Silence, data: bytes, *, ends: bool) -> int | None:
        """Give the bit of the blob at which a block begins, if exactly one place leads to ``data``, which follows.

        ``ends`` says that the member ends with it.
        """
        start = max(0, silence.spoke - _LAG)
        if not data or start < self._chunk_before_at:
            return None
        stored = self._stored(start, self._at)
        window = self._window()
        fitting = [
            bit
            for bit in _possible(stored, 8 * (silence.fell - start) + _MAX_CODE, data[0])
            if _leads_to(data, stored, bit, window, ends=ends)
        ]
        if not fitting:
            return None
        place = fitting[0]
        for bit in fitting[1:]:
            if not _is_same(stored, place, bit):
                return None
            place = bit
        return 8 * start + place


def _leads_to(data: bytes, stored: bytes | memoryview, bit: int, window: bytes, *, ends: bool) -> bool:
    """Whether decoding from there gives ``data``, and the member ends where ``data`` does if it ``ends``."""
    try:
        inflater = SpanInflater(stored[bit // 8 :], bit=bit % 8, window=window, at_header=False)
        glance = min(_GLANCE, len(data))
        if inflater.read(glance) != data[:glance] or inflater.read(len(data) - glance) != data[glance:]:
            return False
    except DamagedError:
        return False
    return inflater.between_members or not ends


def _does_not_inflate(error: Exception) -> DamagedError:
    return DamagedError(f"the gzip data does not inflate: {error}")


_KRAFT: Final = [sum(128 >> length for at in (0, 3, 6) if (length := lengths >> at & 7)) for lengths in range(512)]
"""For three lengths of codes, the part of all codes that they take, in 128ths."""


def _literal(bits: int) -> int:
    """Give the literal that nine bits begin with by the fixed codes (RFC 1951, section 3.2.6), -1 if none."""
    code = int(f"{bits:09b}"[::-1], 2)  # codes are packed from their highest bit
    if 0x30 <= code >> 1 <= 0xBF:
        return (code >> 1) - 0x30
    return code - 0x190 + 144 if code >= 0x190 else -1


_LITERAL: Final = [_literal(bits) for bits in range(512)]


def _possible(stored: bytes | memoryview, last: int, first: int) -> list[int]:
    """Give the bits, up to ``last``, at which a block may begin whose data, or that of a later one, begins with ``first``.

    Left out is only what isal refuses (and RFC 1951): type 3, stored blocks whose length is not given twice, dynamic codes
    with more than 286 or 30 of them or with lengths for more codes than there are, fixed codes of another literal.
    """
    value = int.from_bytes(stored[: last // 8 + _HEAD + 2], "little")
    found = []
    for bit in range(last + 1):
        head = value >> bit + 3
        match value >> bit + 1 & 3:
            case 0:
                at = (bit + 10) // 8
                length, again = stored[at : at + 2], stored[at + 2 : at + 4]
                if len(again) < 2 or all(one ^ other == 0xFF for one, other in zip(length, again, strict=True)):
                    found.append(bit)
            case 1:
                if _LITERAL[head & 511] in {-1, first}:
                    found.append(bit)
            case 2:
                if head & 31 <= 29 and (head >> 5 & 31) <= 29:
                    lengths = head >> 14 & (1 << 3 * ((head >> 10 & 15) + 4)) - 1
                    part = 0
                    while lengths:
                        part += _KRAFT[lengths & 511]
                        lengths >>= 9
                    if part <= 128:
                        found.append(bit)
            case _:
                pass
    return found


def _is_same(stored: bytes | memoryview, bit: int, later: int) -> bool:
    """Whether decoding from either comes to the same: behind an empty block, or at one stored header's length."""
    at = (bit + 10) // 8
    head = int.from_bytes(stored[bit // 8 : bit // 8 + 3], "little") >> bit % 8
    if head & 6:
        return head & 0x3FE == 2 and later == bit + 10  # fixed codes, and the one that ends the block
    if later < 8 * at:
        other = int.from_bytes(stored[later // 8 : later // 8 + 2], "little") >> later % 8
        return (later + 10) // 8 == at and other & 7 == head & 7
    return later == 8 * at + 32 and bytes(stored[at : at + 2]) == b"\0\0"


_MAX_STORED: Final = 5 + 0xFFFF
"""Bytes of the longest stored block, with its header."""
_MAX_GUESSES: Final = 4


def _stored_ends(stored: bytes | memoryview) -> list[int]:
    """Give the places behind ``stored`` at which a stored block may end that begins in it: the nearest first.

    A header's length is followed by its complement (RFC 1951, section 3.2.4), as one in 65,536 other places is.
    """
    size = len(stored) - 2
    value = int.from_bytes(stored[:-2], "little") ^ int.from_bytes(stored[2:], "little")
    differs = value.to_bytes(size, "little") if size > 0 else b""
    ends = set()
    at = differs.find(b"\xff\xff")
    while at >= 0:
        end = at + 4 + int.from_bytes(stored[at : at + 2], "little")
        if end > len(stored):
            ends.add(end)
        at = differs.find(b"\xff\xff", at + 1)
    return sorted(ends)[:_MAX_GUESSES]
