"""Compression formats: recognised by content (C1), entered at any bit, walked by frames, refused when broken (C2, C3)."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import shutil
import subprocess
import tarfile
import zlib
from io import BytesIO
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from isal import isal_zlib

from ocifs.compression import Compression, detect, streams, zstd
from ocifs.compression.gzip import MAX_WINDOW, SpanInflater, inflate_span, member_header_end
from ocifs.errors import DamagedError, OcifsError, UnsupportedError
from tests.support import deflate

if TYPE_CHECKING:
    from collections.abc import Callable

SKIPPABLE = b"\x5e\x2a\x4d\x18\x03\x00\x00\x00abc"
STOCK = pytest.mark.parametrize("inflate", [zlib.decompressobj, isal_zlib.decompressobj], ids=["zlib", "isal"])


def words(size: int, seed: int = 1) -> bytes:
    """Text that compresses to about a third, with matches near and far."""
    rng = random.Random(seed)
    vocabulary = [rng.randbytes(rng.randrange(2, 9)).hex().encode() for _ in range(700)]
    return b" ".join(rng.choice(vocabulary) for _ in range(size // 5 + 1))[:size]


def member(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)
    return compressor.compress(data) + compressor.flush()


def tar_of(*names: str) -> bytes:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return out.getvalue()


# --- recognising ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", Compression.EMPTY),
        (tar_of("a"), Compression.PLAIN),
        (tar_of(), Compression.PLAIN),
        (gzip.compress(b"", mtime=0), Compression.GZIP),
        (zstandard.compress(b""), Compression.ZSTD),
        (SKIPPABLE + zstandard.compress(b"x"), Compression.ZSTD),
        (lzma.compress(b""), Compression.XZ),
        (bz2.compress(b""), Compression.BZIP2),
        (bz2.compress(b"x"), Compression.BZIP2),
        (b"\x1f\x8b\x07" + bytes(600), Compression.UNKNOWN),
        (b"BZh9" + bytes(600), Compression.UNKNOWN),
        (b'{"_type": "https://in-toto.io/Statement/v0.1"}' * 20, Compression.UNKNOWN),
        (b"hsqs" + bytes(600), Compression.UNKNOWN),
        (b"x", Compression.UNKNOWN),
        (bytes(100), Compression.PLAIN),
    ],
)
def test_c1_content_decides(data: bytes, kind: Compression) -> None:
    assert detect(data[:512]) is kind


def test_c1_v7_tar_is_known_by_its_checksum() -> None:
    header = bytearray(tar_of("name")[:512])
    header[257:] = bytes(255)
    header[148:156] = b" " * 8
    header[:2] = b"\xff\xfe"
    for total in (sum(header), sum(header) - 512):  # unsigned, and as a machine with signed characters summed it
        header[148:156] = b"%06o\0 " % total
        assert detect(bytes(header)) is Compression.PLAIN
        header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) + 1)
    assert detect(bytes(header)) is Compression.UNKNOWN


def test_a_tar_with_a_wrong_checksum_is_still_a_tar() -> None:
    header = bytearray(tar_of("name")[:512])
    header[0] += 1
    assert detect(bytes(header)) is Compression.PLAIN


@given(st.binary(max_size=600))
def test_detect_takes_anything(data: bytes) -> None:
    assert isinstance(detect(data), Compression)


# --- spans of gzip ----------------------------------------------------------------------------------------------------


def flushed(data: bytes, step: int) -> bytes:
    """Deflate with a block boundary, at whatever bit, every ``step`` bytes."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    out = b""
    for at in range(0, len(data), step):
        out += compressor.compress(data[at : at + step])
        out += compressor.flush(zlib.Z_BLOCK)
    return out + compressor.flush()


def raw(data: bytes, level: int, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15, 1, strategy)
    return compressor.compress(data) + compressor.flush()


