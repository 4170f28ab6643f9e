"""Zstandard frames: where they begin and end, how much they hold, and how to inflate a run of them.

Frames are independent, so every frame is a place where decompression can start; within a frame there is none. Walking
needs no decompression: a frame header, then blocks that say their own size (RFC 8878, section 3.1.1). A layer written
by most tools is one frame; zstd:chunked, pzstd and eStargz-like writers make many.

Not here: what is done about a frame that is too large to be a span (`ocifs.layer_index` keeps a re-framed copy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import zstandard

from ocifs.errors import DamagedError, UnsupportedError

_MAGIC: Final = 0xFD2FB528
_SKIPPABLE: Final = range(0x184D2A50, 0x184D2A60)
_MAX_BLOCK: Final = 128 << 10
"""Bytes that a block holds at most, uncompressed (RFC 8878, section 3.1.1.2.4), if the window is not smaller still."""
_MAX_HEADER: Final = 18
"""Bytes of the longest frame header: magic 4, descriptor 1, window 1, dictionary 4, content size 8."""

_READ_AHEAD: Final = 64 << 10
_NEAR: Final = 4 << 10
"""Bytes of stored data read at once where headers lie close together, 64 KiB, and how close that is."""

MAX_WINDOW: Final = 128 << 20
"""Bytes of the largest window that is accepted: 128 MiB (2**27), what the zstd command takes without ``--long=31``.

