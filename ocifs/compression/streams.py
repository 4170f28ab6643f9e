"""Whole compressed streams from front to back, in bounded pieces: gzip, zstd, xz, bzip2.

The slow and certain way: one stock decompressor at a time, which checks everything its format has to check (checksums,
sizes), over all members of the stream. Used where there is nothing to start from within a stream, and where a faster
way failed and somebody has to say what is wrong and where.

Pure: stored bytes come in as chunks, uncompressed ones go out as pieces of at most `PIECE_SIZE`; what a stream inflates
to in total is for the caller to bound.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, cast

import zstandard

from ocifs.compression import Compression
from ocifs.compression.zstd import MAX_WINDOW
from ocifs.errors import DamagedError, UnsupportedError

PIECE_SIZE: Final = 1 << 20
"""Bytes of the largest piece that is given out: 1 MiB."""

_STEP: Final = 1 << 16
"""Bytes that a decompressor is handed at once. It copies what it did not use, so more would be slow on tiny members."""

_MAX_LZMA_MEMORY: Final = 128 << 20
"""Bytes an xz stream may ask for: ``xz -9`` needs 65 MiB to decompress; a header may claim 4 GiB."""


def decode(kind: Compression, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress a stream of ``kind`` that comes as ``chunks`` of any size.

    Raises `DamagedError` naming the blob offset, as near as the decompressor tells: for data that does not decode, ends
    early, or is followed by something else (rule C3). What decodes before that has been given out.
    """
    match kind:
        case Compression.GZIP:
            return _members(chunks, _Gzip)
        case Compression.XZ:
            return _members(chunks, _Xz)
        case Compression.BZIP2:
            return _members(chunks, _Bzip2)
        case Compression.ZSTD:
            return _zstd(chunks)
        case Compression.EMPTY | Compression.PLAIN:
            return chunks
        case Compression.UNKNOWN:
            raise UnsupportedError("the data is of no known compression")


class _Gzip:
    name = "gzip"
    magic = b"\x1f\x8b"

    def __init__(self) -> None:
        self._object = zlib.decompressobj(wbits=31)
        self.rest = b""

    @property
    def eof(self) -> bool:
        return self._object.eof

    def decompress(self, data: bytes) -> bytes:
        piece = self._object.decompress(data, PIECE_SIZE)
        self.rest = self._object.unused_data if self._object.eof else self._object.unconsumed_tail
        return piece


class _Xz:
    name = "xz"
    magic = b"\xfd7zXZ\x00"

    def __init__(self) -> None:
        self._object = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MAX_LZMA_MEMORY)
        self.rest = b""

    @property
    def eof(self) -> bool:
        return self._object.eof

    def decompress(self, data: bytes) -> bytes:
        piece = self._object.decompress(data, PIECE_SIZE)
        self.rest = self._object.unused_data if self._object.eof else b""
        while not self._object.eof and not self._object.needs_input and len(piece) < PIECE_SIZE:
            more = self._object.decompress(b"", PIECE_SIZE - len(piece))
            if not more:
                break
            piece += more
        return piece


class _Bzip2:
    name = "bzip2"
    magic = b"BZh"

    def __init__(self) -> None:
        self._object = bz2.BZ2Decompressor()
        self.rest = b""

    @property
    def eof(self) -> bool:
        return self._object.eof

    def decompress(self, data: bytes) -> bytes:
        piece = self._object.decompress(data, PIECE_SIZE)
        self.rest = self._object.unused_data if self._object.eof else b""
        return piece


def _members(chunks: Iterator[bytes], new: Callable[[], _Gzip | _Xz | _Bzip2]) -> Iterator[bytes]:
    """Decode member after member of a format whose members are simply put one behind the other."""
    kind = new()
    name, magic = kind.name, kind.magic
    member: _Gzip | _Xz | _Bzip2 | None = None
    blob_offset = 0
    data = b""
    begun = False
    for chunk in _steps(chunks):
        data += chunk
        while data or (member is not None and not _wants_input(member)):
            if member is None:
                if len(data) < len(magic) and magic.startswith(data):
                    break  # the magic may be split over two chunks
                if begun and name == "xz" and not data.strip(b"\0"):
                    # xz-file-format section 2.2: zeros may pad streams, to a multiple of four bytes.
                    blob_offset += len(data)
                    data = b""
                    break
                if begun and name == "xz" and data[:1] == b"\0":
                    stripped = data.lstrip(b"\0")
                    blob_offset += len(data) - len(stripped)
                    data = stripped
                    continue
                if not data.startswith(magic):
                    where = "behind the last member" if begun else "where it should begin"
                    raise DamagedError(
                        f"there are bytes that are not {name} data at blob_offset {blob_offset}, {where}"
                    )
                member = new()
                begun = True
            try:
                piece = member.decompress(data)
            except (zlib.error, lzma.LZMAError, OSError, ValueError, MemoryError) as error:
                raise DamagedError(
                    f"the {name} data does not decompress near blob_offset {blob_offset}: {_sentence(error)}"
                ) from None
            blob_offset += len(data) - len(member.rest)
            data = member.rest
            if member.eof:
                member = None
            if piece:
                yield piece
    if data:
        raise DamagedError(f"there are bytes that are not {name} data at blob_offset {blob_offset}")
    if member is not None or not begun:
        raise DamagedError(f"the {name} data is cut off: it ends at blob_offset {blob_offset}")


def _wants_input(member: _Gzip | _Xz | _Bzip2) -> bool:
    """Whether a decompressor that was given everything there is has given everything back."""
    inner = member._object  # noqa: SLF001 - the classes above are this function's own
    return inner.needs_input if isinstance(inner, (lzma.LZMADecompressor, bz2.BZ2Decompressor)) else True


def _sentence(error: Exception) -> str:
    # zlib's begin with "Error -3 while decompressing data: ", of which only the rest says something.
    return str(error).rpartition("decompressing data: ")[2].strip().rstrip(".") or type(error).__name__


def _steps(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for at in range(0, len(chunk), _STEP):
            yield chunk[at : at + _STEP]


class _Pull:
    """Chunks as a file for zstandard's reader, which is the one that bounds its output."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""
        self.taken = 0

    def read(self, size: int = -1, /) -> bytes:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._left = chunk
        size = len(self._left) if size < 0 else size
        piece, self._left = self._left[:size], self._left[size:]
        self.taken += len(piece)
        return piece


def _zstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    # That the stream ends where a frame does is seen by walking its frames (`zstd.walk`), not here.
    source = _Pull(chunks)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    # zstandard needs no more of a file than read().
    with decompressor.stream_reader(cast("BinaryIO", source), read_size=_STEP, read_across_frames=True) as reader:
        while True:
            try:
                piece = reader.read(PIECE_SIZE)
            except (zstandard.ZstdError, MemoryError) as error:
                raise DamagedError(
                    f"the zstd data does not decompress near blob_offset {source.taken}: {_sentence(error)}"
                ) from None
            if not piece:
                return
            yield piece