TEXT = words(70_000)
STREAMS = {
    "dynamic": flushed(TEXT, 1999),
    "fixed": raw(TEXT, 6, zlib.Z_FIXED),
    "huffman": raw(TEXT, 6, zlib.Z_HUFFMAN_ONLY),
    "fast": raw(TEXT, 1),
    "stored": raw(random.Random(2).randbytes(100_000), 6),
    "level 0": raw(TEXT, 0),
    "mixed": flushed(b"".join(random.Random(n).randbytes(700) + TEXT[n * 50 : n * 50 + 900] for n in range(60)), 701),
}


@STOCK
def test_a_stock_inflate_enters_every_block_at_every_bit(inflate: Callable[..., isal_zlib.Decompress]) -> None:
    seen = set()
    for name, stream in STREAMS.items():
        found, whole = deflate.blocks(stream)
        assert whole == zlib.decompress(stream, -15)
        for number, block in enumerate(found):
            bit = block.bit_offset % 8
            window = whole[max(0, block.offset - MAX_WINDOW) : block.offset]
            end = found[number + 3] if number + 3 < len(found) else deflate.Block(8 * len(stream), len(whole))
            size = end.offset - block.offset
            stored = stream[block.bit_offset // 8 : (end.bit_offset + 7) // 8]
            got = inflate_span(stored, bit=bit, window=window, size=size, at_header=False, inflate=inflate)
            assert got == whole[block.offset : end.offset], (name, number)
            for first in {0, min(1, size), size // 2, size}:
                inflater = SpanInflater(stored, bit=bit, window=window, at_header=False, inflate=inflate)
                assert inflater.read(first) + inflater.read(size - first) == whole[block.offset : end.offset]
            seen.add((bit, name))
    assert {bit for bit, _name in seen} == set(range(8))
    assert {bit for bit, name in seen if name == "mixed"} == set(range(8))


MEMBERS = {
    "one": [TEXT],
    "tiny": [TEXT[at : at + 300] for at in range(0, 60_000, 300)],
    "empty ones between": [b"", TEXT[:5000], b"", b"", TEXT[5000:5001], b""],
    "only empty": [b"", b""],
    "large": [TEXT, TEXT[:50_000]],
}


@STOCK
@pytest.mark.parametrize("parts", MEMBERS.values(), ids=MEMBERS)
def test_c2_a_span_runs_over_member_boundaries(
    parts: list[bytes], inflate: Callable[..., isal_zlib.Decompress]
) -> None:
    stored = b"".join(member(part) for part in parts)
    whole = b"".join(parts)
    assert inflate_span(stored, bit=0, window=b"", size=len(whole), at_header=True, inflate=inflate) == whole
    assert gzip.decompress(stored) == whole
    for size in (1, 777, len(whole) // 3 + 1):
        inflater = SpanInflater(stored, bit=0, window=b"", at_header=True, inflate=inflate)
        for at in range(0, len(whole), size):
            assert inflater.read(min(size, len(whole) - at)) == whole[at : at + size]
        with pytest.raises(DamagedError, match=r"ends before its recorded size|ends within a member's header"):
            inflater.read(1)


def test_member_headers_may_have_every_field() -> None:
    header = b"\x1f\x8b\x08\x1e\x00\x00\x00\x00\x00\xff\x06\x00BC\x02\x00\x12\x34n\0" + b"c" * 600 + b"\0"
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")
    assert member_header_end(header) == len(header)
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    stored = header + body.compress(TEXT) + body.flush() + zlib.crc32(TEXT).to_bytes(4, "little")
    stored += len(TEXT).to_bytes(4, "little")
    assert inflate_span(stored * 2, bit=0, window=b"", size=2 * len(TEXT), at_header=True) == TEXT * 2
    for size in range(len(header)):
        with pytest.raises(DamagedError, match=r"ends within a member's header|no gzip member"):
            member_header_end(header[:size])
    with pytest.raises(DamagedError, match="reserved flags"):
        member_header_end(b"\x1f\x8b\x08\x20" + bytes(20))
    for at in (4, 12, len(header) - 2, len(header) - 1):
        broken = bytearray(header)
        broken[at] ^= 0x40
        with pytest.raises(DamagedError, match="a gzip member's header does not match its checksum"):
            member_header_end(b"before" + bytes(broken), 6)
    assert member_header_end(b"before" + header, 6) == 6 + len(header)


def test_a_bomb_gives_no_more_than_the_span_holds() -> None:
    bomb = member(bytes(50_000_000), 9)
    assert inflate_span(bomb, bit=0, window=b"", size=1000, at_header=True) == bytes(1000)


def test_a_span_that_ends_early_is_damage_at_every_length() -> None:
    stored = member(TEXT[:3000])
    for size in range(len(stored) - 8 - 2):  # the last bits only say that the block is over
        with pytest.raises(DamagedError, match=r"ends before|ends within"):
            inflate_span(stored[:size], bit=0, window=b"", size=3000, at_header=True)


@given(st.binary(max_size=200), st.integers(0, 7), st.booleans())
@example(b"", 3, False)
def test_random_bytes_inflate_or_are_damage(data: bytes, bit: int, at_header: bool) -> None:
    try:
        got = inflate_span(data, bit=0 if at_header else bit, window=b"w" * 100, size=5000, at_header=at_header)
    except DamagedError:
        return
    assert len(got) == 5000


# --- zstd frames ------------------------------------------------------------------------------------------------------


def frames(data: bytes) -> list[zstd.Frame]:
    return list(zstd.walk(lambda offset, size: data[offset : offset + size], len(data)))


def streamed(data: bytes, level: int, *, checksum: bool = False) -> bytes:
    """One frame that does not say how much it holds."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compressobj()
    return compressor.compress(data) + compressor.flush()


def test_c2_zstd_frames_are_walked_without_decompressing() -> None:
    first, second = zstandard.compress(TEXT), streamed(TEXT[:5000], level=3)
    data = SKIPPABLE + first + second + SKIPPABLE
    assert frames(data) == [
        (0, 11, 0),
        (11, len(first), 70_000),
        (11 + len(first), len(second), 128 << 10),
        (len(data) - 11, 11, 0),
    ]
    assert zstd.FramesInflater(data).read(75_000) == TEXT + TEXT[:5000]
    inflater = zstd.FramesInflater(data)
    assert inflater.read(70_001) == TEXT + TEXT[:1]
    assert inflater.read(4_999) == TEXT[1:5000]
    with pytest.raises(DamagedError, match="ends before its recorded size"):
        inflater.read(1)
    assert zstd.inflate_unsized(data, bound=75_000) == TEXT + TEXT[:5000]


def test_zstd_headers_that_lie_close_together_are_read_together() -> None:
    empty_block, last_block = bytes(3), b"\x01\0\0"
    tiny_blocks = b"\x28\xb5\x2f\xfd\0\x58" + empty_block * 200_000 + last_block
    large_blocks = zstandard.compress(random.Random(1).randbytes(5_000_000))
    for data, reads, most in (
        (tiny_blocks, 15, 700_000),
        (SKIPPABLE * 50_000, 15, 700_000),
        (large_blocks, 45, 500_000),
    ):
        sizes: list[int] = []

        def read_at(offset: int, size: int, data: bytes = data, sizes: list[int] = sizes) -> bytes:
            sizes.append(len(data[offset : offset + size]))
            return data[offset : offset + size]

        assert sum(frame.blob_size for frame in zstd.walk(read_at, len(data))) == len(data)
        assert (len(sizes) <= reads, sum(sizes) <= most) == (True, True)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_791, 65_792, 150_000])
@pytest.mark.parametrize("checksum", [False, True])
def test_zstd_headers_of_every_size(size: int, checksum: bool) -> None:
    for level in (-5, 3, 19):
        data = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compress(words(size))
        assert [(frame.blob_size, frame.bound) for frame in frames(data)] == [(len(data), size)]
        data = streamed(words(size), level=level, checksum=checksum)
        assert frames(data)[0].bound >= size
        assert frames(data)[0].blob_size == len(data)


def test_zstd_cut_anywhere_is_damage() -> None:
    data = zstandard.compress(b"a" * 100) + zstandard.compress(TEXT[:2000])
    first = frames(data)[0].blob_size
    for size in range(1, len(data)):
        if size != first:
            with pytest.raises(DamagedError, match="blob_offset"):
                frames(data[:size])
    with pytest.raises(DamagedError, match=f"4 bytes at blob_offset {len(data)} are not zstd data"):
        frames(data + b"junk")


def test_zstd_that_would_exhaust_memory_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a window of 1024 MiB; at most 128 MiB"):
        frames(b"\x28\xb5\x2f\xfd\x00\xa0" + bytes(20))
    with pytest.raises(UnsupportedError, match="dictionary"):
        frames(b"\x28\xb5\x2f\xfd\x01\x58\x07" + bytes(20))


def test_zstd_bomb_gives_no_more_than_asked_for() -> None:
    bomb = zstandard.compress(bytes(100_000_000))
    assert zstd.FramesInflater(bomb).read(1000) == bytes(1000)
    with pytest.raises(DamagedError, match="more than its blocks can"):
        zstd.inflate_unsized(bomb, bound=1000)


@given(st.binary(max_size=100).map(lambda tail: b"\x28\xb5\x2f\xfd" + tail) | st.binary(max_size=100))
def test_random_bytes_are_frames_or_refused(data: bytes) -> None:
    try:
        assert sum(frame.blob_size for frame in frames(data)) == len(data)
        zstd.FramesInflater(data).read(1000)
    except OcifsError:
        return


# --- whole streams ----------------------------------------------------------------------------------------------------

COMPRESSORS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.GZIP: member,
    Compression.ZSTD: zstandard.compress,
    Compression.XZ: lzma.compress,
    Compression.BZIP2: bz2.compress,
}


def decoded(kind: Compression, data: bytes, step: int) -> bytes:
    return b"".join(streams.decode(kind, iter([data[at : at + step] for at in range(0, len(data), step)])))


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_c2_streams_of_several_members_decode(kind: Compression, step: int) -> None:
    parts = [TEXT[:3000], b"", b"x", TEXT[:40_000], bytes(3_000_000)]
    data = b"".join(map(COMPRESSORS[kind], parts))
    assert decoded(kind, data, step) == b"".join(parts)


def test_pieces_are_bounded() -> None:
    for kind, compress in COMPRESSORS.items():
        sizes = [len(piece) for piece in streams.decode(kind, iter([compress(bytes(5_000_000))]))]
        assert sum(sizes) == 5_000_000
        assert max(sizes) <= streams.PIECE_SIZE


def test_xz_streams_may_be_padded_with_zeros() -> None:
    data = lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4)
    for step in (1, 5, 1000):
        assert decoded(Compression.XZ, data, step) == b"onetwo"


@pytest.mark.parametrize("kind", [Compression.GZIP, Compression.XZ, Compression.BZIP2])
def test_streams_cut_or_followed_by_junk_are_damage_with_an_offset(kind: Compression) -> None:
    data = COMPRESSORS[kind](TEXT[:5000])
    for size in range(len(data)):
        with pytest.raises(DamagedError, match="blob_offset"):
            decoded(kind, data[:size], 1000)
    with pytest.raises(DamagedError, match=f"at blob_offset {len(data)}, behind the last member"):
        decoded(kind, data + b"junk", 1000)


def test_a_flipped_bit_is_found_by_the_checksum() -> None:
    data = bytearray(member(TEXT))
    data[-6] ^= 1
    with pytest.raises(DamagedError, match="incorrect data check"):
        decoded(Compression.GZIP, bytes(data), 1000)


def test_gnu_gzip_and_zstd_agree() -> None:
    for tool, kind in (("gzip", Compression.GZIP), ("xz", Compression.XZ), ("zstd", Compression.ZSTD)):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
        data = subprocess.run([tool, "-c"], input=TEXT, check=True, capture_output=True).stdout
        assert detect(data) is kind
        assert decoded(kind, data, 1000) == TEXT