A frame that asks for more makes its decoder allocate that much, up to 2 TiB, so the header alone could exhaust a
machine. Container engines draw the line at the same place or lower.
"""


class Frame(NamedTuple):
    """A frame at ``blob_offset``, ``blob_size`` bytes long as stored.

    ``bound`` is what it cannot exceed uncompressed, by its header or the number of its blocks. A skippable frame holds 0
    bytes.
    """

    blob_offset: int
    blob_size: int
    bound: int


def walk(read_at: Callable[[int, int], bytes | memoryview], size: int) -> Iterator[Frame]:
    """Give the frames of a blob of ``size`` bytes, in order, reading only headers.

    Raises `DamagedError` with the blob offset where something else begins or where the blob ends too early, and
    `UnsupportedError` for a frame with a dictionary, or with a window above `MAX_WINDOW`.
    """
    headers = _Headers(read_at)
    at = 0
    while at < size:
        frame = _frame(headers.read_at, at, size)
        yield frame
        at += frame.blob_size


class _Headers:
    """Reads headers, a few bytes at ascending offsets: many at once where they lie close together."""

    def __init__(self, read_at: Callable[[int, int], bytes | memoryview]) -> None:
        self._read_at = read_at
        self._start = 0
        self._piece: bytes | memoryview = b""

    def read_at(self, offset: int, size: int) -> bytes | memoryview:
        at = offset - self._start
        if at + size > len(self._piece):
            # Behind a large block only as much as is asked for: what lies between is not wanted.
            near = at - len(self._piece) < _NEAR
            self._piece = self._read_at(offset, _READ_AHEAD if near else size)
            self._start, at = offset, 0
        return self._piece[at : at + size]


def _cut(at: int) -> DamagedError:
    return DamagedError(f"the zstd data ends within the frame that begins at blob_offset {at}")


def _frame(read_at: Callable[[int, int], bytes | memoryview], start: int, end: int) -> Frame:
    head = bytes(read_at(start, _MAX_HEADER))
    magic = int.from_bytes(head[:4], "little")
    if magic in _SKIPPABLE and len(head) >= 4:
        length = 8 + int.from_bytes(head[4:8], "little")
        if len(head) < 8 or start + length > end:
            raise _cut(start)
        return Frame(start, length, 0)
    if magic != _MAGIC or len(head) < 4:
        raise DamagedError(f"{end - start} bytes at blob_offset {start} are not zstd data")
    header_size, content_size, window, checksum = _header(head, start)
    at = start + header_size
    block_limit = min(window, _MAX_BLOCK)
    bound = 0
    last = False
    while not last:
        block = bytes(read_at(at, 3))
        if len(block) < 3:
            raise _cut(start)
        field = int.from_bytes(block, "little")
        last, kind, length = bool(field & 1), field >> 1 & 3, field >> 3
        if kind == 3:
            raise DamagedError(f"a zstd block of a reserved type is at blob_offset {at}")
        # Types 0 and 1, raw and one repeated byte, say what they hold; 2, compressed, holds what a block can.
        bound += block_limit if kind == 2 else length
        at += 3 + (1 if kind == 1 else length)
        if at > end:
            raise _cut(start)
    at += 4 if checksum else 0
    if at > end:
        raise _cut(start)
    # libzstd refuses a frame that does not hold what it says, so a lie about the size is found when it is decoded.
    return Frame(start, at - start, bound if content_size is None else content_size)


def _header(head: bytes, start: int) -> tuple[int, int | None, int, bool]:
    """Give (header size, content size, window size, whether a checksum follows); RFC 8878, section 3.1.1.1."""
    if len(head) < 6:
        raise _cut(start)
    descriptor = head[4]
    if descriptor & 0x08:
        raise DamagedError(f"the zstd frame at blob_offset {start} has a reserved bit set")
    single = bool(descriptor & 0x20)
    dictionary_size = (0, 1, 2, 4)[descriptor & 3]
    content_field = (int(single), 2, 4, 8)[descriptor >> 6]
    size = 5 + (not single) + dictionary_size + content_field
    if len(head) < size:
        raise _cut(start)
    at = 5
    window = 0
    if not single:
        exponent, mantissa = head[at] >> 3, head[at] & 7
        base = 1 << (10 + exponent)
        window = base + base // 8 * mantissa
        at += 1
    if any(head[at : at + dictionary_size]):
        raise UnsupportedError(
            f"the zstd frame at blob_offset {start} needs a dictionary, which layers never come with"
        )
    at += dictionary_size
    content_size = int.from_bytes(head[at : at + content_field], "little") if content_field else None
    if content_size is not None and content_field == 2:
        content_size += 256
    if single:
        window = content_size or 0  # RFC 8878, section 3.1.1.1.2: the whole content is the window
    if window > MAX_WINDOW:
        raise UnsupportedError(
            f"the zstd frame at blob_offset {start} needs a window of {window >> 20} MiB; "
            f"at most {MAX_WINDOW >> 20} MiB are accepted"
        )
    return size, content_size, window, bool(descriptor & 0x04)


class FramesInflater:
    """A run of whole frames being decompressed, as far as somebody asks for it. Not to be used by two threads at once."""

    def __init__(self, stored: bytes | memoryview) -> None:
        """Begin with the first frame."""
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._reader = decompressor.stream_reader(stored, read_across_frames=True)

    def read(self, size: int) -> bytes:
        """Give the next ``size`` bytes, never more. Raises `DamagedError` if the frames do not decode or hold less."""
        data = self.read_up_to(size)
        if len(data) < size:
            raise DamagedError("the zstd data ends before its recorded size is reached")
        return data

    def read_up_to(self, size: int) -> bytes:
        """Give the next ``size`` bytes, or what there is."""
        pieces: list[bytes] = []
        try:
            while size and (piece := self._reader.read(size)):
                pieces.append(piece)
                size -= len(piece)
        except zstandard.ZstdError as error:
            raise DamagedError(f"the zstd data does not decompress: {error}") from None
        except MemoryError:
            raise DamagedError("the zstd data asks for more memory than there is") from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def inflate_unsized(stored: bytes | memoryview, *, bound: int) -> bytes:
    """Give all that a run of whole frames holds; `DamagedError` if that is more than ``bound`` bytes."""
    data = FramesInflater(stored).read_up_to(bound + 1)
    if len(data) > bound:
        raise DamagedError("a zstd frame holds more than its blocks can")
    return data
