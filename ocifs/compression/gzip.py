"""gzip and deflate from the middle: inflate a span that starts at any bit, across any number of members.

Not here: finding where spans may start (`ocifs.layer_index` does it with rapidgzip), whole streams (`streams`).

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
The trailer's checksum covers the whole member, not our piece of it, so it is not checked here: the stored bytes of every
span are covered by SHA-256, and the index pass checks what gzip has to check.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple, Protocol, cast

from isal import isal_zlib

from ocifs.errors import DamagedError

MAX_WINDOW: Final = 32768
"""Bytes: the farthest a deflate match reaches back (RFC 1951, section 2)."""

TRAILER_SIZE: Final = 8
"""Bytes: CRC-32 and size modulo 2**32 of the member's data (RFC 1952, section 2.3.1)."""

_FIRST_STEP: Final = 4096
_MAX_STEP: Final = 1 << 18
# Input is handed over in steps that double from 4 KiB to 256 KiB within a member. At a member's end the decompressor
# copies the step's unused rest: in eStargz, with members of a few hundred bytes, handing over everything at once
# would copy a span of 1 MiB thousands of times.

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

    Raises `DamagedError` if there is none, or if ``stored`` ends within it.
    """
    data = memoryview(stored)
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
    if flags & _FHCRC:
        at += 2
    if at > len(data):
        raise DamagedError("the gzip data ends within a member's header")
    return at


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
    need: int | None = None,
    inflate: Inflate = isal_zlib.decompressobj,
) -> bytes:
    """Give the ``size`` bytes of a span, or only its first ``need`` ones.

    ``stored`` are the blob's bytes from the one that the span starts in; ``bit`` (0 to 7, from the lowest) is where in
    that byte. With ``at_header`` the span starts with a member header (``bit`` 0, no window); without, with a deflate
    block. Never gives more than it was asked for, whatever the data says. Raises `DamagedError` if the data does not
    decode, or ends before.
    """
    want = size if need is None else min(need, size)
    return _Span(memoryview(stored), bit, window, inflate, at_header=at_header).read(want)


def check_last_span(stored: bytes | memoryview, *, bit: int, window: bytes, size: int, at_header: bool) -> int | None:
    """Check that the blob ends as gzip data must: after ``size`` bytes a trailer, empty members, and nothing else.

    ``stored`` goes up to the blob's end. Raises `DamagedError`, for bytes behind the last member with their number
    (rule C3). Gives None, or, for a member that begins before the span and ends in it, how many bytes it must have
    before the span by its trailer, modulo 2**32: that is for the caller to check.
    """
    span = _Span(memoryview(stored), bit, window, zlib.decompressobj, at_header=at_header)
    span.read(size)
    span.finish()
    return span.before


def member_tail(stored: bytes | memoryview, *, bit: int, window: bytes, size: int, at_header: bool) -> int | None:
    """Give how many bytes of a span belong to the member that goes on behind it; None if all do, and more before."""
    span = _Span(memoryview(stored), bit, window, isal_zlib.decompressobj, at_header=at_header)
    span.read(size)
    return span.tail()


class _Span:
    """One pass over a span's stored bytes."""

    def __init__(
        self,
        stored: memoryview,
        bit: int,
        window: bytes,
        inflate: Inflate,
        *,
        at_header: bool,
    ) -> None:
        self._stored = stored
        self._inflate = inflate
        self._at = 0
        self._step = _FIRST_STEP
        self._inflater: _Inflater | None = None
        self._trailer_due = False
        """Whether a member's data has ended and its trailer comes next."""
        self._lead = b""
        self._given = 0
        self.member_size: int | None = None
        """Bytes that the current member has given, None if its start was not seen."""
        self.before: int | None = None
        """Bytes of the first member before the span, by its trailer, modulo 2**32; None if it began here."""
        if not at_header:
            self._inflater = inflate(wbits=-15, zdict=window) if window else inflate(wbits=-15)
            if bit and stored:
                padding = _PADDINGS[bit]
                self._lead = padding.whole + bytes((padding.last | stored[0] & 0xFF << bit & 0xFF,))
                self._at = 1

    def read(self, want: int) -> bytes:
        pieces: list[bytes] = []
        while want:
            piece = self._next(want)
            if piece:
                pieces.append(piece)
                want -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def finish(self) -> None:
        """Go on to the end of the data, where nothing more may come out."""
        while True:
            if self._trailer_due:
                self._end_member()
            if self._inflater is None:
                if self._at == len(self._stored):
                    return
                if bytes(self._stored[self._at : self._at + 2]) == b"\x1f\x8b":
                    self._begin_member()
                    continue
                left = len(self._stored) - self._at
                raise DamagedError(f"{left} bytes behind the last gzip member are not gzip data")
            if self._next(1):
                raise DamagedError("the gzip data goes on behind its recorded end")

    def tail(self) -> int | None:
        """Give how much the member has given that is under way where the data ends, nothing of it coming from behind."""
        while True:
            size = self.member_size
            if self._trailer_due:
                self._end_member()
            elif self._at == len(self._stored):
                return 0 if self._inflater is None else size
            elif self._inflater is None:
                self._begin_member()
            else:
                self._next(1)  # may say that the member ends here; what else it gives belongs to the next span
                if not self._trailer_due:
                    return size

    def _next(self, limit: int) -> bytes:
        """Decode one step, at most ``limit`` bytes; empty where a member begins or ends."""
        if self._trailer_due:
            self._end_member()
        inflater = self._inflater or self._begin_member()
        if self._lead:
            given = 0
            chunk: bytes | memoryview = self._lead
            self._lead = b""
        else:
            chunk = self._stored[self._at : self._at + self._step]
            given = len(chunk)
            if not given:
                raise DamagedError("the gzip data ends before its recorded size is reached")
        try:
            piece = inflater.decompress(chunk, limit)
        except _ERRORS as error:
            raise DamagedError(f"the gzip data does not inflate: {error}") from None
        self._at += given
        self._step = min(2 * self._step, _MAX_STEP)
        self._given += len(piece)
        if self.member_size is not None:
            self.member_size += len(piece)
        if inflater.eof:
            self._at -= len(inflater.unused_data)
            self._inflater = None
            self._trailer_due = True
        elif len(piece) == limit:
            # The decompressor may hold input it has not used. Nobody reads on after the limit but `finish`.
            self._at -= len(inflater.unconsumed_tail)
        return piece

    def _begin_member(self) -> _Inflater:
        self._at = member_header_end(self._stored, self._at)
        self._inflater = self._inflate(wbits=-15)
        self._step = _FIRST_STEP
        self.member_size = 0
        return self._inflater

    def _end_member(self) -> None:
        trailer = self._stored[self._at : self._at + TRAILER_SIZE]
        if len(trailer) < TRAILER_SIZE:
            raise DamagedError("the gzip data ends within a member's trailer")
        crc32, size = struct.unpack("<II", trailer)
        if self.member_size is None:
            self.before = (size - self._given) & 0xFFFFFFFF
        elif self.member_size == 0 and crc32:
            # The one checksum that rapidgzip overlooks. The CRC-32 of nothing is 0.
            raise DamagedError("an empty gzip member's trailer has a wrong checksum")
        elif size != self.member_size & 0xFFFFFFFF:
            raise DamagedError("a gzip member's trailer has another size than its data")
        self._at += TRAILER_SIZE
        self._trailer_due = False
