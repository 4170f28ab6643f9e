"""gzip and deflate from the middle: inflate a span that starts at any bit, across any number of members.

Not here: finding where spans may start (`restarts`), whole streams (`streams`).

How a span is entered
=====================
A deflate stream (RFC 1951) is a sequence of blocks, and decoding may start at any block if the 32 KiB of output before
it (the window) are known. Two things stand in the way of a stock inflate, which wants whole bytes from the beginning:

*The window* goes in as a preset dictionary, which raw inflate accepts at any time.

*The bit.* Blocks start at any bit of a byte. Shifting the data so that the block starts at bit 0 is wrong: a stored
block in it is aligned to bytes of the original, and would move. So the bits in front are *filled* instead, with empty
blocks that decode to nothing, built so that they end exactly where the span's first block starts:

- an empty block with fixed codes takes 3 bits of header and 7 bits of end-of-block: 10 bits, that is 2 modulo 8;
- an empty block with dynamic codes can be built in 91 bits (`_EMPTY_DYNAMIC`), that is 3 modulo 8.

One dynamic block for an odd start and then fixed ones reach every bit position from 0 to 7. The last byte of the padding
is shared: its low bits belong to the padding, its high bits are those of the span's first byte.

Where a member ends within a span come 8 bytes of trailer and the next member's header (RFC 1952), both on whole bytes.
The trailer is about the whole member, not our piece of it, so it is passed over here: the stored bytes of every span are
covered by SHA-256, and the index pass checks what gzip has to check.
"""

from __future__ import annotations

import zlib
from typing import Final, NamedTuple, Protocol, cast

from isal import isal_zlib

from ocifs.errors import DamagedError

MAX_WINDOW: Final = 32768
"""Bytes: the farthest a deflate match reaches back (RFC 1951, section 2)."""

TRAILER_SIZE: Final = 8
"""Bytes: CRC-32 and size modulo 2**32 of the member's data (RFC 1952, section 2.3.1)."""

_FIRST_STEP: Final = 4096
# Input is handed over in steps that double within a member. At a member's end the decompressor copies the step's unused
# rest: in eStargz, with members of a few hundred bytes, handing over everything would copy a span thousands of times.

_ERRORS: Final[tuple[type[Exception], ...]] = (zlib.error, cast("type[Exception]", isal_zlib.error))

_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0


def _bits(*fields: tuple[int, int]) -> tuple[int, int]:
    """Pack (value, width) fields from the lowest bit up, as deflate does; gives (bits, count)."""
    value = count = 0
    for field, width in fields:
        value |= field << count
        count += width
    return value, count


# RFC 1951, section 3.2.6: not the last block, type 01, then the fixed code of end-of-block, seven zero bits.
_EMPTY_FIXED: Final = _bits((0, 1), (1, 2), (0, 7))

# RFC 1951, section 3.2.7: not the last block, type 10; 257 literal/length codes, 1 distance code, 18 code length codes.
# The code length code has two symbols of one bit each: 1 (code 0) and 18, "repeat zero 11 to 138 times" (code 1).
# They are given in the order 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1. The lengths are then 255 zeros
# (138 and 117), a 1 for symbol 255, which makes the code complete, a 1 for end-of-block, and a 1 for the one distance.
_EMPTY_DYNAMIC: Final = _bits(
    (0, 1), (2, 2), (0, 5), (0, 5), (14, 4),
    *[(int(symbol in {18, 1}), 3) for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)],
    (1, 1), (138 - 11, 7), (1, 1), (117 - 11, 7),
    (0, 1), (0, 1), (0, 1),
    (1, 1),
)  # fmt: skip


class _Padding(NamedTuple):
    whole: bytes
    """Whole bytes of empty blocks."""
    last: int
    """The low bits of the byte that is shared with the span's first."""


