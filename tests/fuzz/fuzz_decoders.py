"""Fuzzes decompression and layer indexes with damaged input: ``python -m tests.fuzz.fuzz_decoders --seconds 600``.

The properties, each a function below. Whatever the bytes, nothing but an `OcifsError` comes out, and it comes out soon:

`check_pieces`
    spans, frames and streams: decoders give no more than they were asked for;
`check_build`
    a blob that the stock library decodes is indexed, and its spans are what that library gives; a blob that it refuses
    is refused; and under examination either gives an index that can be read to its end;
`check_index`
    a damaged index file gives an error, or exactly what the undamaged one gives.

Cases are numbered: a failure names its number, and ``--first N --cases 1`` repeats it.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import os
import random
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import zstandard
from isal import isal_zlib

from ocifs import layer_index
from ocifs.compression import Compression, detect, restarts, streams, zstd
from ocifs.compression.gzip import inflate_span, member_header_end
from ocifs.errors import OcifsError, UnsupportedError
from tests.fuzz.cases import run_cases
from tests.support import tarball as t

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Bytes:
    """Bytes as a blob or a file of the store."""

    def __init__(self, data: bytes) -> None:
        self.name = "case"
        self.data = data
        self.size = len(data)

    def read_at(self, offset: int, size: int, /) -> bytes:
        return self.data[offset : offset + size]

    def close(self) -> None:
        pass


@cache
def archives() -> tuple[bytes, ...]:
    """Give the uncompressed tars that cases are made from: small, empty, compressible, incompressible, large."""
    rng = random.Random(1)
    text = b" ".join(rng.randbytes(3).hex().encode() for _ in range(4000))
    return (
        b"",
        t.tarball(),
        t.tarball(t.entry("a", b"x" * 700), t.entry("b", text[:3000], xattrs={"user.a": b"1"})),
        t.tarball(t.entry("../x"), t.entry("text", text), t.entry("zeros", bytes(50_000))) + t.tarball(t.entry("c")),
        t.tarball(t.entry("random", rng.randbytes(90_000)), t.entry("text", text)),
        t.tarball(*(t.entry(f"f{number}", rng.randbytes(600_000) + text) for number in range(4))),
    )


def _gz(rng: random.Random, data: bytes) -> bytes:
    strategy = rng.choice((zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY))
    compressor = zlib.compressobj(rng.choice((0, 1, 6)), zlib.DEFLATED, 31, rng.choice((1, 9)), strategy)
    out = compressor.compress(data)
    if rng.randrange(3) == 0:
        out += compressor.flush(rng.choice((zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK)))
    return out + compressor.flush()


def _zst(rng: random.Random, data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(level=rng.choice((-5, 1, 3)), write_checksum=True)
    if rng.randrange(2):
        return compressor.compress(data)
    stream = compressor.compressobj()
    return stream.compress(data) + stream.flush()


_SKIPPABLE: Final = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
_WRITERS: Final[dict[Compression, Callable[[random.Random, bytes], bytes]]] = {
    Compression.GZIP: _gz,
    Compression.ZSTD: _zst,
    Compression.XZ: lambda _rng, data: lzma.compress(data, preset=0),
    Compression.BZIP2: lambda _rng, data: bz2.compress(data, 1),
}


def compressed(rng: random.Random, kind: Compression, data: bytes) -> bytes:
    """Compress in one member or in several, empty and skippable ones among them."""
    write = _WRITERS[kind]
    if rng.randrange(2):
        return write(rng, data)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((1, 3, 30))))
    parts = [write(rng, data[first:second]) for first, second in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    if kind is Compression.ZSTD:
        parts.insert(rng.randrange(len(parts) + 1), _SKIPPABLE)
    return b"".join(parts)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Damage bytes in one of the ways that disks, networks and people do."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        # Headers and trailers matter more than their size.
        at = rng.choice((at, min(rng.randrange(40), len(out)), max(0, len(out) - rng.randrange(40))))
        match rng.randrange(7):
            case 0 | 1:
                if at < len(out):
                    out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at:]
            case 3:
                del out[at : at + rng.choice((1, 4, 1000))]
            case 4:
                out[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
            case 5:
                out[at : at + 4] = rng.choice(
                    (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd")
                )
            case _:
                out += rng.choice((b"x", bytes(512), bytes(data[:100]), b"\x1f\x8b"))
    return bytes(out)


def check_pieces(rng: random.Random, kind: Compression, stored: bytes) -> None:
    """Every decoder takes any bytes: `OcifsError`, or no more than it was asked for."""
    detect(stored[:512])
    start = rng.choice((0, rng.randrange(len(stored) + 1)))
    piece, size = stored[start:], rng.choice((0, 1, 5000, 10**6))
    window = rng.randbytes(rng.choice((0, 100, 32768)))
    bit, at_header = rng.randrange(8), bool(rng.randrange(2))
    bit = 0 if at_header else bit
    inflate = rng.choice((zlib.decompressobj, isal_zlib.decompressobj))
    options: Any = {"bit": bit, "window": window, "size": size, "at_header": at_header}
    attempts: list[Callable[[], object]] = [
        lambda: _exactly(size, inflate_span(piece, **options, inflate=inflate)),
        lambda: check_walk(piece),
        lambda: member_header_end(piece),
        lambda: _exactly(size, zstd.FramesInflater(piece).read(size)),
        lambda: zstd.inflate_unsized(piece, bound=size),
        lambda: _covers(len(piece), zstd.walk(_Bytes(piece).read_at, len(piece))),
        lambda: _all_bounded(streams.decode(kind, iter([piece[:start], piece[start:]]))),
    ]  # fmt: skip
    for attempt in attempts:
        try:
            attempt()
        except OcifsError:
            continue


def check_walk(stored: bytes) -> None:
    """Walk gzip data, wherever its restart points are, and enter at each of them."""
    out = b""
    points: list[tuple[int, restarts.Restart]] = []
    with contextlib.suppress(OcifsError):
        for data, restart in restarts.walk(_Bytes(stored).read_at, len(stored), 1 << 14):
            assert data
            if restart is not None:
                points.append((len(out), restart))
            out += data
    for at, point in points:
        size = min(len(out) - at, 1 << 16)
        rest = stored[point.blob_offset :]
        got = inflate_span(rest, bit=point.bit, window=point.window, size=size, at_header=point.at_header)
        assert got == out[at : at + size]


def _exactly(size: int, got: bytes) -> None:
    assert len(got) == size


def _all_bounded(pieces: Iterator[bytes]) -> None:
    assert all(0 < len(piece) <= streams.PIECE_SIZE for piece in pieces)


def _covers(size: int, frames: Iterator[zstd.Frame]) -> None:
    assert sum(frame.blob_size for frame in frames) == size


def stock(kind: Compression, stored: bytes) -> bytes | None:
    """Decode with the stock library, member by member; None if anything is wrong or left over.

    The modules' own functions are more lenient: gzip's overlooks zeros at the end, lzma's and bz2's any junk there.
    """
    out = b""
    while stored or not out:
        member: Any = {
            Compression.GZIP: lambda: zlib.decompressobj(31),
            Compression.XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
            Compression.BZIP2: bz2.BZ2Decompressor,
        }[kind]()
        try:
            out += member.decompress(stored)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
            return None
        if not member.eof:
            return None
        stored = member.unused_data
        if kind is Compression.XZ:
            stored = stored.lstrip(b"\0")
        if not stored:
            break
    return out


def built(stored: bytes, *, tolerant: bool) -> tuple[bytes, bytes]:
    """Index a blob in a child process; give the index file and what the index decodes to."""
    with open(os.memfd_create("index"), "w+b") as out, open(os.memfd_create("copy"), "w+b") as copy:
        content = layer_index.Content.ARCHIVE
        made = layer_index.build(_Bytes(stored), out=out, reframed=copy, tolerant=tolerant, content=content)
        index_bytes, copy_bytes = (os.pread(file.fileno(), 1 << 30, 0) for file in (out, copy))
    index = layer_index.load(_Bytes(index_bytes))
    source = _Bytes(copy_bytes if made.reframed else stored)
    for entry in index.entries():
        assert entry.path is not None
    return index_bytes, b"".join(index.decode(number, source.read_at) for number in range(len(index.spans)))


def check_build(kind: Compression, stored: bytes) -> None:
    """An index is right or refused, as the stock library has it."""
    recognised = detect(stored[:512])
    comparable = recognised is kind and kind is not Compression.ZSTD
    expected = stock(kind, stored) if comparable else None
    got = None
    with contextlib.suppress(OcifsError):
        _index, got = built(stored, tolerant=False)
    if comparable:
        assert got == expected, "refused" if got is None else "taken, or decoded otherwise"
    try:
        built(stored, tolerant=True)
    except UnsupportedError:
        return  # no tar, or a window or dictionary that would take too much


def _read_everything(index_bytes: bytes, source: bytes) -> tuple[object, ...]:
    index = layer_index.load(_Bytes(index_bytes))
    blob = _Bytes(source)
    return (
        list(index.entries()),
        [bytes(index.decode(number, blob.read_at)) for number in range(len(index.spans))],
        (index.notices, index.digest, index.diff_id, index.layer_size, index.entry_count, index.damage, index.trailing),
    )


@cache
def _whole_index() -> tuple[bytes, bytes, tuple[object, ...]]:
    stored = _gz(random.Random(2), archives()[3])
    index_bytes, _data = built(stored, tolerant=False)
    return index_bytes, stored, _read_everything(index_bytes, stored)


def check_index(rng: random.Random) -> None:
    """A damaged index file is refused, or makes no difference."""
    index_bytes, stored, truth = _whole_index()
    try:
        got = _read_everything(damaged(rng, index_bytes), stored)
    except OcifsError:
        return
    assert got == truth


def check(number: int) -> None:
    """Run one case."""
    rng = random.Random(number)
    kind = rng.choice((Compression.GZIP, Compression.GZIP, *_WRITERS))
    stored = compressed(rng, kind, rng.choice(archives()[:-1] if number % 10 else archives()))
    broken = damaged(rng, stored) if rng.randrange(8) else stored
    check_pieces(rng, kind, broken)
    check_index(rng)
    if number % 4 == 0:
        check_build(kind, broken)


if __name__ == "__main__":
    run_cases(__doc__, check, hang_seconds=120)