def _padding(bit: int) -> _Padding:
    value, count = _EMPTY_DYNAMIC if bit % 2 else (0, 0)
    while count % 8 != bit:
        value |= _EMPTY_FIXED[0] << count
        count += _EMPTY_FIXED[1]
    packed = value.to_bytes((count + 7) // 8, "little")
    return _Padding(packed[:-1], packed[-1]) if bit else _Padding(packed, 0)


_PADDINGS: Final = tuple(_padding(bit) for bit in range(8))


class _Inflater(Protocol):
    """The part of zlib's decompression objects that is used; isal's are the same but twice as fast."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: bytes | memoryview, max_length: int = ..., /) -> bytes: ...


class Inflate(Protocol):
    """How raw inflate objects are made: `isal.isal_zlib.decompressobj`, or `zlib.decompressobj` itself."""

    def __call__(self, *, wbits: int, zdict: bytes = ...) -> _Inflater:
        """Make one; ``wbits`` is -15, ``zdict`` the window if there is any."""
        ...


def member_header_end(stored: bytes | memoryview, at: int = 0) -> int:
    """Give the offset behind the member header at ``at`` (RFC 1952, section 2.3).

    Raises `DamagedError` if there is none, if ``stored`` ends within it, or if it has a checksum that is wrong.
    """
    data = memoryview(stored)
    start = at
    if len(data) - at < 10:
        raise DamagedError("the gzip data ends within a member's header")
    if bytes(data[at : at + 3]) != b"\x1f\x8b\x08":
        raise DamagedError("there is no gzip member where one must begin")
    flags = data[at + 3]
    if flags & _RESERVED:
        raise DamagedError("a gzip member's header has reserved flags set")
    at += 10
    if flags & _FEXTRA:
        if len(data) - at < 2:
            raise DamagedError("the gzip data ends within a member's header")
        at += 2 + int.from_bytes(data[at : at + 2], "little")
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            at = _zero_from(data, at) + 1
    end = at + 2 if flags & _FHCRC else at
    if end > len(data):
        raise DamagedError("the gzip data ends within a member's header")
    if flags & _FHCRC and int.from_bytes(data[at:end], "little") != isal_zlib.crc32(data[start:at]) & 0xFFFF:
        raise DamagedError("a gzip member's header does not match its checksum")
    return end


def _zero_from(data: memoryview, at: int) -> int:
    while at < len(data):
        piece = bytes(data[at : at + 256])
        found = piece.find(0)
        if found >= 0:
            return at + found
        at += len(piece)
    raise DamagedError("the gzip data ends within a member's header")


def inflate_span(
    stored: bytes | memoryview,
    *,
    bit: int,
    window: bytes,
    size: int,
    at_header: bool,
    inflate: Inflate = isal_zlib.decompressobj,
) -> bytes:
    """Give the first ``size`` bytes of a span; the rest as `SpanInflater`."""
    return SpanInflater(stored, bit=bit, window=window, at_header=at_header, inflate=inflate).read(size)


class SpanInflater:
    """A span being inflated, as far as somebody asks for it. Not to be used by two threads at once."""

    def __init__(
        self,
        stored: bytes | memoryview,
        *,
        bit: int,
        window: bytes,
        at_header: bool,
        inflate: Inflate = isal_zlib.decompressobj,
    ) -> None:
        """Begin at the span's beginning.

        ``stored`` are the blob's bytes from the one that the span starts in; ``bit`` (0 to 7, from the lowest) is where in
        that byte. With ``at_header`` the span starts with a member header (``bit`` 0, no window); without, with a deflate
        block. Raises `DamagedError` if the first bits are none.
        """
        self._stored = memoryview(stored)
        self._inflate = inflate
        self._at = 0
        self._inflater: _Inflater | None = None
        if not at_header:
            self._inflater = inflate(wbits=-15, zdict=window) if window else inflate(wbits=-15)
            if bit and stored:
                # The span's bits of this byte are too few for any output.
                padding = _PADDINGS[bit]
                shared = padding.last | stored[0] & 0xFF << bit & 0xFF
                self._decompress(self._inflater, padding.whole + bytes((shared,)), 1)
                self._at = 1

    @property
    def between_members(self) -> bool:
        """Whether what was read ends with a member."""
        return self._inflater is None

    def read(self, size: int) -> bytes:
        """Give the next ``size`` bytes, never more, whatever the data says.

        Raises `DamagedError` if the data does not inflate, or ends before.
        """
        pieces: list[bytes] = []
        # All at once, mostly: a call costs little, but after each a thread has to get the GIL back.
        step = max(size, _FIRST_STEP)
        while size:
            inflater = self._inflater
            if inflater is None:
                self._at = member_header_end(self._stored, self._at)
                inflater = self._inflater = self._inflate(wbits=-15)
                step = _FIRST_STEP if pieces else step
            chunk = self._stored[self._at : self._at + step]
            self._at += len(chunk)
            piece = self._decompress(inflater, chunk, size)
            if not chunk and not piece:  # isal may have taken everything, and not given it yet
                raise DamagedError("the gzip data ends before its recorded size is reached")
            pieces.append(piece)
            size -= len(piece)
            step *= 2
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _decompress(self, inflater: _Inflater, chunk: bytes | memoryview, limit: int) -> bytes:
        try:
            piece = inflater.decompress(chunk, limit)
        except _ERRORS as error:
            raise DamagedError(f"the gzip data does not inflate: {error}") from None
        if inflater.eof:
            self._at += TRAILER_SIZE - len(inflater.unused_data)
            self._inflater = None
        else:
            self._at -= len(inflater.unconsumed_tail)
        return piece
